"""Steps on examples that lie on the device: gathered, augmented and trained in one program."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.training.state import TrainState
from cnn_jax.training.steps import TrainStep
from cnn_jax.typing import Batch, Metrics


def resident(single: TrainStep, *, steps_per_call: int = 1) -> TrainStep:
    """Returns a step that takes its examples from `images` and `labels` in the batch, all of them.

    `index` and `epoch`, int32 [b], say which make the batch of `single`. With more than one of
    `steps_per_call` they are [steps_per_call, b], of steps in turn; `count`, a scalar of the batch,
    says how many of them are taken, so that one program serves calls of every length. The metric
    sums then have a row for each step, zeros behind the last.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        if steps_per_call == 1:
            return single(state, gathered(batch), key)
        one = jax.jit(single, inline=True)  # traced once, for the shapes and for the loop
        _, sums = jax.eval_shape(one, state, jax.eval_shape(gathered, batch), key)
        rows = jax.tree.map(lambda each: jnp.zeros((steps_per_call, *each.shape), each.dtype), sums)

        def take(
            number: jax.Array, carry: tuple[TrainState, Metrics]
        ) -> tuple[TrainState, Metrics]:
            state, rows = carry
            state, sums = one(state, gathered(batch, number), key)
            return state, jax.tree.map(lambda row, each: row.at[number].set(each), rows, sums)

        return jax.lax.fori_loop(0, batch["count"], take, (state, rows))

    return step


def gathered(batch: Batch, number: jax.Array | int = 0) -> Batch:
    """Returns the batch of one step, of those that `index` and `epoch` name."""
    index, epoch = batch["index"], batch["epoch"]
    if index.ndim == 2:
        index, epoch = index[number], epoch[number]
    return {
        "image": batch["images"][index],
        "label": batch["labels"][index],
        "index": index,
        "epoch": epoch,
    }


def rows_of(sums: Mapping[str, np.ndarray], count: int) -> list[Mapping[str, np.ndarray]]:
    """Returns the metric sums of each of the `count` steps that a call took, on the host."""
    if sums["count"].ndim == 0:
        return [sums]
    return [{name: np.asarray(values[i]) for name, values in sums.items()} for i in range(count)]
