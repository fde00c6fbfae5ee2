"""Machines to compile for, by a name such as `v5e:4x4` or `h200:8`, with or without having one.

A process that describes a machine should be started with `Topology.environment()`: JAX reads
most of it once, when it is imported.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc

from cnn_jax.errors import UserError, nearest
from cnn_jax.runtime.accelerators import ACCELERATORS, Accelerator, gpu_target_config

COMPILERS: dict[str, tuple[Sequence[str], str]] = {
    "tpu": (("libtpu",), 'libtpu: pip install "cnn_jax[aot-tpu]"'),
    "cuda": (
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
        'JAX for CUDA: pip install "cnn_jax[aot-gpu]"',
    ),
    "cpu": ((), ""),
}
"""The modules of which one is a platform's compiler, and what to do without; none: it is in JAX."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are joined.

    Attributes:
      name: in full, as `parse_topology` takes it.
      accelerator: the kind of device.
      shape: chips along each axis of a TPU slice; else (hosts, devices on each).
      num_devices: JAX devices in all.
    """

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]
    num_devices: int

    @property
    def platform(self) -> str:
        """Returns "tpu", "cuda" or "cpu"."""
        return self.accelerator.platform

    @property
    def links(self) -> int:
        """Returns how many links of a device an all-reduce among all of them can use at once.

        A slice that wraps around uses two along each axis, in both directions of a ring. In one
        that does not, a chip in a corner has one neighbour along each axis, and no algorithm is
        faster than the corners; on two axes a ring through all chips, both ways, is as fast.
        Links of a GPU reach the others of its host.
        """
        if self.num_devices == 1 or self.accelerator.links is None:
            return 0
        if self.platform != "tpu":
            return self.accelerator.links
        axes = sum(size > 1 for size in self.shape)
        return 2 * axes if self._wraps_around() else axes

    def _wraps_around(self) -> bool:
        """Returns whether the chips at the two ends of each axis are neighbours."""
        tpu = self.accelerator.tpu
        if tpu is None or tpu.axes == 3:
            return all(size % 4 == 0 for size in self.shape)
        return math.prod(self.shape) == tpu.chips_per_pod

    def environment(self) -> dict[str, str]:
        """Returns the variables that a process needs before JAX is imported in it.

        Such a process computes on the CPU if at all, so it leaves accelerators that are present
        to others, and compiles on a TPU machine while another process trains there: libtpu's
        lock (/tmp/libtpu_lockfile), which guards the chips, is neither awaited nor taken.
        """
        return {"JAX_PLATFORMS": "cpu"} | {
            "cpu": {"JAX_NUM_CPU_DEVICES": str(self.num_devices)},
            "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
            "tpu": {
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "TPU_LOG_DIR": "disabled",
                # Of the machine that libtpu runs on, not of the one described: any will do, but
                # without them it asks Google Cloud's metadata server, and complains without one.
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_ACCELERATOR_TYPE": "v5litepod-1",
                "TPU_WORKER_HOSTNAMES": "localhost",
            },
        }[self.platform]

    def missing_compiler(self) -> str:
        """Returns the compiler that is not installed and how to install it; else ""."""
        modules, needed = COMPILERS[self.platform]
        if not modules or any(importlib.util.find_spec(module) for module in modules):
            return ""
        return needed

    def devices(self) -> list[Any]:
        """Returns the devices, for `make_mesh` and so for lowering and compiling.

        They hold no arrays, unless they are CPUs. Raises UserError where the compiler for them
        is not installed or refuses the topology.
        """
        if missing := self.missing_compiler():
            raise UserError(f"{self.name}: needs {missing}")
        try:
            if self.platform == "tpu":
                return self._tpu_devices()
            if self.platform == "cuda":
                return self._gpu_devices()
            return self._cpu_devices()
        except RuntimeError as error:
            if "lockfile" in str(error):
                raise UserError(
                    f"{self.name}: another process uses libtpu; wait for its end, or set "
                    "ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile all the same"
                ) from error
            raise UserError(f"{self.name}: {str(error).splitlines()[0]}") from error

    def _tpu_devices(self) -> list[Any]:
        tpu = self.accelerator.tpu
        return get_topology_desc(
            self.name,
            "tpu",
            chips_per_host_bounds=[1, 1, 1] if math.prod(self.shape) == 1 else [2, 2, 1],
            chip_config_name="megacore" if tpu and tpu.megacore else "default",
        ).devices

    def _gpu_devices(self) -> list[Any]:
        hosts, devices = self.shape
        return get_topology_desc(
            self.name,
            "cuda",
            target_config=gpu_target_config(self.accelerator),
            topology=f"1x{hosts}x{devices}",  # slices, hosts of each, devices of each
        ).devices

    def _cpu_devices(self) -> list[Any]:
        devices = jax.devices("cpu")
        if len(devices) < self.num_devices:
            raise UserError(
                f"{self.name}: this process has {len(devices)} CPU devices; start it with "
                f"JAX_NUM_CPU_DEVICES={self.num_devices}"
            )
        return devices[: self.num_devices]


def parse_topology(text: str) -> Topology:
    """Returns the topology of a name such as `v5e:4x4`, `v5p:2x2x1`, `h200:8`, `l4` or `cpu:8`.

    Raises UserError where there is no such accelerator, or no such number or shape of it.
    """
    kind, colon, size = text.strip().lower().partition(":")
    if kind not in ACCELERATORS:
        longer = [name for name in ACCELERATORS if name.startswith(kind)]
        raise UserError(
            f"topology {text!r}: no accelerator {kind!r}{nearest(kind, longer or ACCELERATORS)}; "
            f"known: {', '.join(ACCELERATORS)}"
        )
    accelerator = ACCELERATORS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size if colon else "1"):
        raise UserError(f"topology {text!r}: {_rule(kind)}")
    shape = tuple(int(number) for number in (size or "1").split("x"))
    if not _exists(accelerator, shape):
        raise UserError(f"topology {text!r}: {_rule(kind)}")
    name = f"{kind}:{'x'.join(map(str, shape))}"
    if accelerator.tpu:
        devices = math.prod(shape) * accelerator.tpu.devices_per_chip
        return Topology(name, accelerator, shape, devices)
    (devices,) = shape
    hosts = math.ceil(devices / (accelerator.devices_per_host or devices))
    return Topology(name, accelerator, (hosts, devices // hosts), devices)


def require_compilers(topologies: Iterable[Topology]) -> None:
    """Raises UserError with a line for each compiler that is not installed."""
    names: dict[str, list[str]] = {}
    for topology in topologies:
        if missing := topology.missing_compiler():
            names.setdefault(missing, []).append(topology.name)
    if names:
        lines = [f"{', '.join(of_it)}: needs {missing}" for missing, of_it in names.items()]
        raise UserError("\n".join(lines))


def _exists(accelerator: Accelerator, shape: tuple[int, ...]) -> bool:
    """Whether libtpu, or the way in which hosts are filled, knows this shape."""
    tpu, chips = accelerator.tpu, math.prod(shape)
    if tpu:
        whole_hosts = all(size % 2 == 0 for size in shape[:2])
        return len(shape) == tpu.axes and chips <= tpu.chips_per_pod and (chips == 1 or whole_hosts)
    full = accelerator.devices_per_host
    return len(shape) == 1 and (full is None or chips <= full or chips % full == 0)


def _rule(kind: str) -> str:
    accelerator = ACCELERATORS[kind]
    if tpu := accelerator.tpu:
        example = "x".join(("2", "2", "1")[: tpu.axes])
        return (
            f"{kind} takes the chips along {tpu.axes} axes, such as {kind}:{example}: even along "
            f"the first two (or 1 along all), at most {tpu.chips_per_pod} in all"
        )
    full = accelerator.devices_per_host
    rule = f"{kind} takes a number of devices, such as {kind}:{full or 8}"
    return f"{rule}: at most {full}, or full hosts of {full}" if full else rule
