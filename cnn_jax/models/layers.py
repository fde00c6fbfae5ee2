"""Layers that the blocks are made of."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.typing import FeatureMap

ModuleFactory: TypeAlias = Callable[..., Any]
"""Makes a linen module from keyword arguments: a class, or a partial over one."""

Size: TypeAlias = int | Sequence[int]
"""An extent in pixels: one number for both axes, or (height, width)."""

kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He et al. 2015 (arXiv:1502.01852) with fan-out, as torchvision initialises its ResNets."""

torch_linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of `torch.nn.Linear`'s weight."""


Activation: TypeAlias = Callable[[Any], jax.Array]
"""A function of each number, such as `nn.relu`."""

Norm: TypeAlias = Callable[..., Callable[[Any], jax.Array]]
"""Makes the normalisation behind a convolution: `norm(train=..., dtype=..., name=...)(x)`."""


GROUP_SIZE = 16
"""Channels that GroupNorm normalises together."""


def batch_norm(*, train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    """Returns BatchNorm (arXiv:1502.03167) with torch's epsilon and momentum.

    torch writes the weight of the new statistic (0.1), flax that of the old one (0.9). The running
    variance is the biased one, flax's convention; torch keeps the unbiased one. Parameters and
    statistics are float32 whatever `dtype` is.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


def group_norm(*, train: bool, dtype: Any, name: str) -> nn.GroupNorm:
    """Returns GroupNorm (arXiv:1803.08494), 16 channels a group, for any number of images."""
    return nn.GroupNorm(
        num_groups=None, group_size=GROUP_SIZE, epsilon=1e-5, dtype=dtype, name=name
    )


def no_norm(*, train: bool, dtype: Any, name: str) -> Callable[[Any], jax.Array]:
    """Returns the identity."""
    return lambda x: x


NORMS: dict[str, Norm] = {"batch": batch_norm, "group": group_norm, "none": no_norm}


def pair(size: Size) -> tuple[int, int]:
    """Returns (height, width) from one number for both, or from the two."""
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2:
        raise ValueError(f"{size!r}: must be one number of pixels or (height, width)")
    return sizes


def symmetric(padding: Size) -> list[tuple[int, int]]:
    """Returns `padding` pixels on both sides of each axis, as torch pads.

    Flax's "SAME" pads a strided convolution by (0, 1) where torch pads (1, 1): same shapes, other
    numbers.
    """
    height, width = pair(padding)
    return [(height, height), (width, width)]


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation: `act(norm(W * x + b))`.

    Attributes:
      features: output channels.
      kernel_size: pixels, one number or (height, width).
      strides: pixels between two outputs.
      padding: pixels of zeros on each side.
      use_bias: whether the convolution adds `b`. A norm that subtracts a mean makes it redundant;
        the reference has it all the same.
      conv, norm, act: what to build the block from; `act=None` leaves the activation out.
      dtype: of the computation; parameters and statistics stay float32.
    """

    features: int
    kernel_size: Size = 3
    strides: Size = 1
    padding: Size = 1
    use_bias: bool = True
    conv: ModuleFactory = functools.partial(nn.Conv, kernel_init=kaiming_normal_fan_out)
    norm: Norm = batch_norm
    act: Activation | None = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, floor((h - K + 2P) / S) + 1, the same of w, features]."""
        x = self.conv(
            self.features,
            kernel_size=pair(self.kernel_size),
            strides=pair(self.strides),
            padding=symmetric(self.padding),
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        if 0 in x.shape:
            raise ValueError(
                f"features={self.features}, kernel_size={self.kernel_size}, "
                f"padding={self.padding}: must leave an output of at least one pixel and channel"
            )
        x = self.norm(train=train, dtype=self.dtype, name="norm")(x)
        return x if self.act is None else self.act(x)


def max_pool(x: FeatureMap, *, window: Size, strides: Size, padding: Size = 0) -> FeatureMap:
    """Returns the largest value of each window; padding counts as minus infinity."""
    sides: Any = symmetric(padding)  # flax's annotation knows "SAME" and "VALID" only
    return nn.max_pool(x, pair(window), strides=pair(strides), padding=sides)


def global_average_pool(x: FeatureMap) -> jax.Array:
    """Returns the mean over height and width, [b, c]; summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
