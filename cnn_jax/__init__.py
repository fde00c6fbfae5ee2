"""Convolutional networks in JAX and Flax linen: blocks, models and the step that trains them.

Importing this loads what needs jax, flax and optax only; data, checkpoints and commands load when
they are used: `evaluate`, `predict`, `inspect`, `plot`, `export`, `serve` and `features`, which do
what the commands of these names do.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cnn_jax.models import MODELS, ConvNeXt, GoogLeNet, ModernCNN, create_model
from cnn_jax.models.attention import CBAM, EfficientChannelAttention, SqueezeExcite
from cnn_jax.models.blocks import (
    BottleneckBlock,
    ConvNeXtBlock,
    InceptionBlock,
    ResidualBlock,
    StochasticDepth,
    projection,
)
from cnn_jax.models.layers import ConvBlock
from cnn_jax.training.freezing import freeze_updates, train_only
from cnn_jax.training.state import TrainState, init_state
from cnn_jax.training.steps import make_eval_step, make_predict_step, make_train_step

if TYPE_CHECKING:
    from cnn_jax.commands.evaluate import evaluate as evaluate
    from cnn_jax.commands.export import export as export
    from cnn_jax.commands.features import features as features
    from cnn_jax.commands.inspect import inspect as inspect
    from cnn_jax.commands.plot import plot as plot
    from cnn_jax.commands.predict import predict as predict
    from cnn_jax.commands.serve import serve as serve

__version__ = "0.1.0"

_COMMANDS = ("evaluate", "export", "features", "inspect", "plot", "predict", "serve")
"""What is imported when it is used."""

__all__ = [
    "CBAM",
    "MODELS",
    "BottleneckBlock",
    "ConvBlock",
    "ConvNeXt",
    "ConvNeXtBlock",
    "EfficientChannelAttention",
    "GoogLeNet",
    "InceptionBlock",
    "ModernCNN",
    "ResidualBlock",
    "SqueezeExcite",
    "StochasticDepth",
    "TrainState",
    "create_model",
    "freeze_updates",
    "init_state",
    "make_eval_step",
    "make_predict_step",
    "make_train_step",
    "projection",
    "train_only",
]


def __getattr__(name: str) -> Any:
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.commands.{name}"))[name]


def __dir__() -> list[str]:
    return [*globals(), *_COMMANDS]
