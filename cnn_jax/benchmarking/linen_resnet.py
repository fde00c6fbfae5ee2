"""Residual networks as one writes them in flax.linen without this package: a peer.

In the manner of Flax's own ImageNet example
(https://github.com/google/flax/tree/main/examples/imagenet): layers of `flax.linen`, computation in
`dtype` with float32 parameters.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.benchmarking.workload import Architecture


class Block(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, or two of 3x3, and a shortcut; the stride is on a 3x3."""

    features: int
    strides: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs, last = self.features, (3, 3)
        if self.bottleneck:
            outputs, last = 4 * self.features, (1, 1)
            y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
            y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        else:
            y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(outputs, last)(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(outputs, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class PlainResNet(nn.Module):
    """Returns logits of normalised images; by default those of ResNet-50.

    With `symmetric_padding`, strided layers pad as PyTorch's do instead of "SAME".
    """

    num_classes: int = 1000
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "large"
    bottleneck: bool = True
    symmetric_padding: bool = False
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def conv(features: int, window: tuple[int, int], strides: Any = 1) -> nn.Conv:
            padding = [(size // 2, size // 2) for size in window]
            return nn.Conv(
                features,
                window,
                strides,
                padding=padding if self.symmetric_padding else "SAME",
                use_bias=False,
                dtype=self.dtype,
            )

        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        window, strides = {"large": (7, 2), "medium": (3, 2), "small": (3, 1)}[self.stem]
        x = nn.relu(norm()(conv(self.width, (window, window), (strides, strides))(x)))
        if self.stem == "large":
            padding: Any = [(1, 1), (1, 1)] if self.symmetric_padding else "SAME"
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, strides, self.bottleneck, conv, norm)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))


def plain_network(of: Architecture, dtype: Any) -> PlainResNet:
    """Returns the network that is to equal a `ModernCNN` of that architecture."""
    return PlainResNet(
        num_classes=of.num_classes,
        stage_sizes=of.stage_sizes,
        width=of.width,
        stem=of.stem,
        bottleneck=of.block == "bottleneck",
        symmetric_padding=True,
        dtype=dtype,
    )


def plain_variables(variables: Mapping[str, Any], stage_sizes: Sequence[int]) -> dict[str, Any]:
    """Returns the variables of a `ModernCNN` under the names that they have in a `PlainResNet`."""
    names = [
        f"stage{stage + 1}_block{index + 1}"
        for stage, blocks in enumerate(stage_sizes)
        for index in range(blocks)
    ]
    leaves: Any = flatten_dict(variables)
    convolutions = 3 if ("params", names[0], "conv3", "conv", "kernel") in leaves else 2

    def renamed(path: tuple[str, ...]) -> tuple[str, ...]:
        collection, module, *inner, leaf = path
        if module == "head":
            return (collection, "Dense_0", leaf)
        if module == "stem":
            return (collection, {"conv": "Conv_0", "norm": "BatchNorm_0"}[inner[0]], leaf)
        part, kind = inner
        number = convolutions if part == "downsample" else int(part.removeprefix("conv")) - 1
        layer = {"conv": "Conv", "norm": "BatchNorm"}[kind]
        return (collection, f"Block_{names.index(module)}", f"{layer}_{number}", leaf)

    return unflatten_dict({renamed(path): leaf for path, leaf in leaves.items()})
