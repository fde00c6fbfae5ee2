"""Freezing: what a pattern does not name stays as it is, bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import ModernCNN, freeze_updates, init_state, make_train_step, train_only
from cnn_jax.training.freezing import frozen_statistics

pytestmark = pytest.mark.usefixtures("compile_quickly")

MODEL = ModernCNN(num_classes=5, stage_sizes=(1, 1), width=4, stem="small", block="residual")
PARAMS = {
    "stem": {"conv": {"kernel": 0}},
    "stage1_block1": {"conv1": {"conv": {"kernel": 0}}},
    "stage1_block10": {"conv1": {"conv": {"kernel": 0}}},
    "head": {"kernel": 0, "bias": 0},
}


class TheirNorms(nn.Module):
    """A researcher's own network, which says in a call what its BatchNorm does."""

    @nn.compact
    def __call__(self, images, *, train: bool):
        partitioned = nn.with_partitioning(nn.initializers.lecun_normal(), (None,) * 4)
        x = nn.Conv(3, (3, 3), kernel_init=partitioned, name="first")(images)
        x = nn.BatchNorm(name="zeroth_norm")(x, not train)
        x = nn.BatchNorm(name="first_norm")(x, use_running_average=not train)
        x = nn.BatchNorm(use_running_average=not train, name="second_norm")(x)
        return nn.Dense(5, name="head")(x.mean(axis=(1, 2)))


def batch(seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(5, size=8, dtype=np.int32)}


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(nn.meta.unbox(tree))
    }


def changed(before, after):
    before, after = leaves(before), leaves(after)
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ((), {"stem", "stage1_block1", "stage1_block10", "head"}),
        (("head",), {"head"}),
        (("stage1_block1",), {"stage1_block1"}),
        (("stage1_.*", "head"), {"stage1_block1", "stage1_block10", "head"}),
        (("head|stem",), {"head", "stem"}),
    ],
)
def test_patterns_name_whole_parts(patterns, trained):
    frozen = train_only(patterns, PARAMS)
    paths = leaves(PARAMS)
    assert {path.partition("/")[0] for path in paths if not frozen(path)} == trained


def test_a_pattern_may_name_one_array():
    frozen = train_only(("head/bias",), PARAMS)
    assert [path for path in leaves(PARAMS) if not frozen(path)] == ["head/bias"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("haed", r"'haed': names no parameter \(did you mean 'head'\?\); the parts are head, "),
        ("stage1", r"'stage1': names no parameter"),
        ("(", r"'\(': no regular expression"),
    ],
)
def test_patterns_that_name_nothing_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        train_only(("head", pattern), PARAMS)


def trained(model, patterns, tx, steps=2):
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(0)["image"], train=False))
    frozen = train_only(patterns, tree["params"])
    tx = freeze_updates(tx, frozen)
    before = init_state(model, tx, batch(0)["image"], jax.random.key(0))
    step = jax.jit(make_train_step(model, tx, frozen=frozen))
    after = before
    for number in range(steps):
        after, sums = step(after, batch(number), jax.random.key(1))
    return before, after, sums, frozen


SGD = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True))


@pytest.mark.parametrize("model", [MODEL, MODEL.clone(norm="batch_unbiased")])
def test_frozen_parts_keep_weights_and_running_statistics(model):
    before, after, _, _ = trained(model, ("stage2_.*", "head"), SGD)
    names = {"stage2_block1", "head"}
    assert changed(before.params, after.params) == {
        path for path in leaves(before.params) if path.partition("/")[0] in names
    }
    assert changed(before.batch_stats, after.batch_stats) == {
        path for path in leaves(before.batch_stats) if path.partition("/")[0] in names
    }
    momentum = {path for path in leaves(after.opt_state) if "trace" in path}
    assert momentum
    assert all("stage2_block1" in path or "head" in path for path in momentum)


def test_frozen_batch_norms_normalize_by_their_running_statistics():
    """With everything but the head frozen, the features of a train step are those of evaluation."""
    before, after, sums, _ = trained(MODEL, ("head",), optax.sgd(0.0), steps=1)
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    logits = MODEL.apply(variables, batch(0)["image"], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch(0)["label"])
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    assert changed(before, after) == {"step"}


def test_gradient_norm_is_that_of_the_trained_part():
    before, _, sums, _ = trained(MODEL, ("head/bias",), optax.sgd(0.0), steps=1)

    def loss(bias):
        params = before.params | {"head": before.params["head"] | {"bias": bias}}
        variables = {"params": params, "batch_stats": before.batch_stats}
        logits = MODEL.apply(variables, batch(0)["image"], train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch(0)["label"]).mean()

    gradient = jax.grad(loss)(before.params["head"]["bias"])
    np.testing.assert_allclose(sums["grad_norm"], np.linalg.norm(gradient), rtol=1e-4)


@pytest.mark.parametrize("patterns", [("first", "head"), ("second_norm",)])
def test_a_network_of_another_author_freezes_as_well(patterns):
    before, after, _, frozen = trained(TheirNorms(), patterns, SGD)
    assert changed(before.params, after.params) == {
        path for path in leaves(before.params) if not frozen(path)
    }
    assert {path.partition("/")[0] for path in changed(before.batch_stats, after.batch_stats)} == (
        {"second_norm"} & set(patterns)
    )


def test_no_convolution_is_computed_for_the_gradient_of_what_is_frozen():
    def convolutions(patterns):
        tree = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), batch(0)["image"], train=False))
        frozen = train_only(patterns, tree["params"])
        tx = freeze_updates(optax.sgd(0.1), frozen)
        state = jax.eval_shape(lambda: init_state(MODEL, tx, batch(0)["image"], jax.random.key(0)))
        step = make_train_step(MODEL, tx, frozen=frozen)
        traced = jax.jit(step).trace(state, batch(0), jax.random.key(0))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()  # on the CPU 1x1 is a product
        return text.count("stablehlo.convolution")

    forward = 6  # stem, two in each block, one projection
    assert convolutions(("head",)) == forward
    assert convolutions(()) == 3 * forward - 1  # of each input but the image's, and each kernel


def test_statistics_are_frozen_inside_the_context_alone():
    model = nn.BatchNorm(use_running_average=False)
    x = jnp.arange(8.0).reshape(4, 2)
    variables = model.init(jax.random.key(0), x)
    with frozen_statistics(lambda path: True):
        inside, _ = model.apply(variables, x, mutable=["batch_stats"])
    outside, updated = model.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(inside, x, rtol=1e-4)
    np.testing.assert_allclose(outside.mean(axis=0), [0, 0], atol=1e-6)
    assert updated["batch_stats"]["mean"][0] != 0
