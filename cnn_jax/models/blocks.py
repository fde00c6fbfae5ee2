"""Residual blocks: `Y = act(F(X) + X)` (He et al. 2015, arXiv:1512.03385)."""

import functools
from typing import Any

import flax.linen as nn

from cnn_jax.models.layers import Activation, ConvBlock, ModuleFactory, Norm, batch_norm
from cnn_jax.typing import FeatureMap

projection = functools.partial(ConvBlock, kernel_size=1, padding=0, act=None)
"""Makes the 1x1 convolution and norm that fit X to F(X) where channels or strides change."""


def shortcut(
    x: FeatureMap, like: FeatureMap, downsample: ModuleFactory | None, *, train: bool
) -> FeatureMap:
    """Returns X, through `downsample` if given, checked to have the shape of F(X)."""
    identity = x if downsample is None else downsample(name="downsample")(x, train=train)
    if identity.shape != like.shape:
        raise ValueError(
            f"downsample={downsample}: the identity has shape {identity.shape} and the branch "
            f"{like.shape}; they are added, so they must be equal. Pass downsample="
            "functools.partial(projection, features, strides=strides) to project the identity"
        )
    return identity


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and an identity: `Y = relu(F(X) + X)`.

    As the reference prints it, F ends with a ReLU of its own (`relu_before_add`) and its
    convolutions have biases; with both off it is the basic block of ResNet-18 and -34.

    Attributes:
      features: output channels.
      strides: of the first convolution.
      downsample: makes the module that fits X to F(X), called with `name=`; see `projection`.
      relu_before_add: whether F ends with an activation.
      use_bias, conv, norm, act, dtype: as in `ConvBlock`.
    """

    features: int
    strides: int = 1
    downsample: ModuleFactory | None = None
    relu_before_add: bool = True
    use_bias: bool = True
    conv: ModuleFactory = ConvBlock.conv
    norm: Norm = batch_norm
    act: Activation = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h', w', features]; raises ValueError where X does not fit F(X)."""
        block = functools.partial(
            ConvBlock,
            self.features,
            use_bias=self.use_bias,
            conv=self.conv,
            norm=self.norm,
            dtype=self.dtype,
        )
        last_act = self.act if self.relu_before_add else None
        y = block(strides=self.strides, act=self.act, name="conv1")(x, train=train)
        y = block(act=last_act, name="conv2")(y, train=train)
        return self.act(y + shortcut(x, y, self.downsample, train=train))


class BottleneckBlock(nn.Module):
    """Narrow, filter, widen: `Y = relu(W3(W2(W1 X)) + X)` with 1x1, 3x3 and 1x1 kernels.

    The stride is on the 3x3 convolution, as in torchvision ("ResNet v1.5").

    Attributes:
      features: channels of the bottleneck; the output has `features * expansion`.
      strides: of the 3x3 convolution.
      expansion: output channels over bottleneck channels.
      downsample, relu_before_add, use_bias, conv, norm, act, dtype: as in `ResidualBlock`.
    """

    features: int
    strides: int = 1
    expansion: int = 4
    downsample: ModuleFactory | None = None
    relu_before_add: bool = False
    use_bias: bool = False
    conv: ModuleFactory = ConvBlock.conv
    norm: Norm = batch_norm
    act: Activation = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h', w', features * expansion]; ValueError where X does not fit F(X)."""
        block = functools.partial(
            ConvBlock, use_bias=self.use_bias, conv=self.conv, norm=self.norm, dtype=self.dtype
        )
        pointwise = functools.partial(block, kernel_size=1, padding=0)
        last_act = self.act if self.relu_before_add else None
        y = pointwise(self.features, act=self.act, name="conv1")(x, train=train)
        y = block(self.features, strides=self.strides, act=self.act, name="conv2")(y, train=train)
        y = pointwise(self.features * self.expansion, act=last_act, name="conv3")(y, train=train)
        return self.act(y + shortcut(x, y, self.downsample, train=train))
