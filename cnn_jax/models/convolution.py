"""The convolution of every layer: XLA's own, but for one that XLA is slow at on the CPU."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from cnn_jax.typing import Array

CHANNELS_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(
    x: Any, kernel: Any, strides: Sequence[int], padding: Any, **arguments: Any
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of the same arguments.

    On the CPU a 1x1 convolution is written as the matrix product `x[:, ::s, ::s] W` that it is, and
    so are its gradients. The programs of other platforms are the same as without this.
    """

    def convolution(x: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **arguments)

    def product(x: Any, kernel: Any) -> jax.Array:
        pixels = x[:, :: strides[0], :: strides[1], :]
        by_channel = (((3,), (0,)), ((), ()))
        return lax.dot_general(
            pixels, kernel[0, 0], by_channel, precision=arguments.get("precision")
        )

    if not _is_pointwise(kernel, padding, **arguments):
        return convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=product, default=convolution)


def _is_pointwise(
    kernel: Array,
    padding: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    lhs_dilation: Sequence[int] = (1, 1),
    **_: Any,
) -> bool:
    """Returns whether a pixel of the output is made of one pixel of the input, all channels."""
    return (
        dimension_numbers == CHANNELS_LAST
        and kernel.shape[:2] == (1, 1)
        and feature_group_count == 1
        and tuple(lhs_dilation) == (1, 1)
        and all(tuple(sides) == (0, 0) for sides in padding)
    )
