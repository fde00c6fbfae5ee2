"""GoogLeNet: stages of inception blocks (Szegedy et al. 2014, arXiv:1409.4842)."""

import functools
from collections.abc import Sequence

import flax.linen as nn

from cnn_jax.models.blocks import InceptionBlock
from cnn_jax.models.classifier import Classifier, Head, check_images, one_of
from cnn_jax.models.initialization import TORCH, normal, torch_bias
from cnn_jax.models.layers import ConvBlock, at_least
from cnn_jax.models.normalization import BATCH_NORMS
from cnn_jax.models.pooling import max_pool
from cnn_jax.typing import FeatureMap, Images

CHANNELS = {  # of the six convolutions, from the paper's table 1
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
STEM_STRIDES = {"large": 8, "small": 1}
INITIALIZATIONS = {"torchvision": normal(0.01, torch_bias), "torch": TORCH}


class GoogLeNet(Classifier):
    """GoogLeNet with BatchNorm and without auxiliary heads, torchvision's: 6,624,904 parameters.

    As there, BatchNorm's epsilon is 1e-3, the third branch's kernel 3x3 where the paper has 5x5,
    and max pools round sizes up.

    Attributes, beside those of `Classifier`:
      blocks: names of the inception blocks, in order; a new digit starts a stage of half the size.
      width: channels of the first convolution; all others grow and shrink with it (the paper: 64).
      stem: "large" (three convolutions and two pools, stride 8) or "small" (3x3, stride 1).
      dropout_rate: of the head.
    """

    blocks: Sequence[str] = tuple(CHANNELS)
    width: int = 64
    stem: str = "large"
    dropout_rate: float = 0.2

    @property
    def feature_strides(self) -> tuple[int, ...]:
        self.check()
        return tuple(STEM_STRIDES[self.stem] * 2**stage for stage in range(len(self._digits())))

    @nn.nowrap
    def make_head(self) -> Head:
        return Head(
            self.num_classes,
            self.pool,
            dropout_rate=self.dropout_rate,
            initialization=INITIALIZATIONS[self.initialization],
        )

    @nn.compact
    def stages(self, images: Images, *, train: bool) -> list[FeatureMap]:
        check_images(images, self.feature_strides[-1])
        norm = self.make_norm()
        parts = {
            "use_bias": self.norm == "none",
            "conv": INITIALIZATIONS[self.initialization].conv,
            "norm": functools.partial(norm, epsilon=1e-3) if self.norm in BATCH_NORMS else norm,
            "dtype": self.dtype,
        }
        block = functools.partial(ConvBlock, **parts)
        halved = functools.partial(max_pool, window=3, strides=2, ceil_mode=True)
        if self.stem == "small":
            x = block(self.width, name="conv1")(images, train=train)
        else:
            stem = functools.partial(block, kernel_size=7, strides=2, padding=3)
            x = stem(self.width, max_pool=halved, name="conv1")(images, train=train)
            x = block(self.width, kernel_size=1, padding=0, name="conv2")(x, train=train)
            x = block(3 * self.width, max_pool=halved, name="conv3")(x, train=train)

        maps = [x]
        for digit in self._digits():
            if len(maps) > 1:
                x = halved(x, window=2) if digit == "5" else halved(x)
            blocks = [
                functools.partial(
                    InceptionBlock,
                    *[count * self.width // 64 for count in CHANNELS[name]],
                    large_kernel_size=3,
                    name=f"inception{name}",
                    **parts,
                )
                for name in self.blocks
                if name.startswith(digit)
            ]
            x = self.run(blocks, x, train=train)
            maps.append(x)
        return maps

    @nn.nowrap
    def _digits(self) -> list[str]:
        return sorted({name[0] for name in self.blocks})

    @nn.nowrap
    def check(self) -> None:
        super().check()
        one_of("stem", self.stem, STEM_STRIDES)
        one_of("initialization", self.initialization, INITIALIZATIONS)
        if list(self.blocks) != [name for name in CHANNELS if name in self.blocks]:
            raise ValueError(
                f"blocks={self.blocks}: must be some of {', '.join(CHANNELS)}, in this order"
            )
        if not self.blocks:
            raise ValueError("blocks=(): must name one inception block or more")
        at_least(4, width=self.width)


googlenet_mini = functools.partial(GoogLeNet, blocks=("3a", "4a", "5a"), width=16, stem="small")
