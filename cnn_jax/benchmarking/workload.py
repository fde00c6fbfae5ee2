"""What is measured: one network on one batch, the same for all who take part."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.models import ModernCNN, create_model, model_class

PEERS = ("linen", "torch", "torch-compile")
"""Who can stand beside `OURS`."""

OURS = "ours"

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.001, 0.9, 5e-4
"""Of SGD with Nesterov momentum; kernels alone decay."""

MEAN, STD = 0.5, 0.25
"""Of pixels scaled to [0, 1]: images become (pixels / 255 - MEAN) / STD."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and its batch.

    Attributes:
      model: its name in `cnn_jax.models.MODELS`.
      arguments: of the model.
      image_shape: height, width and channels.
      precision: of the computation, float32 or bfloat16; weights are float32.
      training: whether it is trained, or predicts only.
    """

    model: str
    arguments: Mapping[str, Any]
    num_classes: int
    image_shape: tuple[int, int, int]
    batch_size: int
    precision: str
    training: bool

    def make_model(self) -> Any:
        """Returns the linen module.

        The last norm of a residual block starts at 0, as peers' do: at random, a deep network's
        first steps are so ill-conditioned that float32 itself gives other losses after two.
        """
        arguments = dict(self.arguments)
        if self.training and model_class(self.model) is ModernCNN:
            arguments = {"zero_init_last": True, **arguments}
        dtype = jnp.dtype(self.precision)
        return create_model(self.model, num_classes=self.num_classes, dtype=dtype, **arguments)

    def make_batch(self) -> dict[str, np.ndarray]:
        """Returns `image` uint8 [b h w c] and `label` int32 [b], at random but always the same."""
        rng = np.random.default_rng(0)
        return {
            "image": rng.integers(0, 256, (self.batch_size, *self.image_shape), np.uint8),
            "label": rng.integers(0, self.num_classes, self.batch_size, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A residual network that the peers have too; the attributes are those of `ModernCNN`."""

    stage_sizes: tuple[int, ...]
    width: int
    stem: str
    block: str
    num_classes: int
    channels: int


def architecture(workload: Workload) -> Architecture:
    """Returns what the peers build.

    Raises UserError for a network that is not a plain residual one.
    """
    model = workload.make_model()
    refusal = UserError(
        f"--peer: {workload.model} with {dict(workload.arguments)} has no peer; must be a residual "
        "network with a large, medium or small stem and nothing else that is not the default"
    )
    if not isinstance(model, ModernCNN) or model.stem == "deep":
        raise refusal
    plain = ModernCNN(
        num_classes=model.num_classes,
        dtype=model.dtype,
        stage_sizes=model.stage_sizes,
        width=model.width,
        stem=model.stem,
        block=model.block,
        zero_init_last=model.zero_init_last,
        initialization=model.initialization,
    )
    if model != plain:
        raise refusal
    return Architecture(
        stage_sizes=tuple(model.stage_sizes),
        width=model.width,
        stem=model.stem,
        block=model.block,
        num_classes=workload.num_classes,
        channels=workload.image_shape[-1],
    )
