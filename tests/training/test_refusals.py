"""What research code gets wrong by a word or a shape is refused, not computed as another thing."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import init_state, make_eval_step, make_train_step
from cnn_jax.training.accumulation import accumulate
from cnn_jax.training.augment import make_augment, normalize
from cnn_jax.training.averaging import moving_average
from cnn_jax.training.losses import binary_cross_entropy, cross_entropy
from cnn_jax.training.mixing import make_mix

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(0)
TX = optax.sgd(0.1)
LABELS = np.array([1, 2, 0, 2], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 2)).astype(np.float32)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(4, name="head")(x.mean((1, 2)))


MODEL = Linear()


def state(**arguments):
    return init_state(MODEL, TX, IMAGES, KEY, **arguments)


def train(batch=None, *, state=state, **arguments):
    batch = {"image": IMAGES, "label": LABELS, **(batch or {})}
    return jax.jit(make_train_step(MODEL, TX, **arguments))(state(), batch, KEY)


WITH_EMA = functools.partial(state, ema=True)
PIXELS = np.zeros((1, 4, 4, 3), np.float32)
NAMES = (np.zeros(1, np.int32),) * 2
TO_FLOAT = {"std": (0.5,) * 3, "dtype": jnp.float32}

REFUSED = {
    "labels with an axis too many": (
        lambda: train({"label": LABELS[:, None]}),
        "labels of shape (4, 1) and int32: must be whole numbers (4,), or the share of every class",
    ),
    "fewer labels than images": (lambda: train({"label": LABELS[:1]}), "labels of shape (1,)"),
    "labels of numbers": (lambda: train({"label": LABELS / 1.0}), "labels of shape (4,) and float"),
    "a loss that is a mean": (
        lambda: train(loss=lambda *of: cross_entropy(*of).mean()),
        "the loss must return one number for each example, (4,), and returns ()",
    ),
    "averages that no step moves": (lambda: train(state=WITH_EMA), "average=moving_average(...)"),
    "a step that moves no averages": (
        lambda: train(average=moving_average(0.9)),
        "the state has no moving averages: make it by init_state(ema=True)",
    ),
    "averages that are not there": (lambda: state().averaged(), "init_state(ema=True)"),
    "examples without names": (
        lambda: train(augment=make_augment(flip=True)),
        "the batch has no 'epoch' and no 'index'",
    ),
    "no micro-batches": (lambda: accumulate(lambda *_: None, 0), "accumulate_steps=0: must be"),
    "floats for RandAugment": (
        lambda: make_augment(random_operations=1)(PIXELS, KEY, *NAMES),
        "images of float32: RandAugment needs pixels in uint8",
    ),
    "a magnitude off the scale": (
        lambda: make_augment(random_operations=1, magnitude=31)(np.uint8(PIXELS), KEY, *NAMES),
        "magnitude=31: must be from 0 to 30",
    ),
    "more than half the colour circle": (
        lambda: make_augment(hue=0.6)(PIXELS, KEY, *NAMES),
        "hue=0.6: must be from 0 to 0.5",
    ),
    "a share below nothing": (
        lambda: make_mix(num_classes=4, mixup_alpha=-0.2),
        "mixup_alpha=-0.2: must be from 0 to inf",
    ),
    "a mean of other channels": (
        lambda: normalize(PIXELS[..., :1], mean=(0.5,) * 3, **TO_FLOAT),
        "mean and std of 3 channels: the images have 1",
    ),
    "weights without their collection": (
        lambda: state(weights=dict(state().params)),
        "the weights do not fit the model; they are {'params': ...} as a whole:\n  head/",
    ),
    "weights of another name": (
        lambda: state(weights={"params": {"haed": {"bias": jnp.zeros(4)}}}),
        "params/haed/bias: the model has none (did you mean 'params/head/bias'?)",
    ),
    "weights of another shape": (
        lambda: state(weights={"params": {"head": {"bias": jnp.zeros(5)}}}),
        "params/head/bias: (5,), must be (4,)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name(what, untyped):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    "loss", [cross_entropy, functools.partial(binary_cross_entropy, threshold=0.2)]
)
@pytest.mark.parametrize("wrong", [-100, 4])
def test_a_label_that_is_no_class_is_not_trained_on(loss, wrong):
    labels = np.array([wrong, 2, 0, 2], np.int32)
    assert np.isnan(loss(jnp.zeros((4, 4)), labels)).tolist() == [True, False, False, False]
    _, sums = train({"label": labels}, loss=loss)
    assert not sums["finite"]
    mix = make_mix(num_classes=4, mixup_alpha=1.0)
    names = {"epoch": LABELS, "index": LABELS}
    _, sums = train({"label": labels, **names}, loss=loss, mix=mix)
    assert not sums["finite"]


def test_shares_of_classes_are_labels_too():
    """As many classes as images, so that shapes could not tell them apart."""
    shares = np.eye(4, dtype=np.float32)[LABELS]
    (of_shares, found), (of_labels, expected) = train({"label": shares}), train()
    assert 0 < expected["count"] == 4
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    for ours, theirs in zip(*map(jax.tree.leaves, (of_shares, of_labels)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    names = {"epoch": LABELS, "index": LABELS}
    mix = make_mix(num_classes=4, cutmix_alpha=1.0)
    mixed = [train({"label": each, **names}, mix=mix)[1]["loss"] for each in (shares, LABELS)]
    np.testing.assert_allclose(*mixed, rtol=1e-6)


def test_an_evaluation_weighs_examples_by_the_mask_and_without_one_takes_all():
    step = jax.jit(make_eval_step(MODEL))
    batch = {"image": IMAGES, "label": LABELS}
    of_all, of_halves, of_first = (
        step(state(), batch | more)
        for more in ({}, {"mask": np.full(4, 0.5, np.float32)}, {"mask": np.eye(4, dtype="f4")[0]})
    )
    for name in ("loss", "accuracy", "count"):
        np.testing.assert_allclose(of_halves[name], of_all[name] / 2, rtol=1e-6)
    assert of_all["count"] == 4
    logits = np.asarray(MODEL.apply({"params": state().params}, IMAGES, train=False), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), LABELS]
    np.testing.assert_allclose(of_all["loss"], losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(of_first["loss"], losses[0], rtol=1e-5)


def test_weights_take_the_dtype_of_what_they_replace():
    weights = {"params": {"head": {"bias": np.arange(4, dtype=np.float16)}}}
    params = state(weights=weights).params
    assert params["head"]["bias"].dtype == jnp.float32
    assert params["head"]["bias"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(params["head"]["kernel"], state().params["head"]["kernel"])
