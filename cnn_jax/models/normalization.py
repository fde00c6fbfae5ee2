"""Normalisation layers, and the one table of their names."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.typing import Array, FeatureMap

Norm: TypeAlias = Callable[..., Callable[..., Any]]
"""Makes the normalisation behind a convolution: `norm(train=..., dtype=..., name=...)(x)`.

Those here also take `scale_init`, the initialiser of the scale."""

GROUP_SIZE = 16
"""Channels that GroupNorm normalises together."""

ones = nn.initializers.ones


class BatchNorm(nn.Module):
    """`(x - mean) / sqrt(var + epsilon) * scale + bias`, by channel (Ioffe and Szegedy 2015).

    Mean and biased variance are those of the batch, and move the running statistics
    (arXiv:1502.03167); with `use_running_average` they are the running ones. Under `jax.jit` a
    batch that is divided among devices has the statistics of the whole. Parameters and statistics
    are float32. The variance is `E[x**2] - E[x]**2`, one pass over the memory: it loses its digits
    where |mean| is a thousand times the deviation.

    Attributes:
      use_running_average: whether to normalise by the running statistics and leave them alone.
      momentum: what stays of a running statistic, a step; torch writes 1 - this.
      epsilon: added to the variance.
      unbiased: whether the running variance is that of n - 1 values, as PyTorch keeps it, rather
        than that of n, as Flax does. The normalisation of a training batch is the same.
      scale_init: initialiser of the scale.
      dtype: of the output.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    scale_init: Callable[..., Any] = ones
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Returns x normalised; ValueError for one value a channel where `unbiased` needs two."""
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean: Any = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var: Any = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(exact, axes)
            var = jnp.maximum(jnp.mean(jnp.square(exact), axes) - jnp.square(mean), 0)
            if not self.is_initializing():
                kept_var = var * self._correction(x.size // x.shape[-1]) if self.unbiased else var
                running_mean.value = self._moved(running_mean.value, mean)
                running_var.value = self._moved(running_var.value, kept_var)

        row = (1,) * (x.ndim - 1) + (-1,)
        factor = jax.lax.rsqrt(var + self.epsilon) * scale
        y: Any = (x - mean.reshape(row)) * factor.reshape(row) + bias.reshape(row)
        return y.astype(self.dtype or y.dtype)

    @nn.nowrap
    def _moved(self, old: Array, new: Array) -> Array:
        return self.momentum * old + (1 - self.momentum) * new

    @nn.nowrap
    def _correction(self, count: int) -> float:
        if count < 2:
            raise ValueError(
                "unbiased=True: needs two values a channel or more to train on, and a batch of one "
                "image of one pixel has one"
            )
        return count / (count - 1)


def batch_norm(
    *,
    train: bool,
    dtype: Any,
    name: str,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    scale_init: Any = ones,
) -> BatchNorm:
    """Returns BatchNorm with torch's momentum (0.1 there, 0.9 here) and, by default, epsilon."""
    return BatchNorm(
        use_running_average=not train,
        epsilon=epsilon,
        unbiased=unbiased,
        scale_init=scale_init,
        dtype=dtype,
        name=name,
    )


def group_norm(
    *, train: bool, dtype: Any, name: str, scale_init: Any = ones
) -> Callable[[Any], jax.Array]:
    """Returns GroupNorm (arXiv:1803.08494), for any number of images.

    A group has 16 channels, or the largest power of two below that divides their number.
    """

    def normalize(x: Any) -> jax.Array:
        size = math.gcd(GROUP_SIZE, x.shape[-1])
        norm = nn.GroupNorm(
            num_groups=None,
            group_size=size,
            epsilon=1e-5,
            scale_init=scale_init,
            dtype=dtype,
            name=name,
        )
        return norm(x)

    return normalize


def layer_norm(*, train: bool, dtype: Any, name: str, scale_init: Any = ones) -> nn.LayerNorm:
    """Returns LayerNorm (arXiv:1607.06450) over the channels of each pixel, as ConvNeXt has it."""
    return nn.LayerNorm(epsilon=1e-6, scale_init=scale_init, dtype=dtype, name=name)


def no_norm(
    *, train: bool, dtype: Any, name: str, scale_init: Any = ones
) -> Callable[[Any], jax.Array]:
    """Returns the identity."""
    if scale_init is not ones:
        raise ValueError("norm='none': has no scale that zero_init_last could set to zero")
    return lambda x: x


NORMS: dict[str, Norm] = {
    "batch": batch_norm,
    "batch_unbiased": functools.partial(batch_norm, unbiased=True),
    "group": group_norm,
    "layer": layer_norm,
    "none": no_norm,
}
