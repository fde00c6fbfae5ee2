"""Convolutional networks in JAX and Flax linen: blocks, models and the step that trains them.

Importing this loads what needs jax, flax and optax only; data, checkpoints and commands load when
they are used.
"""

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

__version__ = "0.1.0"

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
