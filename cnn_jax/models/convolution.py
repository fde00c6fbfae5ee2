"""The convolution of every layer: XLA's own, but for those that it is slow at on a platform."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from cnn_jax.typing import Array

CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(
    x: Any, kernel: Any, strides: Sequence[int], padding: Any, **arguments: Any
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments.

    On the CPU a 1x1 convolution is written as the matrix product `x[:, ::s, ::s] W` that it is, and
    so are its gradients; the gradient by the image of a larger one with strides, but for the stem
    of a network, is taken `by_phases`. On a GPU that stem, a strided convolution of few channels,
    takes the pixels of a stride as channels (`by_blocks`), because cuDNN fills them up with zeros
    for each tap of the kernel. The programs of other platforms are the same as without this.
    """

    def convolution(x: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **arguments)

    def product(x: Any, kernel: Any) -> jax.Array:
        pixels = lax.slice(x, (0,) * 4, x.shape, (1, *strides, 1))
        # In one axis: of more, XLA would reorder the whole cotangent for the kernel's gradient.
        rows = pixels.reshape(-1, pixels.shape[3])
        outputs = lax.dot(rows, kernel[0, 0], precision=arguments.get("precision"))
        return outputs.reshape(*pixels.shape[:3], kernel.shape[3])

    def of_blocks(x: Any, kernel: Any) -> jax.Array:
        x, kernel, sides = by_blocks(x, kernel, strides, padding)
        return lax.conv_general_dilated(x, kernel, (1, 1), sides, **arguments)

    def of_phases(x: Any, kernel: Any) -> jax.Array:
        first, *others = (
            lax.conv_general_dilated(*each, **arguments)
            for each in by_phases(x, kernel, strides, padding)
        )
        return sum(others, first)

    def along_images(x: Any, kernel: Any) -> jax.Array:
        return lax.platform_dependent(x, kernel, cpu=of_phases, default=convolution)

    if not _is_plain(padding, **arguments):
        return convolution(x, kernel)
    if _is_pointwise(kernel, padding):
        return lax.platform_dependent(x, kernel, cpu=product, default=convolution)
    if _is_stem(x, kernel, strides, **arguments):
        return lax.platform_dependent(x, kernel, cuda=of_blocks, default=convolution)
    if _is_strided(kernel, strides, **arguments):
        return _with_derivative(convolution, along_images)(x, kernel)
    return convolution(x, kernel)


def convolve_pixels(x: Any, kernel: Any) -> jax.Array:
    """Returns the 1x1 convolution of x [b, h, w, c] and the kernel [c, f]: `x W` at each pixel."""
    arguments = {"dimension_numbers": CHANNELS_LAST}
    return convolve(x, kernel[None, None], (1, 1), [(0, 0), (0, 0)], **arguments)


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


def _is_strided(
    kernel: Array, strides: Sequence[int], *, rhs_dilation: Sequence[int] = (1, 1), **_: Any
) -> bool:
    """Returns whether the kernel takes part in pixels of every phase of the strides."""
    steps = all(1 < stride <= taps for stride, taps in zip(strides, kernel.shape[:2], strict=True))
    return steps and tuple(rhs_dilation) == (1, 1)


def _with_derivative(
    convolution: Callable[..., jax.Array], along_images: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Returns the convolution, which is linear along images as `along_images` writes it.

    JAX transposes that for the gradient by the image.
    """
    convolution = jax.custom_jvp(convolution)

    @functools.partial(convolution.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
        (x, kernel), (x_dot, kernel_dot) = primals, tangents
        parts = []
        if not isinstance(x_dot, SymbolicZero):
            parts.append(along_images(x_dot, kernel))
        if not isinstance(kernel_dot, SymbolicZero):
            parts.append(convolution(x, kernel_dot))
        return convolution(x, kernel), functools.reduce(jnp.add, parts)

    return convolution


Windows: TypeAlias = tuple[Any, Any, tuple[int, int], list[tuple[int, int]]]
"""An image, a kernel, strides and padding."""


def by_phases(x: Any, kernel: Any, strides: Sequence[int], padding: Any) -> list[Windows]:
    """Returns convolutions without strides whose sum is the one with `strides`.

    Each has the pixels of one phase, the remainder of row and column after division by the strides,
    and the taps that meet them. So a gradient by the image is made of pixels as they lie, and not
    of an image with zeros between them.
    """
    (images, *sizes, channels), (down, across) = x.shape, strides
    rows, columns = (
        [_of_phase(phase, *axis) for phase in range(axis[1])]
        for axis in zip(sizes, strides, kernel.shape[:2], padding, strict=True)
    )
    blocks = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    filled = [(0, n * s - size, 0) for n, s, size in zip(blocks, strides, sizes, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *filled, (0, 0, 0)])
    x = x.reshape(images, blocks[0], down, blocks[1], across, channels)
    x = x.transpose(2, 4, 0, 1, 3, 5).reshape(down * across, images, *blocks, channels)
    phases = lax.split(x, [1] * (down * across))  # in one piece when it is transposed
    return [
        (pixels[0], kernel[taps_down, taps_across], (1, 1), [above, beside])
        for pixels, ((taps_down, above), (taps_across, beside)) in zip(
            phases, itertools.product(rows, columns), strict=True
        )
    ]


def _of_phase(
    phase: int, size: int, stride: int, taps: int, padding: tuple[int, int]
) -> tuple[slice, tuple[int, int]]:
    """Returns the taps along an axis that meet the pixels of a phase, and the padding of these."""
    before, after = padding
    outputs = (before + size + after - taps) // stride + 1
    skipped, first = divmod(phase + before, stride)
    met = slice(first, taps, stride)
    pixels = -(-size // stride)
    return met, (skipped, outputs - 1 + len(range(taps)[met]) - pixels - skipped)


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
