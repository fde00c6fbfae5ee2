"""Normalisation layers, and the one table of their names."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.batch_statistics import Pool, normalize, normalize_pooled, relu
from cnn_jax.models.convolution import convolve_pixels
from cnn_jax.models.normalized_product import normalize_product
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
    where `|mean|` is a thousand times the deviation.

    With `group_size`, every so many images in a row are normalised by their own statistics. Groups
    that lie on one device each need no communication: a group is an axis of the array, divided as
    the batch was. What moves a running statistic is that of all groups together; that would need
    communication, so running statistics may have a row for each device (`[rows, channels]`, as
    `spread_statistics` makes them), moved by the groups in its share of the batch. Evaluation
    pools the rows.

    Attributes:
      use_running_average: whether to normalise by the running statistics and leave them alone.
      momentum: what stays of a running statistic, a step; torch writes 1 - this.
      epsilon: added to the variance.
      unbiased: whether the running variance is that of n - 1 values, as PyTorch keeps it, rather
        than that of n, as Flax does. The normalisation of a training batch is the same.
      group_size: images that share statistics while training; None: the whole batch.
      scale_init: initialiser of the scale.
      dtype: of the output.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    group_size: int | None = None
    scale_init: Callable[..., Any] = ones
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: FeatureMap,
        *,
        rectify: bool = False,
        kernel: Array | None = None,
        pool: Pool | None = None,
    ) -> FeatureMap:
        """Returns x normalised, through a ReLU if `rectify`, whose gradient is then cheaper.

        With a `kernel` [c, f] it is x W that is normalised; where `is_of_batch`, without being
        made, see `normalize_product`. With a `pool` it is pooled at last, where `is_of_batch`
        before it is normalised, see `normalize_pooled`.

        Raises ValueError for an empty batch in training, for one value a channel where `unbiased`
        needs two, for a `group_size` that does not divide the batch, and for groups that do not
        divide into the rows.
        """
        shape = x.shape[-1:] if kernel is None else kernel.shape[1:]
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean: Any = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var: Any = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        dtype = self.dtype or jnp.promote_types(x.dtype, jnp.float32)
        if kernel is not None and not self.is_of_batch:  # it is frozen
            x, kernel = convolve_pixels(x.astype(dtype), kernel.astype(dtype)), None
        if not self.use_running_average:
            if 0 in x.shape:
                raise ValueError(f"a batch of shape {x.shape} has no statistics to train on")

            def normalized(x: Any) -> Any:
                return normalize(x, scale, bias, self.epsilon, rectify, dtype)

            if kernel is not None:
                y, mean, var = normalize_product(x, kernel, scale, bias, self.epsilon, dtype)
                y = relu(y) if rectify else y
            elif pool is not None and self.is_of_batch:
                y, mean, var = normalize_pooled(x, pool, scale, bias, self.epsilon, rectify, dtype)
                pool = None
            elif self.is_of_batch:
                y, mean, var = normalized(x)
            else:
                y, mean, var = jax.vmap(normalized)(self._groups(x))
                y = y.reshape(x.shape)
            if not self.is_initializing():
                mean, var = self._by_row(mean, var, running_mean.value.shape)
                kept_var = var
                if self.unbiased:
                    count = math.prod(x.shape[:-1]) * mean.shape[-1] // mean.size
                    kept_var = var * self._correction(count)
                running_mean.value = self._moved(running_mean.value, mean)
                running_var.value = self._moved(running_var.value, kept_var)
        else:
            mean, var = running_mean.value, running_var.value
            if mean.ndim > 1:
                mean, var = pooled(mean, var)
            row = (1,) * (x.ndim - 1) + (-1,)
            factor = jax.lax.rsqrt(var + self.epsilon) * scale
            y = ((x - mean.reshape(row)) * factor.reshape(row) + bias.reshape(row)).astype(dtype)
            y = nn.relu(y) if rectify else y
        return y if pool is None else pool(y)

    @property
    def is_of_batch(self) -> bool:
        """Whether it normalises by the statistics of the whole batch."""
        return not self.use_running_average and self.group_size is None

    @nn.nowrap
    def _groups(self, x: Any) -> Any:
        """Returns [groups, images of a group, h, w, c]."""
        size = self.group_size or 0
        if size < 1 or x.shape[0] % size:
            raise ValueError(
                f"group_size={self.group_size}: must divide the {x.shape[0]} images of a batch"
            )
        return x.reshape(-1, size, *x.shape[1:])

    @nn.nowrap
    def _by_row(self, mean: Any, var: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Returns the statistics of the groups in each row of running statistics of `shape`."""
        if mean.shape == shape:
            return mean, var
        rows, count = math.prod(shape[:-1]), mean.size // mean.shape[-1]
        if count % rows:
            raise ValueError(
                f"group_size={self.group_size}: makes {count} groups of a batch, which must divide "
                f"into the {rows} rows of running statistics, one for each device"
            )
        apart = (*shape[:-1], -1, shape[-1])
        return pooled(mean.reshape(apart), var.reshape(apart))

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


def pooled(mean: Any, var: Any) -> tuple[Any, Any]:
    """Returns the statistics of groups of equal size as one, from those along axis -2.

    The variance is by way of the second moments, `E[var + mean**2] - E[mean]**2`, written without
    the difference of two large numbers; a mean of variances would leave out what is between groups.
    """
    return jnp.mean(mean, -2), jnp.mean(var, -2) + jnp.var(mean, -2)


def batch_norm(
    *,
    train: bool,
    dtype: Any,
    name: str,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    group_size: int | None = None,
    scale_init: Any = ones,
) -> BatchNorm:
    """Returns BatchNorm with torch's momentum (0.1 there, 0.9 here) and, by default, epsilon."""
    return BatchNorm(
        use_running_average=not train,
        epsilon=epsilon,
        unbiased=unbiased,
        group_size=group_size,
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

BATCH_NORMS = ("batch", "batch_unbiased")
"""Those of `NORMS` that have statistics of the batch, and take `epsilon` and `group_size`."""
