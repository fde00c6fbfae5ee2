"""What is minimised."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from cnn_jax.typing import Logits, PerClass, PerExample, Targets

Loss: TypeAlias = Callable[[Logits, Targets], PerExample]


def cross_entropy(logits: Logits, labels: Targets, *, label_smoothing: float = 0.0) -> PerExample:
    """Returns `-sum_k q_k log softmax(logits)_k` for each example, in nats.

    `q` is `1 - label_smoothing` on the label plus `label_smoothing / K` on each of the K classes
    (Szegedy et al. 2015, arXiv:1512.00567), torch's `CrossEntropyLoss(label_smoothing=...)`; of
    shares of classes likewise. In float32 at least.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = _shares(labels, logits)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def binary_cross_entropy(
    logits: Logits,
    labels: Targets,
    *,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> PerExample:
    """Returns the mean over classes of `-q log p - (1 - q) log (1 - p)` in nats, p the sigmoid.

    torch's `BCEWithLogitsLoss`: each class is a question of its own, and an image that is mixed of
    two may be both (Wightman et al. 2021, "ResNet strikes back", arXiv:2110.00476). `q` is smoothed
    as in `cross_entropy`; with a `threshold` it is 1 where it is larger and 0 elsewhere. In float32
    at least.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(_shares(labels, logits), label_smoothing)
    if threshold is not None:
        targets = (targets > threshold).astype(logits.dtype)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def _shares(labels: Targets, logits: Logits) -> PerClass:
    if labels.ndim == 2:
        return jnp.asarray(labels, logits.dtype)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}
