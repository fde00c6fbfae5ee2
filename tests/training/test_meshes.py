"""The same weights on every mesh, for a run that is planned and compiled as the trainer does it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned import batches, plan

from cnn_jax import create_model, make_train_step
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.training.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS = 20


def train(made: Any) -> tuple[Any, list[float]]:
    """The state after the steps, and the mean loss of each."""
    step = compile_program(made.lower_train_step(), made.compiler.options)
    state, key, losses = made.make_state(), made.make_key(), []
    for batch in batches(STEPS):
        state, sums = step(state, to_devices(batch, batch_sharding(made.mesh)), key)
        losses.append(float(sums["loss"] / sums["count"]))
    return state, losses


@pytest.fixture(scope="module")
def in_float64() -> tuple[Any, list[float]]:
    """The same run in float64 on one device, by a step of its own."""
    made = plan(devices=1)
    config = made.config
    start = jax.device_get(made.make_state())
    with jax.enable_x64(True):
        model = create_model(
            config.model.name, num_classes=10, dtype=jnp.float64, **config.model.arguments
        )
        optimizer = config.optimizer
        tx = make_optimizer(
            "sgd",
            optimizer.learning_rate,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
            weight_decay=optimizer.weight_decay,
        )

        def normalize(images):
            mean, std = config.data.mean[0], config.data.std[0]
            return (images.astype(jnp.float64) / 255 - mean) / std

        def exactly(tree):
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

        step = jax.jit(make_train_step(model, tx, normalize=normalize, loss=losses_of(config)))
        params = exactly(start.params)
        state = type(start)(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=exactly(start.batch_stats),
            opt_state=tx.init(params),
        )
        losses = []
        for batch in batches(STEPS):
            state, sums = step(state, batch, jax.random.key(0))
            losses.append(float(sums["loss"] / sums["count"]))
        return jax.device_get(state), losses


def losses_of(config: Any) -> Any:
    def cross_entropy(logits, labels):
        share = config.loss.label_smoothing
        wanted = jax.nn.one_hot(labels, 10) * (1 - share) + share / 10
        return -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)

    return cross_entropy


SPLITS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(
    "sizes",
    [
        split if split in ((1, 1), (2, 2)) else pytest.param(split, marks=pytest.mark.slow)
        for split in SPLITS
    ],
    ids="{0[0]} x {0[1]}".format,
)
def test_the_weights_after_20_steps_are_those_of_float64(sizes, in_float64):
    """On 1, 2, 4 and 8 devices, for every split between `data` and `fsdp`."""
    data, fsdp = sizes
    made = plan(("mesh.data", str(data)), ("mesh.fsdp", str(fsdp)), devices=data * fsdp)
    state, losses = train(made)
    expected, expected_losses = in_float64
    assert int(state.step) == STEPS
    assert expected_losses[-1] < 0.9 * expected_losses[0]
    divided = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
    assert any(divided) == (fsdp > 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)
    for name in ("params", "batch_stats"):
        leaves = jax.tree.leaves_with_path(getattr(state, name))
        others = jax.tree.leaves(getattr(expected, name))
        for (path, leaf), other in zip(leaves, others, strict=True):
            np.testing.assert_allclose(
                leaf,
                other,
                rtol=0,
                atol=2e-4 * np.abs(other).max(),
                err_msg=jax.tree_util.keystr(path),
            )


def test_the_size_that_is_left_out_is_inferred():
    assert plan(("mesh.data", "-1"), ("mesh.fsdp", "4")).mesh.shape == {"data": 2, "fsdp": 4}
    assert plan(("mesh.data", "8"), ("mesh.fsdp", "-1")).mesh.shape == {"data": 8, "fsdp": 1}
