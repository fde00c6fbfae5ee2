"""ModernCNN: the reference network, from a 28x28 classifier to ResNet-152 and its relatives."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from cnn_jax.models.attention import ATTENTIONS
from cnn_jax.models.blocks import (
    BottleneckBlock,
    ResidualBlock,
    average_projection,
    projection,
)
from cnn_jax.models.classifier import Classifier, check_images, depth_rates, one_of
from cnn_jax.models.initialization import KAIMING, TORCH
from cnn_jax.models.layers import ConvBlock, at_least
from cnn_jax.models.normalization import GROUP_SIZE
from cnn_jax.models.pooling import blur_pool, max_pool
from cnn_jax.typing import FeatureMap, Images

STEM_STRIDES = {"large": 4, "deep": 4, "medium": 2, "small": 1}
BLOCKS = ("bottleneck", "residual")
VARIANTS = ("standard", "literal")
DOWNSAMPLES = {"projection": projection, "average": average_projection}
INITIALIZATIONS = {"torchvision": KAIMING, "torch": TORCH}


class ModernCNN(Classifier):
    """The residual network of the reference: stem, stages of residual blocks, global pool, head.

    The reference as printed cannot run: its blocks end at `width` channels and its shortcuts at
    four times that. Its widths, its (3, 4, 6, 3) blocks and its 2048-wide head mean bottlenecks,
    so the default is ResNet-50 (torchvision's, 25,557,032 parameters at 1000 classes).

    Attributes, beside those of `Classifier`:
      stage_sizes: residual blocks in each stage; stage i is 2**i times `width` wide, and each stage
        but the first halves the image.
      width: channels of the stem and of the first stage's 3x3 convolutions.
      stem: "large" (7x7 stride 2, then 3x3 max pool stride 2) or "deep" (three 3x3, ResNet-D's)
        for images from about 100 pixels; "medium" (3x3 stride 2) and "small" (3x3 stride 1) below.
      block: "bottleneck" (stage output 4 times its width) or "residual" (3x3 and 3x3).
      variant: "standard", or "literal" for what the reference prints: convolutions with bias, and a
        ReLU before the addition as well as behind it (25,583,592 parameters).
      groups, width_per_group: of bottlenecks; ResNeXt and Wide ResNet.
      attention: "none", "squeeze_excite", "efficient_channel" or "cbam", in every block.
      downsample: "projection", or "average" for ResNet-D's average before it.
      anti_alias: whether strides of 3x3 convolutions and of the stem's pool blur first.
      zero_init_last: whether each block starts as the identity.
      stochastic_depth_rate: of the last block, the others' rising linearly from 0 at the first.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "large"
    block: str = "bottleneck"
    variant: str = "standard"
    groups: int = 1
    width_per_group: int = 64
    attention: str = "none"
    downsample: str = "projection"
    anti_alias: bool = False
    zero_init_last: bool = False
    stochastic_depth_rate: float = 0.0

    @property
    def feature_strides(self) -> tuple[int, ...]:
        self.check()
        return tuple(STEM_STRIDES[self.stem] * 2**stage for stage in range(len(self.stage_sizes)))

    @nn.compact
    def stages(self, images: Images, *, train: bool) -> list[FeatureMap]:
        check_images(images, self.feature_strides[-1])
        literal = self.variant == "literal"
        initialization = INITIALIZATIONS[self.initialization]
        parts: dict[str, Any] = {
            "conv": initialization.conv,
            "norm": self.make_norm(),
            "dtype": self.dtype,
        }
        attention = ATTENTIONS[self.attention]
        if attention is not None:
            attention = functools.partial(attention, dense=initialization.dense, **parts)
        parts["use_bias"] = literal or self.norm == "none"
        make_block, expansion = ResidualBlock, 1
        if self.block == "bottleneck":
            expansion = BottleneckBlock.expansion
            make_block = functools.partial(
                BottleneckBlock, groups=self.groups, width_per_group=self.width_per_group
            )

        x = self._stem(images, parts, train=train)
        maps = [x]
        rates = depth_rates(self.stochastic_depth_rate, self.stage_sizes)
        for stage, stage_rates in enumerate(rates):
            features = self.width * 2**stage
            outputs = features * expansion
            blocks = []
            for index, rate in enumerate(stage_rates):
                strides = 2 if stage > 0 and index == 0 else 1
                downsample = None
                if index == 0 and (strides > 1 or x.shape[-1] != outputs):
                    downsample = functools.partial(
                        DOWNSAMPLES[self.downsample], outputs, strides=strides, **parts
                    )
                block = functools.partial(
                    make_block,
                    features,
                    strides=strides,
                    downsample=downsample,
                    relu_before_add=literal,
                    zero_init_last=self.zero_init_last,
                    attention=attention,
                    stochastic_depth_rate=rate,
                    anti_alias=self.anti_alias,
                    name=f"stage{stage + 1}_block{index + 1}",
                    **parts,
                )
                blocks.append(block)
            x = self.run(blocks, x, train=train)
            maps.append(x)
        return maps

    @nn.nowrap
    def _stem(self, images: Images, parts: dict[str, Any], *, train: bool) -> FeatureMap:
        block = functools.partial(ConvBlock, **parts)
        if self.stem in ("medium", "small"):
            strides = STEM_STRIDES[self.stem]
            return block(self.width, strides=strides, name="stem")(images, train=train)
        step = 1 if self.anti_alias else 2
        pool = functools.partial(max_pool, window=3, strides=step, padding=1)
        if self.stem == "large":
            stem = block(
                self.width, kernel_size=7, strides=2, padding=3, max_pool=pool, name="stem"
            )
            x = stem(images, train=train)
        else:
            x = block(self.width // 2, strides=2, name="stem1")(images, train=train)
            x = block(self.width // 2, name="stem2")(x, train=train)
            x = block(self.width, max_pool=pool, name="stem3")(x, train=train)
        return blur_pool(x) if self.anti_alias else x

    @nn.nowrap
    def check(self) -> None:
        super().check()
        one_of("stem", self.stem, STEM_STRIDES)
        one_of("block", self.block, BLOCKS)
        one_of("variant", self.variant, VARIANTS)
        one_of("attention", self.attention, ATTENTIONS)
        one_of("downsample", self.downsample, DOWNSAMPLES)
        one_of("initialization", self.initialization, INITIALIZATIONS)
        at_least(2 if self.stem == "deep" else 1, width=self.width)
        if self.norm == "group" and self.width % GROUP_SIZE:
            raise ValueError(
                f"width={self.width}: must be a multiple of {GROUP_SIZE} with norm='group'"
            )
        depth_rates(self.stochastic_depth_rate, self.stage_sizes)
        if self.block == "residual" and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                f"groups={self.groups}, width_per_group={self.width_per_group}: "
                "must be 1 and 64 with block='residual'; they shape bottlenecks"
            )


resnet50 = functools.partial(ModernCNN)
modern_cnn_literal = functools.partial(ModernCNN, variant="literal")
resnet18 = functools.partial(ModernCNN, block="residual", stage_sizes=(2, 2, 2, 2))
resnet34 = functools.partial(ModernCNN, block="residual")
resnet101 = functools.partial(ModernCNN, stage_sizes=(3, 4, 23, 3))
resnet152 = functools.partial(ModernCNN, stage_sizes=(3, 8, 36, 3))
resnext50_32x4d = functools.partial(ModernCNN, groups=32, width_per_group=4)
wide_resnet50_2 = functools.partial(ModernCNN, width_per_group=128)
resnet50d = functools.partial(ModernCNN, stem="deep", downsample="average")
seresnet50 = functools.partial(ModernCNN, attention="squeeze_excite")
ecaresnet50 = functools.partial(ModernCNN, attention="efficient_channel")
cbam_resnet50 = functools.partial(ModernCNN, attention="cbam")

resnet_mini = functools.partial(
    ModernCNN, block="residual", stage_sizes=(1, 1, 1), width=16, stem="small"
)
bottleneck_mini = functools.partial(resnet_mini, block="bottleneck")
resnext_mini = functools.partial(bottleneck_mini, groups=4, width_per_group=32)
seresnet_mini = functools.partial(resnet_mini, attention="squeeze_excite")
ecaresnet_mini = functools.partial(resnet_mini, attention="efficient_channel")
cbam_resnet_mini = functools.partial(resnet_mini, attention="cbam")
