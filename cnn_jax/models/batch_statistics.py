"""Normalising by the statistics of a batch, with a gradient that moves as few bytes as it can.

A network with BatchNorm is bound by memory: what counts is how often the activations are read and
written. JAX's own derivative of the formula leaves it to the compiler to find that a gradient needs
two sums, which one pass over activation and cotangent gives, and then one more pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnn_jax.typing import Array

Normalized = tuple[jax.Array, jax.Array, jax.Array]
Sums = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
Pool = Callable[[Any], jax.Array]
"""Max pooling: of each window of a feature map the largest value."""


def normalize(
    x: Array, scale: Array, bias: Array, epsilon: float, rectify: bool, dtype: Any
) -> Normalized:
    """Returns `(x - mean) / sqrt(var + epsilon) * scale + bias`, and mean and var, by channel.

    Mean and biased variance are those of x, computed in float32 at least; the variance is
    `E[x**2] - E[x]**2`, one pass over the memory. With `rectify`, what is negative becomes 0. The
    first of the three has the `dtype` given, the others that of the computation.

    Differentiable in reverse mode only, as the rule is one of JAX's `custom_vjp`.
    """
    found: Any = _normalize(x, scale, bias, epsilon, rectify, dtype)
    return found


def normalize_pooled(
    x: Array, pool: Pool, scale: Array, bias: Array, epsilon: float, rectify: bool, dtype: Any
) -> Normalized:
    """Returns `pool(y)`, mean and var for those that `normalize` returns.

    A maximum and a function that never falls may change places, rounding included. So it is the
    pooled x that is normalised, a quarter of the numbers behind a stride of 2, and for channels of
    negative scale the pooled -x. Gradients are the same too, but where rounding makes equals of
    different x in a window: that of a window goes to the largest x, not to the first of the equals.
    """
    sign = jnp.where(scale < 0, -1.0, 1.0)
    rising = x * _row(sign, x).astype(x.dtype)
    mean, var = _statistics(rising, _apart)
    factor = lax.rsqrt(var + epsilon) * (scale * sign)
    y = _affine(pool(rising), mean, factor, bias).astype(dtype)
    if rectify:  # barriers, as of `relu`, cost an accelerator more than they save of few numbers
        y = lax.platform_dependent(y, cpu=relu, default=jax.nn.relu)
    return y, mean * sign, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalize(
    x: Any, scale: Any, bias: Any, epsilon: float, rectify: bool, dtype: Any
) -> Normalized:
    return _forward(x, scale, bias, epsilon, rectify, dtype)[0]


# What is jitted here is inlined and so no function of a program: it is traced once for all norms of
# the same shape, which takes a third off the tracing of a ResNet-50 step.
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _forward(
    x: Any, scale: Any, bias: Any, epsilon: float, rectify: bool, dtype: Any
) -> tuple[Normalized, tuple[Any, ...]]:
    y, mean, var = _formula(x, scale, bias, epsilon, dtype, _sums)
    y = rectified(y) if rectify else y
    return (y, mean, var), (x, scale, bias, mean, var)


def _formula(x: Any, scale: Any, bias: Any, epsilon: float, dtype: Any, sums: Sums) -> Normalized:
    mean, var = _statistics(x, sums)
    return _affine(x, mean, lax.rsqrt(var + epsilon) * scale, bias).astype(dtype), mean, var


def _statistics(x: Any, sums: Sums) -> tuple[Any, Any]:
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[-1]
    mean, square = (each / count for each in sums(exact, jnp.square(exact)))
    return mean, jnp.maximum(square - jnp.square(mean), 0)


def _backward(
    epsilon: float, rectify: bool, dtype: Any, saved: tuple[Any, ...], cotangents: Normalized
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arguments = epsilon, rectify, dtype
    return lax.platform_dependent(
        saved,
        cotangents,
        tpu=functools.partial(_derived, *arguments),
        default=functools.partial(_by_rule, *arguments),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _derived(
    epsilon: float, rectify: bool, dtype: Any, saved: tuple[Any, ...], cotangents: Normalized
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """JAX's own, which the compiler for TPUs fuses well: the forward pass stands there once."""

    def formula(x: Any, scale: Any, bias: Any) -> Normalized:
        y, mean, var = _formula(x, scale, bias, epsilon, dtype, _apart)
        return jax.nn.relu(y) if rectify else y, mean, var

    found: Any = jax.vjp(formula, *saved[:3])[1](cotangents)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _by_rule(
    epsilon: float, rectify: bool, dtype: Any, saved: tuple[Any, ...], cotangents: Normalized
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias, mean, var = saved
    y_bar, mean_bar, var_bar = cotangents
    count = x.size // x.shape[-1]
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale

    def of_affine(x: Any, y_bar: Any) -> Any:
        """Returns the cotangent of `_affine`, which passed where it was positive."""
        if rectify:
            positive = _affine(x, mean, factor, bias).astype(dtype) > 0
            y_bar = jnp.where(positive, y_bar, jnp.zeros_like(y_bar))
        return y_bar.astype(mean.dtype)

    affine_bar = of_affine(x, y_bar)
    bias_bar, scale_bar = _sums(affine_bar, affine_bar * _centred(x, mean))
    x, y_bar, bias_bar, scale_bar = anew(x, y_bar, bias_bar, scale_bar)
    along = (2 * var_bar - factor * jnp.square(inverse) * scale_bar) / count
    level = (mean_bar - factor * bias_bar) / count
    x_bar = (
        _row(factor, x) * of_affine(x, y_bar) + _row(along, x) * _centred(x, mean) + _row(level, x)
    )
    return (
        x_bar.astype(x.dtype),
        (scale_bar * inverse).astype(scale.dtype),
        bias_bar.astype(bias.dtype),
    )


_normalize.defvjp(_forward, _backward)


def _row(by_channel: Any, x: Any) -> Any:
    return by_channel.reshape((1,) * (x.ndim - 1) + (-1,))


def _centred(x: Any, mean: Any) -> Any:
    return x.astype(mean.dtype) - _row(mean, x)


def _affine(x: Any, mean: Any, factor: Any, bias: Any) -> Any:
    return _centred(x, mean) * _row(factor, x) + _row(bias, x)


def _sums(a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of both by channel.

    For a GPU one reduction takes both over the pixels of each image, and one over the images: XLA
    keeps apart what it could fuse into the first, and launches a kernel for each of the second.
    """
    return lax.platform_dependent(a, b, cuda=_together, default=_apart)


# Branches have names of their own because JAX keeps the trace of a function that it has seen.
def _together(a: Any, b: Any) -> Any:
    zero = jnp.zeros((), a.dtype)
    for axes in (tuple(range(1, a.ndim - 1)), (0,)):
        a, b = lax.reduce((a, b), (zero, zero), _add_each, axes)
    return a, b


def _apart(a: Any, b: Any) -> Any:
    but_channels = tuple(range(a.ndim - 1))
    return jnp.sum(a, but_channels), jnp.sum(b, but_channels)


def _add_each(a: Any, b: Any) -> Any:
    return a[0] + b[0], a[1] + b[1]


def anew(*arrays: Array) -> tuple[Any, ...]:
    """Returns the arrays; a compiler for a GPU makes what comes of them again, not keeping it."""
    return lax.platform_dependent(*arrays, cuda=_barrier, default=_unchanged)


def _barrier(*arrays: Any) -> Any:
    return lax.optimization_barrier(arrays)


def _unchanged(*arrays: Any) -> Any:
    return arrays


def rectified(x: Array) -> Any:
    """Returns `max(x, 0)`, which a compiler for the CPU keeps.

    What has one large operand XLA makes there again wherever it is read: the whole normalisation,
    in the strided loops that reorder a feature map for the gradient of a kernel. A choice between
    two arrays it does not.
    """
    return lax.platform_dependent(x, cpu=_chosen, default=_larger)


def _chosen(x: Any) -> Any:
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _larger(x: Any) -> Any:
    return jnp.maximum(x, 0)


@jax.custom_vjp
def relu(x: Array) -> jax.Array:
    """Returns `max(x, 0)`; its gradient, 0 at 0, reads the output that the next layer needs too.

    `nn.relu`'s reads the input, which a compiler then keeps, or makes again from all that it was
    the sum of. One for a TPU keeps the input too, where a stride reads the output, unless a barrier
    has it made once.
    """
    return rectified(x)


def _relu_forward(x: Array) -> tuple[jax.Array, jax.Array]:
    (y,) = lax.platform_dependent(rectified(x), tpu=_barrier, default=_unchanged)
    return y, y


def _relu_backward(y: jax.Array, y_bar: jax.Array) -> tuple[jax.Array]:
    y, y_bar = anew(y, y_bar)
    return (jnp.where(y > 0, y_bar, jnp.zeros_like(y_bar)),)


relu.defvjp(_relu_forward, _relu_backward)
