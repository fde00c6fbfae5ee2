"""The layer that blocks are made of."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import flax.linen as nn
import jax

from cnn_jax.models.batch_statistics import Pool, relu
from cnn_jax.models.initialization import KAIMING, Convolution
from cnn_jax.models.normalization import BatchNorm, Norm, batch_norm
from cnn_jax.models.normalized_product import pays
from cnn_jax.typing import FeatureMap

ModuleFactory: TypeAlias = Callable[..., Any]
"""Makes a linen module from keyword arguments: a class, or a function that makes one."""

Size: TypeAlias = int | Sequence[int]
"""An extent in pixels: one number for both axes, or (height, width)."""

Activation: TypeAlias = Callable[[Any], jax.Array]
"""A function of each number, such as `relu`."""


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


def in_mode(act: Activation, *, train: bool) -> Activation:
    """Returns the activation, but outside of training `nn.relu` for `relu`.

    The derivative of `relu` moves fewer bytes and is of reverse mode only; that of a network that
    evaluates is of both.
    """
    return nn.relu if act is relu and not train else act


def at_least(least: int, **arguments: Any) -> None:
    """Raises ValueError for an argument, an integer or a sequence of them, below `least`."""
    for name, value in arguments.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(number, Integral) for number in numbers):
            raise ValueError(f"{name}={value!r}: must be an integer >= {least}")
        if min(numbers, default=least) < least:
            raise ValueError(f"{name}={value}: must be >= {least}")


class ConvBlock(nn.Module):
    """Convolution, normalisation, activation: `act(norm(W * x + b))`, and max pooling if asked.

    Attributes:
      features: output channels.
      kernel_size: pixels, one number or (height, width).
      strides: pixels between two outputs.
      padding: pixels of zeros on each side.
      use_bias: whether the convolution adds `b`. A norm that subtracts a mean makes it redundant;
        the reference has it all the same.
      groups: shares of the channels that are convolved apart.
      conv, norm, act: what to build the block from; `act=None` leaves the activation out.
      dtype: of the computation; parameters and statistics stay float32.
      max_pool: a max pooling of what is made, such as `pooling.max_pool` with a window and strides
        by `functools.partial`. It has to be by the maximum: a BatchNorm that trains pools first, as
        that gives the same values, and so has fewer numbers to normalise.
    """

    features: int
    kernel_size: Size = 3
    strides: Size = 1
    padding: Size = 1
    use_bias: bool = True
    groups: int = 1
    conv: ModuleFactory = KAIMING.conv
    norm: Norm = batch_norm
    act: Activation | None = relu
    dtype: Any = None
    max_pool: Pool | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, floor((h - K + 2P) / S) + 1, the same of w, features], or that pooled."""
        at_least(1, features=self.features, kernel_size=self.kernel_size, strides=self.strides)
        at_least(0, padding=self.padding)
        at_least(1, groups=self.groups)
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups}: must divide the {x.shape[-1]} channels of the input and "
                f"features={self.features}"
            )
        grouped = {"feature_group_count": self.groups} if self.groups > 1 else {}
        conv = self.conv(
            self.features,
            kernel_size=pair(self.kernel_size),
            strides=pair(self.strides),
            padding=symmetric(self.padding),
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
            **grouped,
        )
        norm = self.norm(train=train, dtype=self.dtype, name="norm")
        rectify = self.act is relu and isinstance(norm, BatchNorm)
        arguments: dict[str, Any] = {"rectify": True} if rectify else {}
        pixels = self._pixels_of_product(x, conv, norm)
        if pixels is None:
            x = conv(x)
        else:
            x, arguments["kernel"] = pixels, conv.make_kernel(x)[0, 0]
        if 0 in x.shape[1:3]:
            raise ValueError(
                f"kernel_size={self.kernel_size}, padding={self.padding}: must leave an output of "
                "at least one pixel"
            )
        pool = self.max_pool
        act = None if rectify or self.act is None else in_mode(self.act, train=train)
        if pool is not None and act is None and type(norm) is BatchNorm and norm.is_of_batch:
            arguments["pool"], pool = pool, None
        x = norm(x, **arguments)
        for follow in (act, pool):
            x = x if follow is None else follow(x)
        return x

    @nn.nowrap
    def _pixels_of_product(self, x: FeatureMap, conv: Any, norm: Any) -> FeatureMap | None:
        """Returns the pixels that the norm had better take than what is convolved, or None."""
        if not (isinstance(conv, Convolution) and conv.is_pointwise and x.ndim == 4):
            return None
        if not (type(norm) is BatchNorm and norm.is_of_batch):
            return None
        down, across = conv.arguments["strides"]
        pixels = x[:, ::down, ::across]
        return pixels if pays(pixels.shape, self.features) else None
