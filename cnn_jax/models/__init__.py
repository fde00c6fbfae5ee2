"""What is trained: pure linen modules, and the one table of their names."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from cnn_jax.errors import UserError, nearest
from cnn_jax.models import modern_cnn as residual
from cnn_jax.models.convnext import ConvNeXt, convnext_mini
from cnn_jax.models.googlenet import GoogLeNet, googlenet_mini
from cnn_jax.models.modern_cnn import ModernCNN

MODELS: dict[str, Callable[..., Any]] = {
    "modern_cnn": ModernCNN,
    "modern_cnn_literal": residual.modern_cnn_literal,
    "resnet18": residual.resnet18,
    "resnet34": residual.resnet34,
    "resnet50": residual.resnet50,
    "resnet101": residual.resnet101,
    "resnet152": residual.resnet152,
    "resnext50_32x4d": residual.resnext50_32x4d,
    "wide_resnet50_2": residual.wide_resnet50_2,
    "resnet50d": residual.resnet50d,
    "seresnet50": residual.seresnet50,
    "ecaresnet50": residual.ecaresnet50,
    "cbam_resnet50": residual.cbam_resnet50,
    "googlenet": GoogLeNet,
    "convnext_tiny": ConvNeXt,
    "resnet_mini": residual.resnet_mini,
    "bottleneck_mini": residual.bottleneck_mini,
    "resnext_mini": residual.resnext_mini,
    "seresnet_mini": residual.seresnet_mini,
    "ecaresnet_mini": residual.ecaresnet_mini,
    "cbam_resnet_mini": residual.cbam_resnet_mini,
    "googlenet_mini": googlenet_mini,
    "convnext_mini": convnext_mini,
}
"""Each model by name: a class, or a partial over one. The `_mini` ones are for images of 8 to 64
pixels, from 0.05 M parameters up; `width` and `stage_sizes` make them larger."""


def model_class(name: str) -> Any:
    """Returns the class of a model in `MODELS`, whose attributes are the model's arguments."""
    make: Any = MODELS[name]
    return make.func if isinstance(make, functools.partial) else make


def create_model(name: str, /, **overrides: Any) -> Any:
    """Returns the named model with its attributes overridden.

    Among them is flax's own `name`, of the module inside another. Raises UserError (a ValueError)
    for a name that is not in `MODELS` or an argument that the model does not have.
    """
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(
            f"model {name!r}: unknown{nearest(str(name), MODELS)}; "
            f"known: {', '.join(sorted(MODELS))}"
        )
    known = [
        field.name for field in dataclasses.fields(model_class(name)) if field.name != "parent"
    ]
    for argument in overrides:
        if argument not in known:
            raise UserError(
                f"{argument}: not an argument of model {name!r}{nearest(argument, known)}; "
                f"known: {', '.join(sorted(known))}"
            )
    return MODELS[name](**overrides)


__all__ = ["MODELS", "ConvNeXt", "GoogLeNet", "ModernCNN", "create_model", "model_class"]
