"""Convolutional networks in JAX and Flax linen: blocks, models and the step that trains them.

Importing this loads what needs jax, flax and optax only; data, checkpoints and commands load when
they are used.
"""

from cnn_jax.models import MODELS, create_model
from cnn_jax.models.blocks import BottleneckBlock, ResidualBlock, projection
from cnn_jax.models.layers import ConvBlock
from cnn_jax.models.modern_cnn import ModernCNN
from cnn_jax.training.state import TrainState, init_state
from cnn_jax.training.steps import make_eval_step, make_train_step

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "BottleneckBlock",
    "ConvBlock",
    "ModernCNN",
    "ResidualBlock",
    "TrainState",
    "create_model",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "projection",
]
