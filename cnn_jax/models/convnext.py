"""ConvNeXt: a convolutional network with the manners of a transformer (arXiv:2201.03545)."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from cnn_jax.models.blocks import ConvNeXtBlock
from cnn_jax.models.classifier import Classifier, Head, check_images, depth_rates, one_of
from cnn_jax.models.initialization import TORCH, normal, zero_bias
from cnn_jax.models.layers import ConvBlock, at_least
from cnn_jax.typing import FeatureMap, Images

STEM_STRIDES = {"patch": 4, "small": 1}
INITIALIZATIONS = {"torchvision": normal(0.02, zero_bias), "torch": TORCH}


class ConvNeXt(Classifier):
    """ConvNeXt of Liu et al. 2022; by default ConvNeXt-T, 28,589,128 parameters.

    Attributes, beside those of `Classifier`:
      stage_sizes: blocks in each stage; stage i is 2**i times `width` wide, and each stage but the
        first halves the image.
      width: channels of the first stage.
      stem: "patch" (4x4 stride 4) or "small" (3x3 stride 1) for small images.
      layer_scale: what the learned scale of each block's branch starts from.
      stochastic_depth_rate: of the last block, the others' rising linearly from 0 at the first.
    """

    norm: str = "layer"
    stage_sizes: Sequence[int] = (3, 3, 9, 3)
    width: int = 96
    stem: str = "patch"
    layer_scale: float = 1e-6
    stochastic_depth_rate: float = 0.1

    @property
    def feature_strides(self) -> tuple[int, ...]:
        self.check()
        return tuple(STEM_STRIDES[self.stem] * 2**stage for stage in range(len(self.stage_sizes)))

    @nn.nowrap
    def make_head(self) -> Head:
        return Head(
            self.num_classes,
            self.pool,
            norm=self.make_norm(),
            initialization=INITIALIZATIONS[self.initialization],
        )

    @nn.compact
    def stages(self, images: Images, *, train: bool) -> list[FeatureMap]:
        check_images(images, self.feature_strides[-1])
        initialization = INITIALIZATIONS[self.initialization]
        parts: dict[str, Any] = {
            "conv": initialization.conv,
            "norm": self.make_norm(),
            "dtype": self.dtype,
        }
        size, padding = (4, 0) if self.stem == "patch" else (3, 1)
        stem = ConvBlock(
            self.width, size, STEM_STRIDES[self.stem], padding, act=None, name="stem", **parts
        )
        x = stem(images, train=train)
        maps = [x]
        for stage, rates in enumerate(depth_rates(self.stochastic_depth_rate, self.stage_sizes)):
            width = self.width * 2**stage
            downsample = functools.partial(
                NormedDownsample, width, name=f"stage{stage + 1}_downsample", **parts
            )
            blocks = [
                functools.partial(
                    ConvNeXtBlock,
                    width,
                    layer_scale=self.layer_scale,
                    stochastic_depth_rate=rate,
                    dense=initialization.dense,
                    name=f"stage{stage + 1}_block{index + 1}",
                    **parts,
                )
                for index, rate in enumerate(rates)
            ]
            x = self.run([downsample, *blocks] if stage > 0 else blocks, x, train=train)
            maps.append(x)
        return maps

    @nn.nowrap
    def check(self) -> None:
        super().check()
        one_of("stem", self.stem, STEM_STRIDES)
        one_of("initialization", self.initialization, INITIALIZATIONS)
        at_least(1, width=self.width)
        depth_rates(self.stochastic_depth_rate, self.stage_sizes)


class NormedDownsample(nn.Module):
    """Normalisation, then a 2x2 convolution of stride 2.

    Attributes:
      features: output channels.
      conv, norm, dtype: as in `ConvBlock`.
    """

    features: int
    conv: Any
    norm: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
        """Returns [b, h // 2, w // 2, features]."""
        x = self.norm(train=train, dtype=self.dtype, name="norm")(x)
        conv = self.conv(
            self.features,
            kernel_size=(2, 2),
            strides=(2, 2),
            padding="VALID",
            dtype=self.dtype,
            name="conv",
        )
        return conv(x)


convnext_mini = functools.partial(ConvNeXt, stage_sizes=(1, 1, 1), width=16, stem="small")
