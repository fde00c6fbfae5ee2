"""The convolution of every layer: XLA's own, but for those that it is slow at on a platform."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn_jax.typing import Array

CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(
    x: Any, kernel: Any, strides: Sequence[int], padding: Any, **arguments: Any
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments.

    On the CPU a 1x1 convolution is written as the matrix product `x[:, ::s, ::s] W` that it is, and
    so are its gradients. On a GPU a strided convolution of few channels, the stem of a network,
    takes the pixels of a stride as channels (`by_blocks`), because cuDNN fills them up with zeros
    for each tap of the kernel. The programs of other platforms are the same as without this.
    """

    def convolution(x: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **arguments)

    def product(x: Any, kernel: Any) -> jax.Array:
        pixels = x[:, :: strides[0], :: strides[1], :]
        # In one axis: of more, XLA would reorder the whole cotangent for the kernel's gradient.
        rows = pixels.reshape(-1, pixels.shape[3])
        outputs = lax.dot(rows, kernel[0, 0], precision=arguments.get("precision"))
        return outputs.reshape(*pixels.shape[:3], kernel.shape[3])

    def of_blocks(x: Any, kernel: Any) -> jax.Array:
        x, kernel, sides = by_blocks(x, kernel, strides, padding)
        return lax.conv_general_dilated(x, kernel, (1, 1), sides, **arguments)

    if not _is_plain(padding, **arguments):
        return convolution(x, kernel)
    if _is_pointwise(kernel, padding):
        return lax.platform_dependent(x, kernel, cpu=product, default=convolution)
    if _is_stem(x, kernel, strides, **arguments):
        return lax.platform_dependent(x, kernel, cuda=of_blocks, default=convolution)
    return convolution(x, kernel)


def _is_plain(
    padding: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    lhs_dilation: Sequence[int] = (1, 1),
    **_: Any,
) -> bool:
    """Returns whether it is of images as they are, all channels together, with counted padding."""
    return (
        dimension_numbers == CHANNELS_LAST
        and feature_group_count == 1
        and tuple(lhs_dilation) == (1, 1)
        and not isinstance(padding, str)
    )


def _is_pointwise(kernel: Array, padding: Any) -> bool:
    """Returns whether a pixel of the output is made of one pixel of the input."""
    return kernel.shape[:2] == (1, 1) and all(tuple(sides) == (0, 0) for sides in padding)


CHANNELS_OF_A_TILE = 16
"""Channels of bfloat16 that a GPU's matrix units take at a time."""


def _is_stem(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    *,
    rhs_dilation: Sequence[int] = (1, 1),
    **_: Any,
) -> bool:
    """Returns whether the pixels that a stride steps over have few channels together."""
    pixels = math.prod(strides)
    return (
        pixels > 1
        and pixels * kernel.shape[2] <= CHANNELS_OF_A_TILE
        and not any(size % stride for size, stride in zip(x.shape[1:3], strides, strict=True))
        and tuple(rhs_dilation) == (1, 1)
    )


def by_blocks(
    x: Any, kernel: Any, strides: Sequence[int], padding: Any
) -> tuple[jax.Array, jax.Array, list[tuple[int, int]]]:
    """Returns the image and the kernel with the pixels of a stride as channels, and the padding.

    The convolution of these, with stride 1, has the same outputs: a kernel of 7 x 7 over 3 channels
    with stride 2 becomes one of 4 x 4 over 12, filled up with zeros to 16. ("Space to depth", as in
    the MLPerf submissions for TPUs.)
    """
    sides, margins = [], []
    for size, taps, stride, (before, after) in zip(
        x.shape[1:3], kernel.shape[:2], strides, padding, strict=True
    ):
        outputs = (before + size + after - taps) // stride + 1
        blocks = -(-before // stride)
        first = blocks * stride - before
        taken = -(-(first + taps) // stride)
        margins.append((first, taken * stride - first - taps, 0))
        sides.append((blocks, outputs - 1 + taken - size // stride - blocks))
    zero = jnp.zeros((), kernel.dtype)
    kernel = lax.pad(kernel, zero, [*margins, (0, 0, 0), (0, 0, 0)])
    kernel = _pixels_as_channels(kernel[None], strides)[0]
    return _pixels_as_channels(x[..., None], strides)[..., 0], kernel, sides


def _pixels_as_channels(x: Any, strides: Sequence[int]) -> jax.Array:
    """Returns [n h/s w/s s*s*c f] of [n h w c f], with channels up to the size of a tile."""
    (images, height, width, channels, features), (down, across) = x.shape, strides
    x = x.reshape(images, height // down, down, width // across, across, channels, features)
    x = x.transpose(0, 1, 3, 2, 4, 5, 6)
    x = x.reshape(*x.shape[:3], down * across * channels, features)
    missing = CHANNELS_OF_A_TILE - x.shape[3]
    around = [(0, 0, 0)] * 3 + [(0, missing, 0), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), around)
