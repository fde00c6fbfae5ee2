"""ModernCNN: the reference network, from a 28x28 classifier to ResNet-50."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from cnn_jax.models.blocks import BottleneckBlock, ResidualBlock, projection
from cnn_jax.models.layers import (
    GROUP_SIZE,
    NORMS,
    ConvBlock,
    global_average_pool,
    max_pool,
    torch_linear,
)
from cnn_jax.typing import FeatureMap, Images, Logits

STEM_STRIDES = {"large": 4, "medium": 2, "small": 1}
BLOCKS = ("bottleneck", "residual")
VARIANTS = ("standard", "literal")


def one_of(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(map(repr, allowed))}")


class ModernCNN(nn.Module):
    """The residual network of the reference: stem, stages of residual blocks, global pool, head.

    The reference as printed cannot run: its blocks end at `width` channels and its shortcuts at
    four times that. Its widths, its (3, 4, 6, 3) blocks and its 2048-wide head mean bottlenecks,
    so the default is ResNet-50 (torchvision's, 25,557,032 parameters at 1000 classes).

    Attributes:
      num_classes: width of the head.
      stage_sizes: residual blocks in each stage; stage i is 2**i times `width` wide, and each stage
        but the first halves the image.
      width: channels of the stem and of the first stage's 3x3 convolutions.
      stem: "large" (7x7 stride 2, then 3x3 max pool stride 2) for images from about 100 pixels;
        "medium" (3x3 stride 2) and "small" (3x3 stride 1) below.
      block: "bottleneck" (stage output 4 times its width) or "residual" (3x3 and 3x3).
      variant: "standard", or "literal" for what the reference prints: convolutions with bias, and a
        ReLU before the addition as well as behind it (25,583,592 parameters).
      norm: "batch", "group" or "none"; without a norm, convolutions have biases in either variant.
      dtype: of the computation; parameters, statistics and logits are float32.
    """

    num_classes: int = 1000
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "large"
    block: str = "bottleneck"
    variant: str = "standard"
    norm: str = "batch"
    dtype: Any = None

    @property
    def total_stride(self) -> int:
        """Pixels of the image between two neighbours of the last feature map."""
        return STEM_STRIDES[self.stem] * 2 ** (len(self.stage_sizes) - 1)

    def setup(self):
        self.head = nn.Dense(self.num_classes, kernel_init=torch_linear, dtype=jnp.float32)

    def __call__(self, images: Images, *, train: bool) -> Logits:
        """Returns float32 logits [b, num_classes] of normalised images [b, h, w, c].

        Raises ValueError for an unknown name, or an image smaller than `total_stride`.
        """
        return self.head(global_average_pool(self.stages(images, train=train)[-1]))

    @nn.compact
    def stages(self, images: Images, *, train: bool) -> list[FeatureMap]:
        """Returns the feature maps of the stem and of every stage, finest first."""
        self._check(images)
        literal = self.variant == "literal"
        parts: dict[str, Any] = {
            "use_bias": literal or self.norm == "none",
            "norm": NORMS[self.norm],
            "dtype": self.dtype,
        }
        if self.stem == "large":
            stem = ConvBlock(self.width, kernel_size=7, strides=2, padding=3, name="stem", **parts)
            x = max_pool(stem(images, train=train), window=3, strides=2, padding=1)
        else:
            stem = ConvBlock(self.width, strides=STEM_STRIDES[self.stem], name="stem", **parts)
            x = stem(images, train=train)

        maps = [x]
        make_block = BottleneckBlock if self.block == "bottleneck" else ResidualBlock
        expansion = BottleneckBlock.expansion if self.block == "bottleneck" else 1
        for stage, num_blocks in enumerate(self.stage_sizes):
            features = self.width * 2**stage
            for index in range(num_blocks):
                strides = 2 if stage > 0 and index == 0 else 1
                fits = strides == 1 and x.shape[-1] == features * expansion
                x = make_block(
                    features,
                    strides=strides,
                    downsample=None
                    if fits
                    else functools.partial(
                        projection, features * expansion, strides=strides, **parts
                    ),
                    relu_before_add=literal,
                    name=f"stage{stage + 1}_block{index + 1}",
                    **parts,
                )(x, train=train)
            maps.append(x)
        return maps

    def _check(self, images: Images) -> None:
        one_of("stem", self.stem, tuple(STEM_STRIDES))
        one_of("block", self.block, BLOCKS)
        one_of("variant", self.variant, VARIANTS)
        one_of("norm", self.norm, tuple(NORMS))
        if self.width < 1:
            raise ValueError(f"width={self.width}: must be >= 1")
        if self.norm == "group" and self.width % GROUP_SIZE:
            raise ValueError(
                f"width={self.width}: must be a multiple of {GROUP_SIZE} with norm='group'"
            )
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes}: must be one or more numbers of blocks, each >= 1"
            )
        if images.ndim != 4 or min(images.shape[1:3]) < self.total_stride:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: must be [batch, height, width, channels] "
                f"with height and width of at least {self.total_stride} pixels, the stride of "
                f"stem={self.stem!r} with {len(self.stage_sizes)} stages"
            )
