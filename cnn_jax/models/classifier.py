"""What all models share: stages of feature maps, and a head that classifies the last."""

import functools
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.initialization import TORCH, Initialization
from cnn_jax.models.layers import ModuleFactory, at_least
from cnn_jax.models.normalization import BATCH_NORMS, NORMS, Norm
from cnn_jax.models.pooling import POOLS
from cnn_jax.typing import Array, FeatureMap, Images, Logits


def one_of(argument: str, value: str, allowed: Collection[str]) -> None:
    """Raises ValueError unless `value` is allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(map(repr, allowed))}")


REMATS = ("none", "block", "stage")


@jax.custom_jvp
def product(x: Array, kernel: Array) -> jax.Array:
    """Returns `x @ kernel` in float32 at least; its derivatives have the dtype of x and kernel.

    So the gradient of a bfloat16 kernel is made, and crosses links, in bfloat16, as those of
    convolutions do.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


@product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = product(x, kernel)
    return y, (x_dot @ kernel + x @ kernel_dot).astype(y.dtype)


class Head(nn.Module):
    """Global pooling, norm if any, dropout, one dense layer.

    Attributes:
      num_classes: width of the dense layer.
      pool: "average", "max" or "generalized_mean".
      norm: of the pooled channels, or None.
      dropout_rate: share of the pooled channels that are 0 while training.
      initialization: of the dense layer.
    """

    num_classes: int
    pool: str = "average"
    norm: Norm | None = None
    dropout_rate: float = 0.0
    initialization: Initialization = TORCH

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> Logits:
        """Returns logits [b, num_classes], in float32 whatever the images were, unless float64."""
        at_least(1, num_classes=self.num_classes)
        one_of("pool", self.pool, POOLS)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate}: must be >= 0 and < 1")
        pool = POOLS[self.pool]
        pooled = pool(name="pool")(x) if isinstance(pool, type) else pool(x)
        if self.norm is not None:
            norm = self.norm(train=train, dtype=pooled.dtype, name="norm")
            pooled = norm(pooled[:, None, None, :])[:, 0, 0, :]
        pooled = nn.Dropout(self.dropout_rate, deterministic=not train)(pooled)
        channels = pooled.shape[-1]
        shape = (channels, self.num_classes)
        kernel = self.param("kernel", self.initialization.kernel, shape, jnp.float32)
        bias = self.param("bias", self.initialization.bias(channels), shape[1:], jnp.float32)
        return product(pooled.astype(x.dtype), kernel.astype(x.dtype)) + bias.reshape(1, -1)


class Classifier(nn.Module):
    """A network of stages, each a feature map coarser than the last, and a head.

    Attributes:
      num_classes: width of the head.
      norm: a name in `NORMS`; without a norm, convolutions have biases.
      batch_norm_group_size: images that share BatchNorm's statistics while training; None: all of
        the batch.
      pool: of the head: "average", "max" or "generalized_mean".
      initialization: "torchvision", as torchvision starts this network, or "torch", the defaults of
        torch's layers.
      remat: what is computed again in the backward pass instead of being kept: "none", all that is
        inside a "block", or inside a "stage", whose inputs alone are kept.
      features_only: whether to return the stages' outputs instead of logits, without a head.
      dtype: of the computation; parameters, statistics and logits are float32.
    """

    num_classes: int = 1000
    norm: str = "batch"
    batch_norm_group_size: int | None = None
    pool: str = "average"
    initialization: str = "torchvision"
    remat: str = "none"
    features_only: bool = False
    dtype: Any = None

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels of the image between two neighbours, for each map that `features_only` returns."""
        raise NotImplementedError

    def stages(self, images: Images, *, train: bool) -> list[FeatureMap]:
        """Returns the feature maps of the stem and of every stage, finest first."""
        raise NotImplementedError

    @nn.nowrap
    def check(self) -> None:
        """Raises ValueError for an attribute that cannot be."""
        one_of("norm", self.norm, NORMS)
        one_of("pool", self.pool, POOLS)
        one_of("remat", self.remat, REMATS)
        if self.batch_norm_group_size is not None and self.norm not in BATCH_NORMS:
            raise ValueError(
                f"batch_norm_group_size={self.batch_norm_group_size}: must be None with "
                f"norm={self.norm!r}, which has no statistics of a batch"
            )

    @nn.nowrap
    def make_norm(self) -> Norm:
        """Returns what makes the norms."""
        norm = NORMS[self.norm]
        if self.batch_norm_group_size is None:
            return norm
        return functools.partial(norm, group_size=self.batch_norm_group_size)

    @nn.nowrap
    def run(self, blocks: Sequence[ModuleFactory], x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x through a stage: the modules that `blocks` make, one after the other.

        While training, `remat` has a block or all of them computed again in the backward pass. The
        variables are the same with and without.
        """

        def run_block(block: ModuleFactory, module: Any, x: FeatureMap) -> FeatureMap:
            return block()(x, train=train)

        def run_stage(module: Any, x: FeatureMap) -> FeatureMap:
            for block in blocks:
                x = again("block", functools.partial(run_block, block))(module, x)
            return x

        def again(what: str, function: Callable[..., FeatureMap]) -> Callable[..., FeatureMap]:
            return nn.remat(function) if train and self.remat == what else function

        return again("stage", run_stage)(self, x)

    @nn.nowrap
    def make_head(self) -> Head:
        """Returns the head."""
        return Head(self.num_classes, self.pool)

    def setup(self):
        self.check()
        if not self.features_only:
            self.head = self.make_head()

    def __call__(self, images: Images, *, train: bool) -> Logits | list[FeatureMap]:
        """Returns float32 logits [b, num_classes] of normalised images [b, h, w, c].

        With `features_only`, returns the feature map of every stage instead, finest first. Raises
        ValueError for an argument that cannot be, or an image smaller than the last stage's stride.
        """
        maps = self.stages(images, train=train)
        return maps[1:] if self.features_only else self.head(maps[-1], train=train)


def check_images(images: Images, stride: int) -> None:
    """Raises ValueError unless these are images of at least `stride` pixels each way."""
    if images.ndim != 4 or any(size < stride for size in images.shape[1:3]) or not images.shape[-1]:
        raise ValueError(
            f"images of shape {tuple(images.shape)}: must be [batch, height, width, channels] "
            f"with height and width of at least {stride} pixels, the stride of the last stage"
        )
    if jnp.issubdtype(images.dtype, jnp.complexfloating):
        raise ValueError(f"images of {images.dtype}: must be real numbers")


def depth_rates(rate: float, stage_sizes: Sequence[int]) -> list[list[float]]:
    """Returns each block's rate of stochastic depth, by stage: from 0 linearly up to `rate`.

    Raises ValueError for a rate, or a number of blocks, that cannot be.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"stochastic_depth_rate={rate}: must be >= 0 and < 1")
    numbers = stage_sizes if isinstance(stage_sizes, Sequence) else ()
    if not numbers or not all(isinstance(each, Integral) and each >= 1 for each in numbers):
        raise ValueError(
            f"stage_sizes={stage_sizes!r}: must be one or more numbers of blocks, each >= 1"
        )
    last = max(1, sum(stage_sizes) - 1)
    rates = iter(rate * index / last for index in range(sum(stage_sizes)))
    return [[next(rates) for _ in range(size)] for size in stage_sizes]
