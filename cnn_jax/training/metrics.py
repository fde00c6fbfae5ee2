"""Masked sums over a batch, divided once at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
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


def global_norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares, in float32 at least.

    Each array is summed along its last axis only, beside whatever else reads it; the rest of the
    sum is one for all. A sum of its own for each of 161 arrays costs as many kernels again.
    """
    squares = [
        jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
        for leaf in jax.tree.leaves(tree)
    ]
    rows = [jnp.sum(each, axis=-1).ravel() if each.ndim > 1 else each.ravel() for each in squares]
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def mean(sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean `loss` and `accuracy` over all examples of the batches."""
    count = sum(float(batch["count"]) for batch in sums)
    return {
        name: sum(float(batch[name]) for batch in sums) / count for name in ("loss", "accuracy")
    }
