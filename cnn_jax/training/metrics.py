"""Masked sums over a batch, divided once at the end."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from cnn_jax.typing import Labels, Logits, Metrics, PerExample


def metric_sums(logits: Logits, labels: Labels, losses: PerExample, mask: PerExample) -> Metrics:
    """Returns the sums of `loss` and of `accuracy` (1 where right) over `count` real examples."""
    right = jnp.argmax(logits, axis=-1) == labels
    return {
        "loss": jnp.sum(jnp.where(mask > 0, losses, 0.0)),
        "accuracy": jnp.sum(right * mask),
        "count": jnp.sum(mask),
    }


def mean(sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean `loss` and `accuracy` over all examples of the batches."""
    count = sum(float(batch["count"]) for batch in sums)
    return {
        name: sum(float(batch[name]) for batch in sums) / count for name in ("loss", "accuracy")
    }
