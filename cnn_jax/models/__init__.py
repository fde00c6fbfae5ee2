"""What is trained: pure linen modules, and the one table of their names."""

from typing import Any

import flax.linen as nn

from cnn_jax.errors import UserError, nearest
from cnn_jax.models.modern_cnn import ModernCNN

MODELS: dict[str, type[nn.Module]] = {"modern_cnn": ModernCNN}


def create_model(name: str, **overrides: Any) -> Any:
    """Returns the named model with its attributes overridden.

    Raises UserError (a ValueError) for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        raise UserError(
            f"model {name!r}: unknown{nearest(name, MODELS)}; known: {', '.join(sorted(MODELS))}"
        )
    return MODELS[name](**overrides)
