"""The step: its numbers, on any devices, with any module."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from cnn_jax import (
    ModernCNN,
    TrainState,
    init_state,
    make_eval_step,
    make_predict_step,
    make_train_step,
)
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated, shard_state, to_devices
from cnn_jax.training.augment import make_augment, normalize
from cnn_jax.training.losses import cross_entropy
from cnn_jax.training.mixing import make_mix
from cnn_jax.training.optim import make_optimizer
from cnn_jax.training.state import all_finite

KEY = jax.random.key(3)
SHAPE = (8, 8, 2)
MEAN, STD = (0.4, 0.6), (0.25, 0.5)
ARCHITECTURE = {"stage_sizes": (1, 1), "width": 8, "stem": "small", "block": "residual"}
MODEL = ModernCNN(num_classes=5, **ARCHITECTURE)
NORMALIZE = functools.partial(normalize, mean=MEAN, std=STD, dtype=jnp.dtype("float32"))


def make_batch(seed=0, size=16):
    """Images whose brightness says their class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=size, dtype=np.int32)
    images = rng.integers(100, size=(size, *SHAPE)) + 35 * labels[:, None, None, None]
    return {
        "image": images.astype(np.uint8),
        "label": labels,
        "index": np.arange(size, dtype=np.int32) + seed * size,
        "epoch": np.full(size, seed, np.int32),
    }


def make_state(model, tx):
    """The state of random variables, none of them 0 or 1 by accident; nothing is compiled."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return rng.uniform(0.5, 1.5, size=leaf.shape) - (path[-1].key in ("bias", "mean"))

    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
    )


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def unflat(vector, like):
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(np.split(vector, ends), leaves, strict=True)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])


class Perceptron(nn.Module):
    """A researcher's own network: no convolution, no BatchNorm, not of this package."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, *, train: bool):
        hidden = nn.relu(nn.Dense(16)(images.reshape(len(images), -1)))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(5)(hidden)


def test_one_step_of_modern_cnn_equals_the_oracle():
    """With a rate of 1/2 the parameters lose half the gradient, which is the oracle's slope."""
    label_smoothing = 0.2
    loss = functools.partial(cross_entropy, label_smoothing=label_smoothing)
    step = jax.jit(make_train_step(MODEL, optax.sgd(0.5), loss=loss, normalize=NORMALIZE))
    state, batch = make_state(MODEL, optax.sgd(0.5)), make_batch()
    new_state, sums = jax.device_get(step(state, batch, KEY))
    state = jax.device_get(state)
    images = (batch["image"].astype(np.float64) / 255 - MEAN) / STD

    def forward(vector):
        logits, statistics = oracles.modern_cnn(
            images,
            unflat(vector, state.params),
            state.batch_stats,
            train=True,
            variant="standard",
            **ARCHITECTURE,
        )
        losses = oracles.cross_entropy(logits, batch["label"], label_smoothing=label_smoothing)
        return losses, logits, statistics

    params = flat(state.params)
    losses, logits, statistics = forward(params)
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    assert sums["accuracy"] == np.count_nonzero(logits.argmax(axis=1) == batch["label"])
    assert sums["count"] == 16
    assert sums["finite"]
    assert (state.step, new_state.step) == (0, 1)
    assert jax.tree.structure(new_state.batch_stats) == jax.tree.structure(state.batch_stats)
    statistics = {name: statistics[name] for name in state.batch_stats}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        new_state.batch_stats,
        statistics,
    )

    gradient = 2 * (params - flat(new_state.params))

    def slope(direction):
        far, near = (forward(params + h * direction)[0].mean() for h in (1e-6, -1e-6))
        return (far - near) / 2e-6

    norm = np.linalg.norm(gradient)
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(slope(gradient / norm), norm, rtol=1e-4)
    rng = np.random.default_rng(0)
    entries = np.eye(len(params))[rng.choice(len(params), size=6, replace=False)]
    for direction in [*entries, *rng.normal(size=(3, len(params)))]:
        np.testing.assert_allclose(slope(direction), gradient @ direction, rtol=1e-3, atol=1e-5)


def test_a_foreign_module_trains_without_an_edit():
    model, tx = Perceptron(dropout=0.1), make_optimizer("adamw", 0.01)
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE))
    state, batch, losses = make_state(model, tx), make_batch(size=64), []
    assert state.batch_stats == {}
    for _ in range(40):
        state, sums = step(state, batch, KEY)
        losses.append(float(sums["loss"] / sums["count"]))
    assert losses[0] > 1.2
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 40

    tested = jax.jit(make_eval_step(model, normalize=NORMALIZE))(
        state, {**batch, "mask": np.ones(64, np.float32)}
    )
    assert tested["accuracy"] > 50


def test_finite_says_whether_loss_and_gradient_are():
    model, tx = Perceptron(), optax.sgd(0.1)
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    batch = {"image": images, "label": np.zeros(4, np.int32)}
    state = make_state(model, tx)
    step = jax.jit(make_train_step(model, tx))
    assert step(state, batch, KEY)[1]["finite"]

    broken_image = images.copy()
    broken_image[1, 2, 3, 0] = np.nan
    assert not step(state, {**batch, "image": broken_image}, KEY)[1]["finite"]

    broken_params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.inf), state.params)
    assert not step(state.replace(params=broken_params), batch, KEY)[1]["finite"]

    def steep(logits, labels):
        return jnp.sqrt(0.0 * logits[:, 0])

    def infinite(logits, labels):
        return jnp.inf + 0.0 * logits[:, 0]

    for loss, value, norm in ((steep, 0, np.nan), (infinite, np.inf, 0)):
        sums = jax.jit(make_train_step(model, tx, loss=loss))(state, batch, KEY)[1]
        np.testing.assert_array_equal((sums["loss"], sums["grad_norm"]), (value, norm))
        assert not sums["finite"]


def test_the_state_at_step_0_is_what_module_and_optimizer_make_of_the_key():
    model, tx = Perceptron(), make_optimizer("adamw", 0.1)
    images, key = jnp.ones((2, *SHAPE)), jax.random.key(1)
    state = init_state(model, tx, images, key)
    variables = model.init(key, jnp.zeros_like(images), train=False)
    assert (state.step, state.step.dtype, state.batch_stats) == (0, jnp.int32, {})
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, tx.init(variables["params"]))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state"])
def test_all_finite_looks_at_every_part_of_the_state(part):
    leaves = {name: {"leaf": jnp.ones((2, 3))} for name in ("params", "batch_stats", "opt_state")}
    state = TrainState(step=jnp.zeros((), jnp.int32), **leaves)
    assert all_finite(state)
    for value in (jnp.nan, -jnp.inf):
        assert not all_finite(
            state.replace(**{part: {"leaf": jnp.ones((2, 3)).at[1, 2].set(value)}})
        )


def test_evaluation_ignores_the_padding_exactly():
    state = make_state(MODEL, optax.sgd(0.1))
    step = jax.jit(make_eval_step(MODEL, normalize=NORMALIZE))
    batch = make_batch()
    mask = (np.arange(16) < 11).astype(np.float32)
    sums = jax.device_get(step(state, {**batch, "mask": mask}))

    rng = np.random.default_rng(1)
    padded = {name: batch[name].copy() for name in ("image", "label")}
    padded["image"][11:] = rng.integers(256, size=(5, *SHAPE))
    padded["label"][11:] = 4
    assert jax.device_get(step(state, {**padded, "mask": mask})) == sums

    real = {name: batch[name][:11] for name in ("image", "label")}
    alone = jax.device_get(step(state, {**real, "mask": np.ones(11, np.float32)}))
    assert alone["count"] == sums["count"] == 11
    assert alone["accuracy"] == sums["accuracy"]
    np.testing.assert_allclose(alone["loss"], sums["loss"], rtol=1e-5)


def run(mesh, num_steps=5):
    """The states and losses of a short run, compiled and placed as a real one."""
    tx = make_optimizer("sgd", 0.05, weight_decay=1e-3)
    augment = make_augment(crop_padding=2, flip=True)
    state = make_state(MODEL, tx)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_state(mesh, state))
    step = jax.jit(
        make_train_step(MODEL, tx, normalize=NORMALIZE, augment=augment),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    state, losses = jax.device_put(state, shardings), []
    key = jax.device_put(KEY, replicated(mesh))
    for number in range(num_steps):
        batch = to_devices(make_batch(seed=number), batch_sharding(mesh))
        state, sums = step(state, batch, key)
        losses.append(float(sums["loss"] / sums["count"]))
    return state, losses


@pytest.fixture(scope="module")
def run_on_one_device():
    return run(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1), marks=pytest.mark.slow),
        (4, 2),
        pytest.param((1, 8), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_numbers_of_one(sizes, run_on_one_device):
    data, fsdp = sizes
    state, losses = run(make_mesh(data=data, fsdp=fsdp))
    expected_state, expected_losses = run_on_one_device
    divided = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
    assert any(divided) == (fsdp > 1)
    assert len({round(loss, 3) for loss in losses}) == len(losses)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), state, expected_state
    )


def test_the_new_state_takes_the_place_of_the_old_one():
    model, tx = Perceptron(), make_optimizer("sgd", 0.1)
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE), donate_argnums=0)
    state, batch = make_state(model, tx), make_batch()

    def places(state):
        return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}

    before = places(state)
    new_state, _ = step(state, batch, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert places(new_state) == before


def test_randomness_is_a_function_of_key_and_step_only():
    model, tx = Perceptron(dropout=0.5), optax.sgd(0.1)
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE))
    state, batch = make_state(model, tx), make_batch()
    later = state.replace(step=state.step + 1)

    def loss(state, key, batch=batch):
        return float(step(state, batch, key)[1]["loss"])

    renamed = {**batch, "index": batch["index"] + 1, "epoch": batch["epoch"] + 1}
    first = loss(state, KEY)
    assert first == loss(state, KEY) == loss(state, KEY, renamed)
    others = [loss(later, KEY), loss(state, jax.random.key(4)), loss(later, jax.random.key(4))]
    assert len({first, *others}) == 4


def test_augmentation_is_a_function_of_key_epoch_and_example_only():
    model, tx = Perceptron(), optax.sgd(0.1)
    augment = make_augment(crop_padding=2, flip=True)
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE, augment=augment))
    state, batch = make_state(model, tx), make_batch()

    def loss(state=state, key=KEY, **changes):
        return float(step(state, {**batch, **changes}, key)[1]["loss"])

    assert loss() == loss(state=state.replace(step=state.step + 7))
    changed = [
        loss(key=jax.random.key(4)),
        loss(epoch=batch["epoch"] + 1),
        loss(index=batch["index"] + 1),
    ]
    assert len({loss(), *changed}) == 4


def test_mixed_images_are_trained_on_as_their_shares():
    """The loss is that of the images and shares of `mix`; right is the class with most of it."""
    model, tx = Perceptron(), optax.sgd(0.1)
    mix = make_mix(num_classes=5, mixup_alpha=1.0)
    step = jax.jit(make_train_step(model, tx, normalize=NORMALIZE, mix=mix))
    state, batch = make_state(model, tx), make_batch()
    sums = step(state, batch, KEY)[1]
    images, shares = jax.jit(mix)(
        NORMALIZE(batch["image"]), batch["label"], KEY, batch["epoch"], batch["index"]
    )
    logits = np.asarray(model.apply({"params": state.params}, images, train=False))
    by_class = [oracles.cross_entropy(logits, np.full(16, k)) for k in range(5)]
    np.testing.assert_allclose(sums["loss"], np.sum(np.asarray(shares).T * by_class), rtol=1e-5)
    right = np.count_nonzero(logits.argmax(axis=1) == shares.argmax(axis=1))
    assert sums["accuracy"] == right


def test_bfloat16_is_for_the_computation_alone():
    model, tx = ModernCNN(num_classes=5, dtype=jnp.bfloat16, **ARCHITECTURE), optax.adam(0.1)
    prepare = functools.partial(normalize, mean=MEAN, std=STD, dtype=jnp.dtype("bfloat16"))
    state, step = make_state(model, tx), make_train_step(model, tx, normalize=prepare)
    new_state, sums = jax.eval_shape(step, state, make_batch(), KEY)

    def dtypes(tree: Any):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert dtypes(new_state) == dtypes(state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(new_state)}
    assert kinds == {"float32", "int32"}
    assert sums["loss"].dtype == sums["accuracy"].dtype == jnp.float32


def test_prediction_is_the_softmax_of_the_logits():
    state, batch = make_state(MODEL, optax.sgd(0.1)), make_batch()
    step = jax.jit(make_predict_step(MODEL, normalize=NORMALIZE))
    probabilities = np.asarray(step(state, {"image": batch["image"]}), np.float64)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = MODEL.apply(variables, NORMALIZE(jnp.asarray(batch["image"])), train=False)
    expected = -oracles.cross_entropy(np.repeat(logits, 5, axis=0), np.tile(np.arange(5), 16))
    np.testing.assert_allclose(np.log(probabilities).ravel(), expected, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
