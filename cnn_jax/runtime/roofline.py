"""Estimates how long a step takes from what it launches and what the device can do at best."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cnn_jax.runtime.hlo import Kernel

PARTS = ("compute", "memory", "links", "launches")


@dataclass(frozen=True)
class Rates:
    """What one device can do at best, from its vendor's tables.

    Attributes:
      flops_per_second: dense matrix rate by dtype of the operands, in HLO's names: `bf16`, `f32`;
        a dtype that is not there runs at the slowest of them.
      memory_bytes_per_second: of the main memory.
      link_bytes_per_second: that one device sends to others; unused by a single device.
      seconds_per_launch: between the end of one kernel and the start of the next.
    """

    flops_per_second: Mapping[str, float]
    memory_bytes_per_second: float
    link_bytes_per_second: float
    seconds_per_launch: float

    def __post_init__(self) -> None:
        rates = {f"flops_per_second[{k!r}]": v for k, v in self.flops_per_second.items()}
        rates["memory_bytes_per_second"] = self.memory_bytes_per_second
        rates["link_bytes_per_second"] = self.link_bytes_per_second
        if not self.flops_per_second:
            raise ValueError("flops_per_second must name at least one dtype, got none")
        for name, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")
        if not self.seconds_per_launch >= 0:
            raise ValueError(
                f"seconds_per_launch must not be negative, got {self.seconds_per_launch}"
            )


@dataclass(frozen=True)
class Assumptions:
    """The share of each rate that kernels are taken to reach."""

    matrix_efficiency: float = 0.7
    memory_efficiency: float = 0.88
    link_efficiency: float = 0.8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


@dataclass(frozen=True)
class Estimate:
    """An estimate, not a measurement.

    Attributes:
      seconds: of a step, by what they are spent on: `compute`, `memory`, `links`, `launches`.
      images: in a step, on all devices together.
      devices: that share a step.
    """

    seconds: Mapping[str, float]
    images: int
    devices: int
    rates: Rates
    assumptions: Assumptions

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds

    @property
    def images_per_second_per_device(self) -> float:
        return self.images_per_second / self.devices

    @property
    def bound(self) -> str:
        """What most of the step is spent on."""
        return max(PARTS, key=self.seconds.__getitem__)


def estimate(
    kernels: Iterable[Kernel],
    rates: Rates,
    *,
    images: int,
    devices: int = 1,
    assumptions: Assumptions | None = None,
) -> Estimate:
    """Returns the estimated time of a step.

    With `F` FLOPs of convolutions and products at the rate `P` of their dtype, `B` bytes to and
    from main memory at `W`, `L` bytes sent (around a ring) at `V`, efficiencies `e` and `tau`
    seconds a launch, kernels run one after the other:

        T = sum_k max(F_k / (e_F P), B_k / (e_B W), L_k / (e_L V)) + N tau + X

    Each kernel's time is spent on the largest of its three terms. Asynchronous collectives hide
    behind the other kernels: `X` is what is left of their time when those are done, at least 0.
    Elementwise operations and on-chip traffic are taken to hide behind the bytes.

    Args:
      kernels: what one device launches in a step, `hlo.kernels(program)`.
      images: in a step, on all devices together.
      devices: that share a step.

    Raises:
      ValueError: without kernels, or if `images` or `devices` is not positive.
    """
    kernels = tuple(kernels)
    if not kernels:
        raise ValueError("kernels is empty: there is nothing to estimate")
    for name, value in (("images", images), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    assumptions = assumptions or Assumptions()
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    hidden = 0.0
    for kernel in kernels:
        seconds["launches"] += kernel.times * rates.seconds_per_launch
        terms = kernel_seconds(kernel, rates, assumptions)
        if kernel.collective and kernel.collective.asynchronous:
            hidden += kernel.times * terms.pop("links")
        part = max(terms, key=terms.__getitem__)
        seconds[part] += kernel.times * terms[part]
    seconds["links"] += max(0.0, hidden - sum(seconds.values()))
    return Estimate(seconds, images, devices, rates, assumptions)


def kernel_seconds(kernel: Kernel, rates: Rates, assumptions: Assumptions) -> dict[str, float]:
    """Returns the seconds that one launch needs for its FLOPs, its bytes and its messages alone."""
    slowest = min(rates.flops_per_second.values())
    matrix_rate = rates.flops_per_second.get(kernel.matrix_dtype, slowest)
    sent = kernel.collective.sent_bytes if kernel.collective else 0.0
    return {
        "compute": kernel.flops.matrix / (assumptions.matrix_efficiency * matrix_rate),
        "memory": kernel.traffic.total
        / (assumptions.memory_efficiency * rates.memory_bytes_per_second),
        "links": sent / (assumptions.link_efficiency * rates.link_bytes_per_second),
    }
