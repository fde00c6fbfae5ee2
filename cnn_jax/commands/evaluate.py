"""Evaluation: every example once."""

import contextlib
from collections.abc import Callable

import jax

from cnn_jax.data.pipeline import eval_batches
from cnn_jax.data.sources import Source
from cnn_jax.plan import Plan
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.training.metrics import mean
from cnn_jax.training.state import TrainState
from cnn_jax.typing import Metrics

STEPS_IN_FLIGHT = 2
"""Steps that may wait on the device: enough to hide the host, few enough to bound memory."""


def evaluate(
    plan: Plan,
    eval_step: Callable[..., Metrics],
    state: TrainState,
    source: Source,
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the mean `loss` (nats) and `accuracy` (a fraction) over all examples of `source`.

    `check` is called before every batch and may raise to break off.
    """
    batches = eval_batches(
        source,
        batch_size=plan.config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=plan.config.data.num_threads,
        prefetch=plan.config.data.prefetch,
    )
    sharding = batch_sharding(plan.mesh)
    sums = []
    with contextlib.closing(batches):
        for batch in batches:
            check()
            sums.append(eval_step(state, to_devices(batch, sharding)))
            if len(sums) > STEPS_IN_FLIGHT:
                jax.block_until_ready(sums[-1 - STEPS_IN_FLIGHT])
    return mean(jax.device_get(sums))
