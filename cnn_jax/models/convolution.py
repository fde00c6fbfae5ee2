"""The convolution of every layer: XLA's own, but for one that XLA is slow at on the CPU."""

import functools
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
    so are its gradients; it can be differentiated in reverse mode only. The programs of other
    platforms are the same as without this.
    """

    def convolution(x: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **arguments)

    def product(x: Any, kernel: Any) -> jax.Array:
        pixels = x[:, :: strides[0], :: strides[1], :]
        return _product(arguments.get("precision"), pixels, kernel[0, 0])

    if not _is_pointwise(kernel, padding, **arguments):
        return convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=product, default=convolution)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(precision: Any, x: Any, kernel: Any) -> jax.Array:
    """Returns `x W`, pixel by pixel."""
    return lax.dot_general(x, kernel, _over((3,), (0,)), precision=precision)


def _product_forward(precision: Any, x: Any, kernel: Any) -> tuple[jax.Array, Any]:
    return _product(precision, x, kernel), (x, kernel)


def _product_backward(precision: Any, saved: Any, dy: Any) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = lax.dot_general(dy, kernel, _over((3,), (1,)), precision=precision)
    return dx, _sum_of_products(precision, x, dy)


def _sum_of_products(precision: Any, x: Any, dy: Any) -> jax.Array:
    """Returns the gradient of the kernel, `sum over pixels of x dy^T`.

    XLA moves all of the first factor into another order before it multiplies, so that is the one
    with fewer channels; JAX's own rule has it be dy, often four times as wide as x. The barriers
    keep the new order out of the computation of the factor, and of the choice of the first.
    """
    x, dy = (pixels.reshape(-1, pixels.shape[-1]) for pixels in (x, dy))
    narrow, wide = (x, dy) if x.shape[1] <= dy.shape[1] else (dy, x)
    product = lax.dot_general(
        lax.optimization_barrier(narrow), wide, _over((0,), (0,)), precision=precision
    )
    return product if narrow is x else lax.optimization_barrier(product).T


_product.defvjp(_product_forward, _product_backward)


def _over(left: tuple[int, ...], right: tuple[int, ...]) -> lax.DotDimensionNumbers:
    return ((left, right), ((), ()))


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
