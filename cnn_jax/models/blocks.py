"""Blocks: residual, bottleneck, inception and ConvNeXt."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.batch_statistics import relu
from cnn_jax.models.initialization import KAIMING
from cnn_jax.models.layers import Activation, ConvBlock, ModuleFactory, at_least, in_mode
from cnn_jax.models.normalization import Norm, batch_norm, layer_norm
from cnn_jax.models.pooling import average_pool, blur_pool, max_pool
from cnn_jax.typing import FeatureMap

projection = functools.partial(ConvBlock, kernel_size=1, padding=0, act=None)
"""Makes the 1x1 convolution and norm that fit X to F(X) where channels or strides change."""


def average_projection(
    features: int, *, strides: int = 1, **arguments: Any
) -> Callable[..., FeatureMap]:
    """Makes a `projection` that averages 2x2 pixels before it where it strides.

    ResNet-D of He et al. 2018 (arXiv:1812.01187): a strided 1x1 convolution ignores three pixels in
    four. The parameters are the projection's.
    """
    project = projection(features, **arguments)

    def downsample(x: FeatureMap, *, train: bool) -> FeatureMap:
        if strides > 1:
            x = average_pool(x, window=2, strides=strides, ceil_mode=True, count_include_pad=False)
        return project(x, train=train)

    return downsample


class StochasticDepth(nn.Module):
    """Leaves the branch of whole images out while training: Huang et al. 2016 (arXiv:1603.09382).

    Attributes:
      rate: share of the images whose branch becomes 0; the others' is divided by 1 - rate.
    """

    rate: float

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns x, some images zero if `train`; draws from the rng "dropout"."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"stochastic depth rate={self.rate}: must be >= 0 and < 1")
        if not train or self.rate == 0:
            return x
        kept = jax.random.bernoulli(
            self.make_rng("dropout"), 1 - self.rate, (x.shape[0], *(1,) * (x.ndim - 1))
        )
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class Residual(nn.Module):
    """What residual blocks share: `Y = act(F(X) + X)`, He et al. 2015 (arXiv:1512.03385).

    Attributes:
      features: channels of the 3x3 convolutions.
      strides: of the block.
      downsample: makes the module that fits X to F(X), called with `name=`; see `projection`.
      relu_before_add: whether F ends with an activation.
      use_bias: whether convolutions have biases.
      zero_init_last: whether the last norm's scale starts at 0, so that the block starts as the
        identity (Goyal et al. 2017, arXiv:1706.02677).
      attention: makes the module that weighs F(X) before the addition; see `attention.py`.
      stochastic_depth_rate: share of the images that skip F while training.
      anti_alias: whether strides are taken by `blur_pool` behind an unstrided convolution.
      conv, norm, act, dtype: as in `ConvBlock`.
    """

    features: int
    strides: int = 1
    downsample: ModuleFactory | None = None
    relu_before_add: bool = False
    use_bias: bool = False
    zero_init_last: bool = False
    attention: ModuleFactory | None = None
    stochastic_depth_rate: float = 0.0
    anti_alias: bool = False
    conv: ModuleFactory = KAIMING.conv
    norm: Norm = batch_norm
    act: Activation = relu
    dtype: Any = None

    @nn.nowrap
    def block(self, features: int, **arguments: Any) -> ConvBlock:
        """Returns a ConvBlock of this block's parts, but for what `arguments` say."""
        parts = {
            "use_bias": self.use_bias,
            "conv": self.conv,
            "norm": self.norm,
            "act": self.act,
            "dtype": self.dtype,
        }
        return ConvBlock(features, **parts | arguments)

    @nn.nowrap
    def strided(self, x: FeatureMap, block: Callable[..., ConvBlock], *, train: bool) -> FeatureMap:
        """Returns x through a block that takes this one's strides."""
        if not self.anti_alias or self.strides == 1:
            return block(strides=self.strides)(x, train=train)
        return blur_pool(block(strides=1)(x, train=train), strides=self.strides)

    @nn.nowrap
    def last(self) -> dict[str, Any]:
        """Returns what is different in the last ConvBlock of F."""
        if not self.zero_init_last:
            return {"act": self.act if self.relu_before_add else None}
        if self.relu_before_add:
            raise ValueError(
                "zero_init_last=True: must not be combined with relu_before_add=True; the branch "
                "would start at relu(0), whose gradient is 0, and never train"
            )
        return {
            "act": None,
            "norm": functools.partial(self.norm, scale_init=nn.initializers.zeros),
        }

    @nn.nowrap
    def add(self, x: FeatureMap, y: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns `act(Y + X)` from the input and the convolved branch."""
        if self.attention is not None:
            y = self.attention(name="attention")(y, train=train)
        y = StochasticDepth(self.stochastic_depth_rate)(y, train=train)
        identity = x
        if self.downsample is not None:
            identity = self.downsample(name="downsample")(x, train=train)
        if identity.shape != y.shape:
            raise ValueError(
                f"downsample={self.downsample}: the identity has shape {identity.shape} and the "
                f"branch {y.shape}; they are added, so they must be equal. Pass downsample="
                "functools.partial(projection, features, strides=strides) to project the identity"
            )
        return in_mode(self.act, train=train)(y + identity)


class ResidualBlock(Residual):
    """Two 3x3 convolutions and an identity: `Y = relu(F(X) + X)`.

    As the reference prints it, F ends with a ReLU of its own (`relu_before_add`) and its
    convolutions have biases; with both off it is the basic block of ResNet-18 and -34. The
    attributes are those of `Residual`; `strides` is that of the first convolution.
    """

    relu_before_add: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h', w', features]; raises ValueError where X does not fit F(X)."""
        y = self.strided(x, functools.partial(self.block, self.features, name="conv1"), train=train)
        y = self.block(self.features, name="conv2", **self.last())(y, train=train)
        return self.add(x, y, train=train)


class BottleneckBlock(Residual):
    """Narrow, filter, widen: `Y = relu(W3(W2(W1 X)) + X)` with 1x1, 3x3 and 1x1 kernels.

    The stride is on the 3x3 convolution, as in torchvision ("ResNet v1.5"). With groups it is the
    block of ResNeXt (Xie et al. 2016, arXiv:1611.05431), with a larger width per group that of Wide
    ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146). The other attributes are those of
    `Residual`.

    Attributes:
      expansion: output channels over `features`.
      groups: of the 3x3 convolution.
      width_per_group: channels of a group where `features` is 64; the 3x3 convolution has
        `features * width_per_group / 64 * groups` of them.
    """

    expansion: int = 4
    groups: int = 1
    width_per_group: int = 64

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h', w', features * expansion]; ValueError where X does not fit F(X)."""
        at_least(1, groups=self.groups)
        width = self.features * self.width_per_group // 64 * self.groups
        if width < 1:
            raise ValueError(
                f"width_per_group={self.width_per_group}: must leave a group at least one channel, "
                f"so it must be >= {-(-64 // self.features)} where features={self.features}"
            )
        pointwise = functools.partial(self.block, kernel_size=1, padding=0)
        y = pointwise(width, name="conv1")(x, train=train)
        y = self.strided(
            y, functools.partial(self.block, width, groups=self.groups, name="conv2"), train=train
        )
        y = pointwise(self.features * self.expansion, name="conv3", **self.last())(y, train=train)
        return self.add(x, y, train=train)


class InceptionBlock(nn.Module):
    """Four views of the same pixels, their channels side by side.

    GoogLeNet's module (Szegedy et al. 2014, arXiv:1409.4842), with BatchNorm: 1x1; 1x1 then 3x3;
    1x1 then 5x5; 3x3 max pool then 1x1.

    Attributes:
      branch1, branch2_reduce, branch2, branch3_reduce, branch3, branch4: output channels of each
        convolution.
      large_kernel_size: of the third branch: 5 in the paper, 3 in torchvision's weights.
      use_bias, conv, norm, act, dtype: as in `ConvBlock`.
    """

    branch1: int
    branch2_reduce: int
    branch2: int
    branch3_reduce: int
    branch3: int
    branch4: int
    large_kernel_size: int = 5
    use_bias: bool = False
    conv: ModuleFactory = KAIMING.conv
    norm: Norm = batch_norm
    act: Activation = relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h, w, branch1 + branch2 + branch3 + branch4]."""
        size = self.large_kernel_size
        block = functools.partial(
            ConvBlock,
            use_bias=self.use_bias,
            conv=self.conv,
            norm=self.norm,
            act=self.act,
            dtype=self.dtype,
        )
        pointwise = functools.partial(block, kernel_size=1, padding=0)
        y1 = pointwise(self.branch1, name="branch1")(x, train=train)
        y2 = pointwise(self.branch2_reduce, name="branch2_reduce")(x, train=train)
        y2 = block(self.branch2, name="branch2")(y2, train=train)
        y3 = pointwise(self.branch3_reduce, name="branch3_reduce")(x, train=train)
        y3 = block(self.branch3, size, padding=size // 2, name="branch3")(y3, train=train)
        y4 = max_pool(x, window=3, strides=1, padding=1)
        y4 = pointwise(self.branch4, name="branch4")(y4, train=train)
        return jnp.concatenate([y1, y2, y3, y4], axis=-1)


def exact_gelu(x: jax.Array) -> jax.Array:
    """Returns `x * P(N(0, 1) <= x)`, torch's default, rather than JAX's approximation by tanh."""
    return nn.gelu(x, approximate=False)


class ConvNeXtBlock(nn.Module):
    """`Y = X + layer_scale * W2 gelu(W1 norm(depthwise 7x7(X)))`.

    Liu et al. 2022 (arXiv:2201.03545).

    Attributes:
      features: channels, of input and output.
      expansion: channels of the wide layer over `features`.
      layer_scale: what the learned scale of the branch starts from.
      stochastic_depth_rate: share of the images that skip the branch while training.
      conv, dense, norm, act, dtype: what to build it from.
    """

    features: int
    expansion: int = 4
    layer_scale: float = 1e-6
    stochastic_depth_rate: float = 0.0
    conv: ModuleFactory = KAIMING.conv
    dense: ModuleFactory = KAIMING.dense
    norm: Norm = layer_norm
    act: Activation = exact_gelu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns an array of x's shape; ValueError unless x has `features` channels."""
        if x.shape[-1] != self.features:
            raise ValueError(
                f"features={self.features}: must be the {x.shape[-1]} channels of the input"
            )
        y = self.conv(
            self.features,
            kernel_size=(7, 7),
            padding=[(3, 3), (3, 3)],
            feature_group_count=self.features,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = self.norm(train=train, dtype=self.dtype, name="norm")(y)
        wide = self.features * self.expansion
        y = self.act(self.dense(wide, dtype=self.dtype, name="expand")(y))
        y = self.dense(self.features, dtype=self.dtype, name="reduce")(y)
        scale = self.param(
            "layer_scale", nn.initializers.constant(self.layer_scale), (self.features,), jnp.float32
        )
        y = y * scale.astype(y.dtype).reshape(1, 1, 1, -1)
        return x + StochasticDepth(self.stochastic_depth_rate)(y, train=train)
