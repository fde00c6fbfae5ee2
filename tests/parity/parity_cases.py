"""What is compared: every family of models and every block, small, in Flax and in PyTorch.

A case makes the same network twice. Its numbers are drawn from seeded generators by the names that
the tensors have in a state dict, so that neither side needs the other. PyTorch is imported only
where a case makes its PyTorch side.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.models import create_model
from cnn_jax.models import pooling as flax_pools
from cnn_jax.models.attention import CBAM, EfficientChannelAttention, SqueezeExcite
from cnn_jax.models.blocks import (
    BottleneckBlock,
    ConvNeXtBlock,
    InceptionBlock,
    ResidualBlock,
    average_projection,
    projection,
)
from cnn_jax.models.classifier import Head
from cnn_jax.models.layers import ConvBlock
from cnn_jax.models.normalization import NORMS
from cnn_jax.models.torch_weights import from_torch, to_torch

NUM_CLASSES = 7
STEPS = 5
RATES = (0.004, 0.01, 0.008, 0.002, 0.006)
"""Learning rates; optax's schedules are float32 in any precision, so these stand for one."""
MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING = 0.9, 5e-3, 0.1
CONVENTIONS = ("batch", "batch_unbiased")
"""Of the running variance: Flax's and PyTorch's."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on both sides.

    Attributes:
      flax: makes the linen module; called with the name of a norm where `norm` is "batch".
      torch: the same for PyTorch, called with the module `torch_models` before it.
      shape: of the images, [batch, height, width, channels].
      norm: "batch" if the network has BatchNorm, and so both conventions, else another name.
      part: where `torch_weights` expects the block of a `OneBlock`.
      average_downsample: as in `to_torch`.
      idle_biases: whether convolutions before BatchNorm have biases, whose gradient is 0.
      seed: of all random numbers.
      chaotic: why gradients and steps of training are not compared, and in float32 nothing but
        evaluation, if so.
    """

    flax: Callable[[str], nn.Module]
    torch: Callable[[Any, str], Any]
    shape: tuple[int, int, int, int] = (8, 33, 38, 3)
    norm: str = "batch"
    part: tuple[str, ...] = ()
    average_downsample: bool = False
    idle_biases: bool = False
    seed: int = 0
    chaotic: str = ""

    @property
    def conventions(self) -> tuple[str, ...]:
        return CONVENTIONS if self.norm == "batch" else (self.norm,)

    @functools.cached_property
    def abstract(self) -> Any:
        """The shapes of the Flax variables."""
        model = self.flax(self.norm)
        images = jnp.zeros(self.shape)
        return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    def to_torch(self, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Variables of this case's model, or gradients, as a state dict without counters."""
        moved = {}
        for path, leaf in flatten_dict(variables).items():
            collection, *module = path
            if self.part and module[0] == "part":
                module = [*self.part, *module[1:]]
            moved[(collection, *module)] = leaf
        tensors = to_torch(unflatten_dict(moved), average_downsample=self.average_downsample)
        return {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}

    def from_torch(self, tensors: Mapping[str, np.ndarray]) -> Any:
        """A state dict as variables of this case's model."""
        if not self.part:
            return from_torch(tensors, self.abstract)
        there, depth = {}, len(self.part)
        for path, leaf in flatten_dict(self.abstract).items():
            collection, *module = path
            module = [*self.part, *module[1:]] if module[0] == "part" else module
            there[(collection, *module)] = leaf
        found = flatten_dict(from_torch(tensors, unflatten_dict(there)))
        back = {}
        for (collection, *module), leaf in found.items():
            module = ["part", *module[depth:]] if tuple(module[:depth]) == self.part else module
            back[(collection, *module)] = leaf
        return unflatten_dict(back)

    def draw_tensors(self) -> dict[str, np.ndarray]:
        """Random weights and running statistics in float64, none 0, 1 or symmetric by accident."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), self.abstract)
        return {name: self._draw(name, x.shape) for name, x in self.to_torch(zeros).items()}

    def draw_batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images (NHWC, float64) and labels, a pair for each step of training."""
        rng = np.random.RandomState(self.seed)
        return [
            (
                rng.standard_normal(self.shape) + 0.3,
                rng.randint(NUM_CLASSES, size=self.shape[0]).astype(np.int32),
            )
            for _ in range(STEPS)
        ]

    def _draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        # RandomState: NumPy promises that its numbers never change.
        rng = np.random.RandomState([self.seed, zlib.crc32(name.encode())])
        if name.endswith(".p"):
            return rng.uniform(2.0, 3.0, size=shape)
        if name.endswith(("running_mean", "bias")):
            return rng.standard_normal(shape) / 2
        if len(shape) == 1 or name.endswith(("running_var", "layer_scale")):
            return rng.uniform(0.5, 1.5, size=shape)
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


class OneBlock(nn.Module):
    """A block alone and a head, so that it is compared as the models are.

    Attributes:
      part: makes the block, called with `name=`.
      pool: of the head.
    """

    part: Callable[..., Any]
    pool: str = "average"

    def setup(self):
        self.head = Head(NUM_CLASSES, self.pool)

    @nn.compact
    def stages(self, images, *, train):
        return [self.part(name="part")(images, train=train)]

    def __call__(self, images, *, train):
        return self.head(self.stages(images, train=train)[-1], train=train)


def model(
    name: str,
    oracle: str,
    *,
    only_flax: Mapping[str, Any] | None = None,
    only_torch: Mapping[str, Any] | None = None,
    shape: tuple[int, int, int, int] = (8, 33, 38, 3),
    norm: str = "batch",
    average_downsample: bool = False,
    idle_biases: bool = False,
    chaotic: str = "",
    **both: Any,
) -> Case:
    """A model of `cnn_jax.models.MODELS` beside a class of `torch_models`.

    What the model's name says already must be said to PyTorch: `only_torch`.
    """
    both["num_classes"] = NUM_CLASSES

    def make_flax(norm: str) -> nn.Module:
        return create_model(name, norm=norm, **both, **(only_flax or {}))

    def make_torch(torch_models: Any, norm: str) -> Any:
        make = getattr(torch_models, oracle)
        return make(channels=shape[-1], norm=norm, **both, **(only_torch or {}))

    return Case(
        make_flax,
        make_torch,
        shape,
        norm,
        average_downsample=average_downsample,
        idle_biases=idle_biases,
        chaotic=chaotic,
    )


def block(
    make_flax: Callable[[Any], Callable[..., Any]],
    make_torch: Callable[[Any, str], Any],
    *,
    part: str,
    path: str,
    channels: int,
    inputs: int = 6,
    size: tuple[int, int] = (11, 14),
    norm: str = "batch",
    head: str = "fc",
    pool: str = "generalized_mean",
    average_downsample: bool = False,
    idle_biases: bool = False,
) -> Case:
    """A block from `inputs` to `channels`, named `path` in PyTorch and `part` in Flax.

    `make_flax` is called with the norm itself, `make_torch` with its name. The gradient that
    comes from a generalised mean is not constant over the pixels, which BatchNorm would cancel.
    """

    def whole_torch(torch_models: Any, norm: str) -> Any:
        return torch_models.OneBlock(
            path,
            make_torch(torch_models, norm),
            channels=channels,
            num_classes=NUM_CLASSES,
            head=head,
            pool=pool,
        )

    return Case(
        lambda norm: OneBlock(make_flax(NORMS[norm]), pool),
        whole_torch,
        (8, *size, inputs),
        norm,
        tuple(part.split("/")),
        average_downsample,
        idle_biases,
    )


def residual(
    make: Callable[..., Any],
    features: int,
    outputs: int,
    arguments: Mapping[str, Any],
    oracle: Mapping[str, Any],
    **case: Any,
) -> Case:
    """A residual block with or without a projection."""
    strides, inputs = arguments.get("strides", 1), case.get("inputs", 6)
    average = case.get("average_downsample", False)

    def make_flax(norm: Any) -> Callable[..., Any]:
        downsample = None
        if strides > 1 or inputs != outputs:
            downsample = functools.partial(
                average_projection if average else projection,
                outputs,
                strides=strides,
                norm=norm,
                use_bias=arguments["use_bias"],
            )
        return functools.partial(make, features, downsample=downsample, norm=norm, **arguments)

    def make_torch(torch_models: Any, norm: str) -> Any:
        return torch_models.ResidualBlock(
            inputs,
            features,
            norm=norm,
            stride=strides,
            use_bias=arguments["use_bias"],
            average_downsample=average,
            **oracle,
        )

    return block(
        make_flax, make_torch, part="stage1_block1", path="layer1.0", channels=outputs, **case
    )


def attention(make: Callable[..., Any], oracle: str) -> Case:
    """An attention on 32 channels."""
    return block(
        lambda norm: functools.partial(make, norm=norm),
        lambda torch_models, norm: torch_models.attention_layer(
            oracle, 32, functools.partial(torch_models.norm_layer, norm)
        ),
        part="stage1_block1/attention",
        path="layer1.0.se",
        channels=32,
        inputs=32,
        size=(9, 8),
        norm="batch" if oracle == "cbam" else "none",
    )


def pool(flax_pool: str, torch_pool: str, arguments: dict, oracle: dict, **case: Any) -> Case:
    """A function without parameters: its gradient is that of the images."""
    apply = functools.partial(getattr(flax_pools, flax_pool), **arguments)

    def make_torch(torch_models: Any, norm: str) -> Any:
        return getattr(torch_models, torch_pool)(**oracle)

    return block(
        lambda norm: lambda name: lambda x, train: apply(x),
        make_torch,
        part="stage1_block1",
        path="layer1.0",
        channels=6,
        norm="none",
        **case,
    )


def identity(pool: str) -> Case:
    """A global pool alone."""
    return block(
        lambda norm: lambda name: lambda x, train: x,
        lambda torch_models, norm: torch_models.nn.Identity(),
        part="stage1_block1",
        path="layer1.0",
        channels=6,
        norm="none",
        pool=pool,
    )


SMALL = {"stage_sizes": (1, 1), "width": 8}

MODELS = {
    "modern_cnn": model("modern_cnn", "ResNet", stage_sizes=(1, 2, 1), width=8),
    "modern_cnn_literal": model(
        "modern_cnn_literal",
        "ResNet",
        only_torch={"variant": "literal"},
        idle_biases=True,
        **SMALL,
    ),
    "resnet18": model(
        "resnet18", "ResNet", only_torch={"block": "residual"}, stage_sizes=(2, 1), width=8
    ),
    "resnext50_32x4d": model(
        "resnext50_32x4d",
        "ResNet",
        groups=4,
        width_per_group=32,
        **SMALL,
    ),
    "wide_resnet50_2": model(
        "wide_resnet50_2", "ResNet", only_torch={"width_per_group": 128}, **SMALL
    ),
    "resnet50d": model(
        "resnet50d",
        "ResNet",
        only_torch={"stem": "deep", "downsample": "average"},
        average_downsample=True,
        **SMALL,
    ),
    "seresnet50": model(
        "seresnet50", "ResNet", only_torch={"attention": "squeeze_excite"}, **SMALL
    ),
    "ecaresnet50": model(
        "ecaresnet50", "ResNet", only_torch={"attention": "efficient_channel"}, **SMALL
    ),
    "cbam_resnet50": model("cbam_resnet50", "ResNet", only_torch={"attention": "cbam"}, **SMALL),
    "resnet50, anti-aliased": model("resnet50", "ResNet", anti_alias=True, **SMALL),
    "resnet50, GroupNorm": model(
        "resnet50", "ResNet", norm="group", width=16, stage_sizes=(1, 1), shape=(4, 33, 38, 3)
    ),
    "resnet50, no norm": model("resnet50", "ResNet", norm="none", **SMALL),
    "resnet_mini": model(
        "resnet_mini",
        "ResNet",
        only_torch={"block": "residual", "stem": "small"},
        stage_sizes=(1, 1, 1),
        width=8,
        pool="max",
        shape=(8, 13, 12, 1),
    ),
    "bottleneck_mini": model(
        "bottleneck_mini",
        "ResNet",
        stem="medium",
        stage_sizes=(1, 2),
        width=8,
        pool="generalized_mean",
        shape=(8, 13, 12, 1),
    ),
    "googlenet": model(
        "googlenet",
        "GoogLeNet",
        only_flax={"dropout_rate": 0.0},
        blocks=("3a", "5a"),
        width=8,
        shape=(4, 49, 38, 3),
    ),
    "googlenet, all nine blocks": model(
        "googlenet",
        "GoogLeNet",
        only_flax={"dropout_rate": 0.0},
        width=8,
        chaotic="five steps through 19 BatchNorms in a row amplify rounding to more than 0.1: so "
        "far does PyTorch's own float32 stray from its float64, at any seed",
    ),
    "googlenet_mini": model(
        "googlenet_mini",
        "GoogLeNet",
        only_flax={"dropout_rate": 0.0},
        only_torch={"stem": "small", "blocks": ("3a", "4a", "5a")},
        width=8,
        shape=(8, 13, 12, 1),
    ),
    "convnext_tiny": model(
        "convnext_tiny",
        "ConvNeXt",
        only_flax={"stochastic_depth_rate": 0.0},
        norm="layer",
        stage_sizes=(1, 2),
        width=8,
    ),
    "convnext_mini": model(
        "convnext_mini",
        "ConvNeXt",
        only_flax={"stochastic_depth_rate": 0.0},
        only_torch={"stem": "small"},
        norm="layer",
        stage_sizes=(1, 1),
        width=8,
        shape=(4, 13, 12, 1),
    ),
}
"""By the family's name in the public table of models; every other model is one of these, larger."""

INCEPTION = (8, 6, 8, 4, 6, 5)

BLOCKS = {
    "ConvBlock": block(
        lambda norm: functools.partial(ConvBlock, 8, 5, strides=2, padding=2, norm=norm),
        lambda torch_models, norm: torch_models.ConvNorm(
            6,
            8,
            5,
            stride=2,
            bias=True,
            norm=functools.partial(torch_models.norm_layer, norm),
        ),
        part="conv1",
        path="conv1",
        channels=8,
        idle_biases=True,
    ),
    "ResidualBlock, as printed": residual(
        ResidualBlock,
        8,
        8,
        {"strides": 2, "relu_before_add": True, "use_bias": True},
        {"block": "residual", "relu_before_add": True},
        idle_biases=True,
    ),
    "ResidualBlock, basic": residual(
        ResidualBlock,
        6,
        6,
        {"relu_before_add": False, "use_bias": False},
        {"block": "residual"},
    ),
    "BottleneckBlock": residual(
        BottleneckBlock, 4, 16, {"use_bias": False}, {"block": "bottleneck"}, inputs=16
    ),
    "BottleneckBlock, strided, grouped": residual(
        BottleneckBlock,
        8,
        32,
        {"strides": 2, "use_bias": False, "groups": 2, "width_per_group": 32},
        {"block": "bottleneck", "groups": 2, "width_per_group": 32},
    ),
    "BottleneckBlock, averaged shortcut": residual(
        BottleneckBlock,
        8,
        32,
        {"strides": 2, "use_bias": False},
        {"block": "bottleneck"},
        average_downsample=True,
    ),
    "BottleneckBlock, anti-aliased": residual(
        BottleneckBlock,
        8,
        32,
        {"strides": 2, "use_bias": False, "anti_alias": True},
        {"block": "bottleneck", "anti_alias": True},
    ),
    "InceptionBlock, 5x5": block(
        lambda norm: functools.partial(InceptionBlock, *INCEPTION, norm=norm),
        lambda torch_models, norm: torch_models.Inception(
            6,
            *INCEPTION,
            large_kernel_size=5,
            norm=functools.partial(torch_models.norm_layer, norm),
        ),
        part="inception3a",
        path="inception3a",
        channels=27,
    ),
    "ConvNeXtBlock": block(
        lambda norm: functools.partial(ConvNeXtBlock, 6, norm=norm),
        lambda torch_models, norm: torch_models.ConvNeXtBlock(6, norm=norm),
        part="stage1_block1",
        path="features.1.0",
        channels=6,
        norm="layer",
        head="classifier.2",
        pool="average",
    ),
    "SqueezeExcite": attention(SqueezeExcite, "squeeze_excite"),
    "EfficientChannelAttention": attention(EfficientChannelAttention, "efficient_channel"),
    "CBAM": attention(CBAM, "cbam"),
    "max_pool": pool(
        "max_pool",
        "MaxPool",
        {"window": 3, "strides": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "max_pool, ceil_mode": pool(
        "max_pool",
        "MaxPool",
        {"window": 2, "strides": 3, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    ),
    "average_pool": pool(
        "average_pool",
        "AveragePool",
        {"window": 3, "strides": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "average_pool, ceil_mode": pool(
        "average_pool",
        "AveragePool",
        {"window": 3, "strides": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        size=(10, 13),
    ),
    "average_pool, edges not counted": pool(
        "average_pool",
        "AveragePool",
        {
            "window": 3,
            "strides": 2,
            "padding": 1,
            "ceil_mode": True,
            "count_include_pad": False,
        },
        {
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "ceil_mode": True,
            "count_include_pad": False,
        },
        size=(10, 13),
    ),
    "blur_pool": pool("blur_pool", "BlurPool", {}, {}),
    "blur_pool of 5 by 3": pool(
        "blur_pool",
        "BlurPool",
        {"strides": 3, "kernel_size": 5},
        {"stride": 3, "kernel_size": 5},
    ),
    "global_average_pool": identity("average"),
    "global_max_pool": identity("max"),
    "GeneralizedMeanPool": identity("generalized_mean"),
}

SEEDS = {
    "modern_cnn_literal": 5,
    "resnet18": 7,
    "resnext50_32x4d": 5,
    "wide_resnet50_2": 6,
    "resnet50d": 11,
    "seresnet50": 2,
    "ecaresnet50": 6,
    "cbam_resnet50": 8,
    "resnet50, anti-aliased": 2,
    "resnet50, no norm": 2,
    "resnet_mini": 3,
    "bottleneck_mini": 10,
    "googlenet": 12,
    "googlenet, all nine blocks": 3,
    "googlenet_mini": 10,
    "convnext_tiny": 1,
    "convnext_mini": 2,
    "ConvBlock": 6,
    "ResidualBlock, as printed": 5,
    "ResidualBlock, basic": 3,
    "BottleneckBlock": 1,
    "BottleneckBlock, strided, grouped": 8,
    "BottleneckBlock, averaged shortcut": 3,
    "InceptionBlock, 5x5": 1,
    "ConvNeXtBlock": 2,
    "SqueezeExcite": 2,
    "EfficientChannelAttention": 5,
    "CBAM": 1,
    "max_pool": 4,
    "max_pool, ceil_mode": 8,
    "average_pool": 4,
    "average_pool, edges not counted": 11,
    "blur_pool": 4,
    "blur_pool of 5 by 3": 11,
    "global_average_pool": 7,
    "global_max_pool": 5,
    "modern_cnn": 6,
    "resnet50, GroupNorm": 9,
}
"""By `choose_seeds.py`; 0 where nothing stands."""

CASES = {
    name: dataclasses.replace(case, seed=SEEDS.get(name, 0))
    for name, case in (MODELS | BLOCKS).items()
}
