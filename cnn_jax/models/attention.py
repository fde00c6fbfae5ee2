"""Attention of convolutional networks: `Y = X * gate(X)` with gates between 0 and 1."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cnn_jax.models.initialization import KAIMING
from cnn_jax.models.layers import Activation, ConvBlock, ModuleFactory, at_least
from cnn_jax.models.normalization import Norm, batch_norm
from cnn_jax.models.pooling import global_average_pool, global_max_pool, largest
from cnn_jax.typing import FeatureMap


class Attention(nn.Module):
    """What every attention takes, so that a block can use any of them.

    Attributes:
      conv, dense, norm, act: what to build it from, where it has such a layer.
      dtype: of the computation.
    """

    conv: ModuleFactory = KAIMING.conv
    dense: ModuleFactory = KAIMING.dense
    norm: Norm = batch_norm
    act: Activation = nn.relu
    dtype: Any = None

    @nn.nowrap
    def excite(self, pooled: Any, reduction: int, **arguments: Any) -> Any:
        """Returns `W2 act(W1 pooled)`, a narrow layer of at least 1 channel and a wide one."""
        at_least(1, reduction=reduction)
        channels = pooled.shape[-1]
        dense = functools.partial(self.dense, dtype=self.dtype, **arguments)
        y = dense(max(1, channels // reduction), name="reduce")(pooled)
        return dense(channels, name="expand")(self.act(y))


class SqueezeExcite(Attention):
    """`Y = X * sigmoid(W2 relu(W1 pool(X)))`: channels that gate each other.

    Hu et al. 2017 (arXiv:1709.01507).

    Attributes:
      reduction: channels over those of the narrow layer.
    """

    reduction: int = 16

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x with each channel scaled."""
        gate = nn.sigmoid(self.excite(global_average_pool(x), self.reduction))
        return x * gate[:, None, None, :].astype(x.dtype)


class EfficientChannelAttention(Attention):
    """`Y = X * sigmoid(w * pool(X))`, a convolution over neighbouring channels.

    Wang et al. 2019 (arXiv:1910.03151).

    Attributes:
      kernel_size: channels that gate one; by default `|log2(c) / 2 + 1/2|`, made odd, at least 3.
    """

    kernel_size: int | None = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x with each channel scaled; ValueError for an even kernel."""
        size = self.kernel_size
        if size is None:
            size = max(3, int((math.log2(x.shape[-1]) + 1) / 2) // 2 * 2 + 1)
        check_odd(size)
        conv = self.conv(
            1,
            kernel_size=(size,),
            padding=size // 2,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )
        gate = nn.sigmoid(conv(global_average_pool(x)[:, :, None]))
        return x * gate[:, None, None, :, 0].astype(x.dtype)


class ChannelGate(Attention):
    """CBAM's first half: `X * sigmoid(f(average(X)) + f(max(X)))`, f two layers without biases.

    Attributes:
      reduction: channels over those of the narrow layer.
    """

    reduction: int = 16

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x with each channel scaled."""
        pooled = jnp.stack([global_average_pool(x), global_max_pool(x)])
        y = self.excite(pooled, self.reduction, use_bias=False)
        gate = nn.sigmoid(y[0] + y[1])
        return x * gate[:, None, None, :].astype(x.dtype)


class CBAM(Attention):
    """Convolutional block attention: channels gate channels, then pixels gate pixels.

    Woo et al. 2018 (arXiv:1807.06521). A pixel's gate is a convolution over the mean and the
    maximum of its channels, normalised.

    Attributes:
      reduction: channels over those of the narrow layer.
      kernel_size: of the spatial convolution, pixels.
    """

    reduction: int = 16
    kernel_size: int = 7

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x with each channel and each pixel scaled; ValueError for an even kernel."""
        check_odd(self.kernel_size)
        x = ChannelGate(
            dense=self.dense,
            act=self.act,
            dtype=self.dtype,
            reduction=self.reduction,
            name="channel",
        )(x, train=train)
        summary = jnp.concatenate(
            [jnp.mean(x, axis=-1, keepdims=True), largest(x, (3,))[..., None]], axis=-1
        )
        gate = ConvBlock(
            1,
            self.kernel_size,
            padding=self.kernel_size // 2,
            use_bias=False,
            conv=self.conv,
            norm=self.norm,
            act=nn.sigmoid,
            dtype=self.dtype,
            name="spatial",
        )
        return x * gate(summary, train=train).astype(x.dtype)


def check_odd(kernel_size: int) -> None:
    """Raises ValueError for a kernel that has no middle."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: must be an odd number >= 1")


ATTENTIONS: dict[str, ModuleFactory | None] = {
    "none": None,
    "squeeze_excite": SqueezeExcite,
    "efficient_channel": EfficientChannelAttention,
    "cbam": CBAM,
}
