"""What is minimised."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from cnn_jax.typing import Labels, Logits, PerExample

Loss: TypeAlias = Callable[[Logits, Labels], PerExample]


def cross_entropy(logits: Logits, labels: Labels, *, label_smoothing: float = 0.0) -> PerExample:
    """Returns `-sum_k q_k log softmax(logits)_k` for each example, in nats.

    `q` is `1 - label_smoothing` on the label plus `label_smoothing / K` on each of the K classes
    (Szegedy et al. 2015, arXiv:1512.00567), torch's `CrossEntropyLoss(label_smoothing=...)`. In
    float32 at least.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
