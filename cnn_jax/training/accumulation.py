"""Gradients of a batch that is too large for the memory, from its micro-batches in turn."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from cnn_jax.typing import Batch, Metrics

Gradients: TypeAlias = Callable[[Any, Any, Batch, jax.Array], tuple[Any, Any, Metrics]]
"""`gradients(params, batch_stats, batch, key) -> (gradients, batch_stats, metric sums)`."""


def accumulate(gradients: Gradients, steps: int) -> Gradients:
    """Returns the same of a whole batch, by way of `steps` micro-batches of equal size.

    Gradients are averaged in float32, metrics summed. The running statistics move once a
    micro-batch, each from where the one before has left them. Number i of the micro-batches draws
    from `fold_in(key, i)`.

    Micro-batch i holds the examples i, i + steps, i + 2 steps, ...: every device has an equal share
    of them in its own part of the batch, so none travels, and which they are depends on no device.

    Raises ValueError for less than one; so does the function that is returned, for a batch that
    does not divide.
    """
    if steps < 1:
        raise ValueError(f"accumulate_steps={steps}: must be >= 1")
    if steps == 1:
        return gradients

    def accumulated(
        params: Any, batch_stats: Any, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, Metrics]:
        size = len(batch["label"])
        if size % steps:
            raise ValueError(f"accumulate_steps={steps}: must divide the {size} images of a batch")

        def micro_batches(array: jax.Array) -> jax.Array:
            return jnp.swapaxes(array.reshape(size // steps, steps, *array.shape[1:]), 0, 1)

        def add(carry: tuple[Any, Any, Metrics], each: tuple[jax.Array, Batch]) -> Any:
            total, batch_stats, sums = carry
            number, batch = each
            found, batch_stats, more = gradients(
                params, batch_stats, batch, jax.random.fold_in(key, number)
            )
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, found)
            return (total, batch_stats, jax.tree.map(jnp.add, sums, more)), None

        def zeros(array: Any) -> jax.Array:
            return jnp.zeros(array.shape, jnp.promote_types(array.dtype, jnp.float32))

        micro = jax.tree.map(micro_batches, batch)
        _, _, sums = jax.eval_shape(
            gradients, params, batch_stats, jax.tree.map(lambda array: array[0], micro), key
        )
        start = (jax.tree.map(zeros, params), batch_stats, jax.tree.map(zeros, sums))
        (total, batch_stats, sums), _ = jax.lax.scan(add, start, (jnp.arange(steps), micro))
        return jax.tree.map(lambda t: t / steps, total), batch_stats, sums

    return accumulated
