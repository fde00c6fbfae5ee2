"""Evaluation of an image and its mirror image together."""

from typing import Any

from cnn_jax.typing import FeatureMap, Logits


class FlipAveraged:
    """A trained module whose logits are the mean of those of an image and of its mirror image."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def apply(self, variables: Any, images: FeatureMap, *, train: bool) -> Logits:
        """Returns the logits [b k] that a linen module's `apply` would."""
        there, back = (
            self._model.apply(variables, each, train=train) for each in (images, images[:, :, ::-1])
        )
        return (there + back) / 2
