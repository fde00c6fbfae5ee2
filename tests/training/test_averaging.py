"""Moving averages against NumPy: of parameters and of BatchNorm's statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import ModernCNN, init_state, make_eval_step, make_train_step
from cnn_jax.training.averaging import moving_average
from cnn_jax.training.flip_averaging import FlipAveraged
from cnn_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODEL = ModernCNN(num_classes=5, stage_sizes=(1,), width=4, stem="small", block="residual")


def make_batch(seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(8, 6, 6, 2)).astype(np.float32)
    return {"image": images, "label": rng.integers(5, size=8, dtype=np.int32)}


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_a_training_run_s_averages_equal_numpy_s(decay):
    """With 0.3 the warm-up has ended after three steps, with 0.999 it has just begun."""
    tx = optax.sgd(0.5)
    state = init_state(MODEL, tx, make_batch(0)["image"], jax.random.key(0), ema=True)
    plain = init_state(MODEL, tx, make_batch(0)["image"], jax.random.key(0))
    step = jax.jit(make_train_step(MODEL, tx, average=moving_average(decay)), donate_argnums=0)
    step_without = jax.jit(make_train_step(MODEL, tx))
    expected = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    for number in range(1, 7):
        state, _ = step(state, make_batch(number), jax.random.key(1))
        plain, _ = step_without(plain, make_batch(number), jax.random.key(1))
        kept = min(decay, (1 + number) / (10 + number))
        values = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        expected = jax.tree.map(lambda a, v, d=kept: d * a + (1 - d) * v, expected, values)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), state.ema, expected)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
        (state.params, state.batch_stats, state.opt_state),
        (plain.params, plain.batch_stats, plain.opt_state),
    )
    assert plain.ema == {}

    evaluate = jax.jit(make_eval_step(MODEL))
    batch = make_batch(9) | {"mask": np.ones(8, np.float32)}
    averaged = evaluate(state.averaged(), batch)["loss"]
    logits = MODEL.apply(expected, batch["image"], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    np.testing.assert_allclose(averaged, losses.sum(), rtol=1e-3)
    assert evaluate(state, batch)["loss"] != averaged


def test_decay_is_less_in_the_first_steps():
    state = TrainState(
        step=jnp.int32(1),
        params={"w": jnp.float32(1)},
        batch_stats={},
        opt_state=(),
        ema={"params": {"w": jnp.float32(0)}, "batch_stats": {}},
    )
    for step, kept in ((1, 2 / 11), (8, 0.5), (80, 0.9), (10**6, 0.9)):
        averaged = moving_average(0.9)(state.replace(step=jnp.int32(step)))
        np.testing.assert_allclose(averaged.ema["params"]["w"], 1 - kept, rtol=1e-6)


def test_flip_averaging_is_the_mean_of_both_sides_logits():
    images = jnp.asarray(make_batch(0)["image"])
    variables = MODEL.init(jax.random.key(0), images, train=False)
    there, back = (
        np.asarray(MODEL.apply(variables, each, train=False), np.float64)
        for each in (images, images[:, :, ::-1])
    )
    assert np.abs(there - back).max() > 0.01
    averaged = FlipAveraged(MODEL).apply(variables, images, train=False)
    np.testing.assert_allclose(averaged, (there + back) / 2, atol=1e-5)
    mirrored = FlipAveraged(MODEL).apply(variables, images[:, :, ::-1], train=False)
    np.testing.assert_allclose(mirrored, averaged, atol=1e-5)
