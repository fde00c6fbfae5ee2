"""Masked sums over a batch, divided once at the end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.typing import Logits, Metrics, PerExample, Targets


def metric_sums(logits: Logits, labels: Targets, losses: PerExample, mask: PerExample) -> Metrics:
    """Returns the sums of `loss` and of `accuracy` (1 where right) over `count` real examples.

    Of shares the largest is right. A `mask` between 0 and 1 weighs an example. Raises ValueError
    where the losses are not one for each.
    """
    if losses.shape != mask.shape:
        raise ValueError(
            f"the loss must return one number for each example, {mask.shape}, and returns "
            f"{losses.shape}; their mean is taken where the gradient is"
        )
    classes = jnp.argmax(labels, axis=-1) if labels.ndim == logits.ndim else labels
    right = jnp.argmax(logits, axis=-1) == classes
    return {
        "loss": jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)),
        "accuracy": jnp.sum(right * mask),
        "count": jnp.sum(mask),
    }


def global_norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares, in float32 at least.

    Each array is summed beside whatever else reads it, and the rest of the sum is one for all: a
    sum of its own for each of 161 arrays costs as many kernels again. On a TPU what is left of an
    array is a number; elsewhere, where a sum to the end takes two kernels, it is a row.
    """

    def summed(part: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
        def total(*leaves: jax.Array) -> jax.Array:
            exact = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
            parts = [part(jnp.square(leaf)).ravel() for leaf in exact]
            return jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(parts)))

        return total

    def rows(square: jax.Array) -> jax.Array:
        return jnp.sum(square, axis=-1) if square.ndim > 1 else square

    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(jax.lax.platform_dependent(*leaves, tpu=summed(jnp.sum), default=summed(rows)))


def mean(sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean `loss` and `accuracy` over all examples of the batches."""
    count = sum(float(batch["count"]) for batch in sums)
    return {
        name: sum(float(batch[name]) for batch in sums) / count for name in ("loss", "accuracy")
    }
