"""Gradients of micro-batches in turn against those of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planned import batches, plan

from cnn_jax import ModernCNN, init_state, make_train_step
from cnn_jax.runtime import hlo
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.training.accumulation import accumulate
from cnn_jax.training.augment import make_augment, normalize

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS = 4
ORDER = np.arange(16).reshape(4, STEPS).T.ravel()
"""The examples of the first micro-batch, then those of the second, and so on."""

NORMALIZE = functools.partial(normalize, mean=(0.5,), std=(0.3,), dtype=jnp.dtype("float32"))
MODEL = functools.partial(
    ModernCNN, num_classes=10, stem="medium", block="residual", stage_sizes=(1,), width=8
)


def one_step(model, batch, **arguments):
    """The state before, the state after and the metrics; parameters lose the gradient."""
    tx = optax.sgd(1.0)
    images = jnp.zeros((1, 28, 28, 1))
    state = jax.jit(lambda: init_state(model, tx, images, jax.random.key(0)))()
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE, **arguments))
    return jax.device_get((state, *step(state, batch, jax.random.key(1))))


def assert_close(ours, theirs, tolerance=1e-5):
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        atol = tolerance * max(1.0, np.abs(other).max())
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, rtol=0, atol=atol, err_msg=name)


def test_the_mean_is_that_of_float64_and_state_goes_from_one_to_the_next():
    """Against plain NumPy: gradients averaged, sums summed, the state moved in order."""
    rng = np.random.default_rng(0)
    batch = {"label": np.arange(12, dtype=np.int32), "x": rng.normal(size=12).astype(np.float32)}

    def gradients(params, stats, batch, key):
        found = {"w": (params["w"] * jnp.mean(batch["x"])).astype(jnp.bfloat16)}
        moved = 0.5 * stats + jnp.sum(batch["x"])
        return found, moved, {"count": jnp.sum(jnp.ones_like(batch["x"]))}

    params = {"w": jnp.asarray(3.0, jnp.bfloat16)}
    found, stats, sums = jax.jit(accumulate(gradients, 3))(
        params, jnp.zeros(()), batch, jax.random.key(0)
    )
    parts = [batch["x"][i::3].astype(np.float64) for i in range(3)]
    each = [float(jnp.bfloat16(3 * part.mean())) for part in parts]
    assert found["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["w"], np.mean(each), rtol=2e-2)
    np.testing.assert_allclose(
        stats, 0.25 * parts[0].sum() + 0.5 * parts[1].sum() + parts[2].sum(), rtol=1e-5
    )
    assert sums == {"count": 12}


def test_each_micro_batch_draws_its_own_randomness():
    def gradients(params, stats, batch, key):
        return params, stats, {"drawn": jax.random.uniform(key) * jnp.arange(1.0, 3.0)}

    batch = {"label": jnp.zeros(4, jnp.int32)}
    key = jax.random.key(5)
    _, _, sums = accumulate(gradients, 2)({}, {}, batch, key)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(2)]
    assert drawn[0] != drawn[1]
    np.testing.assert_allclose(sums["drawn"], [sum(drawn), 2 * sum(drawn)], rtol=1e-6)


def test_micro_batches_give_what_groups_of_a_large_batch_give():
    """The same gradient and metrics where BatchNorm's groups are the micro-batches.

    The running statistics move once a micro-batch instead of once.
    """
    (batch,) = batches(1)
    augment = make_augment(crop_padding=2, flip=True)
    before, after, sums = one_step(MODEL(), batch, accumulate_steps=STEPS, augment=augment)
    sorted_batch = {name: array[ORDER] for name, array in batch.items()}
    _, expected, expected_sums = one_step(
        MODEL(batch_norm_group_size=4), sorted_batch, augment=augment
    )
    assert_close(after.params, expected.params)
    assert_close(sums, expected_sums)
    assert sums["count"] == 16

    def once(part, kept):
        state = init_state(MODEL(), optax.sgd(1.0), jnp.zeros((1, 28, 28, 1)), jax.random.key(0))
        step = make_train_step(MODEL(), optax.sgd(1.0), normalize=NORMALIZE, augment=augment)
        return step(state.replace(batch_stats=kept), part, jax.random.key(1))[0].batch_stats

    kept, jitted = before.batch_stats, jax.jit(once)
    for i in range(STEPS):
        kept = jitted({name: array[i::STEPS] for name, array in batch.items()}, kept)
    assert_close(after.batch_stats, kept)


def test_without_statistics_the_step_is_that_of_the_large_batch():
    (batch,) = batches(1)
    model = MODEL(norm="group", width=16)
    _, after, sums = one_step(model, batch, accumulate_steps=STEPS)
    _, expected, expected_sums = one_step(model, batch)
    assert_close(after.params, expected.params)
    assert_close(sums, expected_sums)


def step_on(devices, *texts):
    made = plan(("accumulate_steps", "2"), *texts, devices=devices)
    program = compile_program(made.lower_train_step(), made.compiler.options)
    (batch,) = batches(1)
    state, sums = program(
        made.make_state(), to_devices(batch, batch_sharding(made.mesh)), made.make_key()
    )
    found = hlo.collectives(hlo.read(program.as_text()))
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return jax.device_get(state), jax.device_get(sums), found, params


@pytest.mark.parametrize("mesh", [(), pytest.param((("mesh.fsdp", "2"),), marks=pytest.mark.slow)])
def test_devices_share_each_micro_batch(mesh):
    """The weights of one device, and no image travels: what is reduced are sums."""
    state, sums, found, _ = step_on(8, *mesh)
    expected, expected_sums, _, _ = step_on(1)
    assert_close(state.params, expected.params, 1e-4)
    assert_close(state.batch_stats, expected.batch_stats, 1e-4)
    assert_close(sums, expected_sums, 1e-4)
    expected_kinds = {"all-reduce"} | ({"all-gather"} if mesh else set())
    moved = sum(each.bytes for each in found if each.kind not in expected_kinds)
    assert moved < 28 * 28, "not as much as one image"


def test_device_statistics_take_no_collective_in_micro_batches():
    """A reduction of the gradients each, to the byte."""
    _, _, found, params = step_on(8, ("batch_norm.statistics", "device"))
    assert sum(each.bytes for each in found) == 2 * 4 * (params + 2)


def test_a_batch_that_does_not_divide_is_refused():
    step = make_train_step(MODEL(), optax.sgd(1.0), normalize=NORMALIZE, accumulate_steps=3)
    state = init_state(MODEL(), optax.sgd(1.0), jnp.zeros((1, 28, 28, 1)), jax.random.key(0))
    with pytest.raises(
        ValueError, match="accumulate_steps=3: must divide the 16 images of a batch"
    ):
        jax.eval_shape(step, state, batches(1)[0], jax.random.key(0))
