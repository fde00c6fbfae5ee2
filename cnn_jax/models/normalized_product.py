"""BatchNorm of a 1x1 convolution that widens, from statistics of its narrow input.

The output x W of a 1x1 convolution has the mean `W^T E[x]` and the variance `diag(W^T Cov(x) W)`.
So what BatchNorm needs to know of it is in the covariance of x, a small matrix, and is known before
the convolution, which then takes the normalisation into its kernel and a bias. The wide output need
not be written, read for its statistics and read again. The backward pass does not need it either:
the sum of `y_bar (x W)` is in the gradient of the kernel, and what comes back through mean and
variance is a product with x.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cnn_jax.models.batch_statistics import Normalized, anew, normalize
from cnn_jax.models.convolution import convolve_pixels
from cnn_jax.typing import Array

WIDENING = 2
"""Output channels over input channels, from which on the matrix is cheaper than the passes."""

MOST_CHANNELS = 512
"""Of the input: of more, the matrix and what is done with it cost more than is saved."""

MOST_CHANNELS_ON_CPU = 128
"""Of the input, on a CPU: it does 6 operations in the time of a byte, an accelerator hundreds."""


def pays(shape: Sequence[int], features: int) -> bool:
    """Returns whether `normalize_product` is cheaper for x of this shape and so many features."""
    *pixels, channels = shape
    return WIDENING * channels <= features <= math.prod(pixels) and channels <= MOST_CHANNELS


def normalize_product(
    x: Array, kernel: Array, scale: Array, bias: Array, epsilon: float, dtype: Any
) -> Normalized:
    """Returns `normalize(x W, scale, bias, epsilon, rectify=False, dtype)` without making x W.

    The same numbers but for rounding, of x [b, h, w, c] and the kernel W [c, f], differentiable in
    reverse mode. Convolution and level have the dtype given, so in bfloat16 y and the cotangent of
    x are off by that dtype's precision of the means that cancel in them, `E[x] W` over the
    deviation of x W and `E[y_bar]`: the same at all pixels, as of parameters in bfloat16. A CPU
    makes x W where c is above `MOST_CHANNELS_ON_CPU`.
    """
    arguments = {"epsilon": epsilon, "dtype": dtype}
    of_statistics = functools.partial(_of_statistics, **arguments)
    if x.shape[-1] <= MOST_CHANNELS_ON_CPU:
        return of_statistics(x, kernel, scale, bias)
    of_output = functools.partial(_of_output, **arguments)
    return lax.platform_dependent(x, kernel, scale, bias, cpu=of_output, default=of_statistics)


def _of_output(
    x: Any, kernel: Any, scale: Any, bias: Any, *, epsilon: float, dtype: Any
) -> Normalized:
    return normalize(_product(x.astype(dtype), kernel), scale, bias, epsilon, False, dtype)


def _of_statistics(
    x: Any, kernel: Any, scale: Any, bias: Any, *, epsilon: float, dtype: Any
) -> Normalized:
    exact = jnp.promote_types(dtype, jnp.float32)
    parameters = (each.astype(exact) for each in (kernel, scale, bias))
    found: Any = _by_covariance(x.astype(dtype), *parameters, epsilon)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_covariance(x: Any, kernel: Any, scale: Any, bias: Any, epsilon: float) -> Normalized:
    return _forward(x, kernel, scale, bias, epsilon)[0]


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _forward(
    x: Any, kernel: Any, scale: Any, bias: Any, epsilon: float
) -> tuple[Normalized, tuple[Any, ...]]:
    (x,) = anew(x)
    count = x.size // x.shape[-1]
    x_mean, squares = (each / count for each in _sums(x, x, kernel.dtype))
    mean = _dot(x_mean, kernel)
    covariance = _dot(squares, kernel) - jnp.outer(x_mean, mean)  # of x and x W
    var = jnp.maximum(jnp.sum(kernel * covariance, 0), 0)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale
    y = _raised(_product(x, kernel * factor[None]), bias - mean * factor)
    return (y, mean, var), (x, kernel, scale, x_mean, mean, covariance, inverse)


def _backward(
    epsilon: float, saved: tuple[Any, ...], cotangents: Normalized
) -> tuple[jax.Array, ...]:
    return _by_rule(saved, cotangents)


@functools.partial(jax.jit, inline=True)
def _by_rule(saved: tuple[Any, ...], cotangents: Normalized) -> tuple[jax.Array, ...]:
    x, kernel, scale, x_mean, mean, covariance, inverse = saved
    y_bar, mean_bar, var_bar = cotangents
    count = x.size // x.shape[-1]
    factor = inverse * scale
    bias_bar, products = _sums(x, y_bar, kernel.dtype)
    products = products - jnp.outer(x_mean, bias_bar)  # of x - E[x] and y_bar
    centred = jnp.sum(kernel * products, 0)  # sum of y_bar (x W - mean)
    # The cotangent of x W is `factor y_bar + along x W + level`.
    along = (2 * var_bar - factor * jnp.square(inverse) * centred) / count
    level = (mean_bar - factor * bias_bar) / count - along * mean
    kernel_bar = factor[None] * products + (count * along)[None] * covariance
    kernel_bar = kernel_bar + jnp.outer(x_mean, mean_bar)
    x_bar = _product(y_bar, (kernel * factor[None]).T)
    x_bar = x_bar + _product(x, _dot(kernel * along[None], kernel.T))
    x_bar = _raised(x_bar, _dot(level, kernel.T))
    return x_bar, kernel_bar, centred * inverse, bias_bar


_by_covariance.defvjp(_forward, _backward)


def _sums(a: Any, b: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the sums over pixels of b and of `a b^T`, whole on every device."""
    pixels = tuple(range(a.ndim - 1))
    squares = lax.dot_general(
        a,
        b,
        ((pixels, pixels), ((), ())),
        preferred_element_type=dtype,
        out_sharding=NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec()),
    )
    return jnp.sum(b.astype(dtype), pixels), squares


def _product(x: Any, kernel: Any) -> Any:
    return convolve_pixels(x, kernel.astype(x.dtype))


def _raised(x: Any, level: Any) -> Any:
    """Returns their sum, in the dtype of x, as what convolves takes it for a bias then."""
    return x + level.astype(x.dtype).reshape(1, 1, 1, -1)


def _dot(a: Any, b: Any) -> Any:
    """Returns the product of small arrays as exactly as their type is, on a GPU or TPU too."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)
