"""The place that is named is the one where the fault was put."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import TrainState, init_state, make_train_step
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated, to_devices
from cnn_jax.training.diagnosis import first_not_finite
from cnn_jax.training.losses import cross_entropy

pytestmark = pytest.mark.usefixtures("compile_quickly")

TX = optax.sgd(0.1, momentum=0.9)
KEY = jax.random.key(3)


def overflow(x: jax.Array) -> jax.Array:
    return x * 1e38 * 1e38


def root_of_zero(x: jax.Array) -> jax.Array:
    """0 forward; its gradient is 0 times infinity."""
    return jnp.sqrt(0 * x)


class Chain(nn.Module):
    """Three layers with something done to what enters the second and the third."""

    before_b: Any = nn.relu
    before_c: Any = nn.relu
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = nn.Dense(4, name="a")(images.reshape(len(images), -1))
        x = dense(4, name="b")(self.before_b(x))
        return dense(4, name="c")(self.before_c(x))


def infinite_gradient(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(0 * logits, axis=-1))


def infinite_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return cross_entropy(logits, labels) + jnp.inf


def make_case(model: Any) -> tuple[TrainState, dict[str, np.ndarray]]:
    images = np.random.default_rng(0).normal(size=(16, 4, 4, 2)).astype(np.float32)
    state = init_state(model, TX, jnp.asarray(images), KEY)
    return state, {"image": images, "label": np.zeros(16, np.int32)}


FAULTS = {
    "the output of b (Dense)": {"before_b": overflow},
    "the output of c (Dense)": {"before_c": overflow},
    "the gradient at the output of a (Dense)": {"before_b": root_of_zero},
    "the gradient at the output of b (Dense)": {"before_c": root_of_zero},
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("place", FAULTS)
def test_the_layer_is_named(place, remat):
    model = Chain(**FAULTS[place], remat=remat)
    state, batch = make_case(model)
    found = first_not_finite(make_train_step(model, TX), state, batch, KEY)
    assert found == f"{place} is the first that is not finite"


@pytest.mark.parametrize(
    ("loss", "place"),
    [
        (infinite_gradient, "the gradient at the output of the whole model (Chain)"),
        (infinite_loss, "the loss"),
    ],
)
def test_the_loss_is_named(loss, place):
    state, batch = make_case(Chain())
    found = first_not_finite(make_train_step(Chain(), TX, loss=loss), state, batch, KEY)
    assert found == f"{place} is the first that is not finite"


def test_on_many_devices_one_pixel_is_enough():
    state, batch = make_case(Chain())
    mesh = make_mesh(data=4, fsdp=2)
    state = jax.device_put(state, replicated(mesh))
    batch["image"][13, 1, 2, 0] = np.inf
    find = functools.partial(first_not_finite, make_train_step(Chain(), TX), state, key=KEY)
    assert find(batch=to_devices(batch, batch_sharding(mesh))) == (
        "what enters the model (the images as augmented) is the first that is not finite"
    )
    batch["image"][13, 1, 2, 0] = 0
    assert "are finite, looked at singly" in find(batch=to_devices(batch, batch_sharding(mesh)))


def test_weights_before_and_after_the_step_are_named():
    state, batch = make_case(Chain())
    kernel = state.params["b"]["kernel"].at[1, 2].set(jnp.nan)
    poisoned = {**state.params, "b": {**state.params["b"], "kernel": kernel}}
    before = TrainState(
        step=state.step,
        params=poisoned,
        batch_stats=state.batch_stats,
        opt_state=state.opt_state,
    )
    step = make_train_step(Chain(), TX)
    assert first_not_finite(step, before, batch, KEY) == (
        "params/b/kernel is not finite before the step"
    )
    reckless = optax.chain(optax.scale(1e38), optax.scale(-1e38))
    found = first_not_finite(
        make_train_step(Chain(), reckless),
        TrainState(
            step=state.step,
            params=state.params,
            batch_stats={},
            opt_state=reckless.init(state.params),
        ),
        batch,
        KEY,
    )
    assert found == (
        "all layers and their gradients are finite, params/a/bias is not after the update"
    )
