"""A moving average of what training changes: parameters and BatchNorm's statistics."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from cnn_jax.training.state import TrainState

Average: TypeAlias = Callable[[TrainState], TrainState]
"""`average(state)` returns the state that a step has made with its averages brought up to date."""


def moving_average(decay: float) -> Average:
    """Returns `average(state)`: every average becomes `d average + (1 - d) value`.

    `d` is `decay`, less at the beginning: `min(decay, (1 + step) / (10 + step))` after `step`
    steps, so that the first weights are forgotten soon (TensorFlow's `ExponentialMovingAverage`
    with `num_updates`). Raises ValueError for a state without averages.
    """

    def average(state: TrainState) -> TrainState:
        if not state.ema:
            raise ValueError("the state has no moving averages: make it by init_state(ema=True)")
        rest = 1 - jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        values = {"params": state.params, "batch_stats": state.batch_stats}
        averages = jax.tree.map(lambda old, new: old + rest * (new - old), state.ema, values)
        return dataclasses.replace(state, ema=averages)

    return average
