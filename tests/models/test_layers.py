"""ConvBlock and the pools against the oracle."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax import ConvBlock, create_model
from cnn_jax.models import normalization, pooling
from cnn_jax.models.classifier import product


@pytest.mark.parametrize(
    ("shape", "kernel_size", "strides", "padding", "use_bias"),
    [
        ((2, 8, 8, 3), 3, 1, 1, True),
        ((2, 7, 9, 1), 3, 2, 1, False),
        ((3, 8, 12, 5), 5, 3, 2, True),
        ((2, 15, 11, 3), 7, 2, 3, False),
        ((2, 6, 5, 5), 1, 2, 0, True),
        ((2, 10, 7, 3), (3, 5), (2, 1), (0, 2), True),
    ],
)
def test_conv_block(assert_matches, shape, kernel_size, strides, padding, use_bias):
    block = ConvBlock(4, kernel_size, strides, padding, use_bias)
    assert_matches(block, oracles.conv_block, shape, strides=strides, padding=padding)


def test_conv_block_by_default_is_the_printed_one(assert_matches):
    """3x3, stride 1, padding 1, with bias, BatchNorm and ReLU."""
    params = jax.eval_shape(
        lambda: ConvBlock(4).init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False)
    )["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "conv": {"kernel": (3, 3, 3, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
    }
    assert_matches(ConvBlock(4), oracles.conv_block, (2, 5, 5, 3))


@pytest.mark.parametrize(
    ("parts", "arguments"),
    [
        ({"act": None}, {"act": oracles.identity}),
        ({"act": jnp.tanh}, {"act": np.tanh}),
        ({"conv": functools.partial(nn.Conv, feature_group_count=2)}, {"groups": 2}),
    ],
    ids=["no act", "tanh", "grouped"],
)
def test_conv_block_is_built_of_the_parts_it_is_given(assert_matches, parts, arguments):
    assert_matches(ConvBlock(4, **parts), oracles.conv_block, (2, 5, 4, 4), **arguments)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (normalization.batch_norm, {"params": {"conv", "norm"}, "batch_stats": {"norm"}}),
        (normalization.group_norm, {"params": {"conv", "norm"}}),
        (normalization.no_norm, {"params": {"conv"}}),
    ],
)
def test_conv_block_has_the_norm_it_is_given(assert_matches, norm, expected):
    block = ConvBlock(32, norm=norm)
    variables = jax.eval_shape(
        lambda: block.init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False)
    )
    assert {collection: set(tree) for collection, tree in variables.items()} == expected
    assert_matches(block, oracles.conv_block, (2, 5, 4, 3))


@pytest.mark.parametrize(("window", "strides", "padding"), [(3, 2, 1), ((2, 3), (1, 2), 0)])
@pytest.mark.parametrize("shape", [(2, 9, 8, 1), (1, 6, 11, 5)])
def test_max_pool(shape, window, strides, padding):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32) - 5
    np.testing.assert_array_equal(
        pooling.max_pool(jnp.asarray(images), window=window, strides=strides, padding=padding),
        oracles.max_pool(images, window, strides=strides, padding=padding),
    )


def test_global_average_pool_sums_in_float32():
    images = jnp.full((2, 64, 65, 3), 1.0078125, jnp.bfloat16)
    pooled = pooling.global_average_pool(images)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, oracles.global_average_pool(np.asarray(images)), rtol=1e-6)


def variables_and_images():
    """Of a ConvBlock of four features, its statistics those of no batch."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 6, 6, 3)).astype(np.float32)
    kernel, bias = rng.normal(size=(3, 3, 3, 4)).astype(np.float32), np.ones(4, np.float32)
    params = {"conv": {"kernel": kernel, "bias": bias}, "norm": {"scale": bias, "bias": bias}}
    return {"params": params, "batch_stats": {"norm": {"mean": bias, "var": 2 * bias}}}, images


def test_bias_before_batch_norm_has_no_gradient():
    variables, images = variables_and_images()
    weights = np.random.default_rng(1).normal(size=(4, 6, 6, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="train")
    @jax.grad
    def gradient(params, train):
        output, _ = ConvBlock(4).apply(
            variables | {"params": params}, images, train=train, mutable=["batch_stats"]
        )
        return jnp.vdot(weights, output)

    training = gradient(variables["params"], train=True)["conv"]
    assert jnp.abs(training["bias"]).max() < 1e-5 * jnp.abs(training["kernel"]).max()
    assert jnp.abs(gradient(variables["params"], train=False)["conv"]["bias"]).max() > 0.1


def test_bias_before_batch_norm_folds_into_the_running_mean():
    variables, images = variables_and_images()
    params, statistics = variables["params"], variables["batch_stats"]["norm"]
    bias = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    biased = {"kernel": params["conv"]["kernel"], "bias": bias}
    folded = {"kernel": params["conv"]["kernel"]}
    np.testing.assert_allclose(
        ConvBlock(4).apply(variables | {"params": params | {"conv": biased}}, images, train=False),
        ConvBlock(4, use_bias=False).apply(
            {
                "params": params | {"conv": folded},
                "batch_stats": {"norm": statistics | {"mean": statistics["mean"] - bias}},
            },
            images,
            train=False,
        ),
        atol=1e-5,
    )


def test_bfloat16_is_for_the_computation_only():
    block = ConvBlock(4, dtype=jnp.bfloat16)
    variables, images = variables_and_images()
    made = jax.eval_shape(lambda: block.init(jax.random.key(0), images, train=True))
    output, updated = jax.eval_shape(
        lambda: block.apply(variables, images, train=True, mutable=["batch_stats"])
    )
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((made, updated))} == {jnp.dtype("float32")}


def test_train_has_to_be_said():
    variables, images = variables_and_images()
    with pytest.raises(TypeError, match="train"):
        ConvBlock(4).apply(variables, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features=0: must be >= 1"),
        ({"strides": 0}, "strides=0: must be >= 1"),
        ({"kernel_size": (3, 0)}, r"kernel_size=\(3, 0\): must be >= 1"),
        ({"padding": -1}, "padding=-1: must be >= 0"),
        ({"groups": 0}, "groups=0: must be >= 1"),
        ({"groups": 2}, "groups=2: must divide the 3 channels of the input and features=4"),
        ({"groups": 3}, "groups=3: must divide the 3 channels of the input and features=4"),
        ({"kernel_size": 9, "padding": 0}, "kernel_size=9, padding=0: must leave an output"),
    ],
)
def test_convolutions_that_cannot_be_are_refused(arguments, message):
    block = ConvBlock(**{"features": 4} | arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)), train=False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_flaxs_bit_for_bit(dtype, train):
    """So that checkpoints and numbers of either are those of the other."""
    _, images = variables_and_images()
    images = jnp.asarray(images, dtype)
    ours = normalization.batch_norm(train=train, dtype=dtype, name="norm")
    theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)
    of_norm = {
        "params": dict.fromkeys(("scale", "bias"), images[0, 0, 0] + 1),
        "batch_stats": dict.fromkeys(("mean", "var"), images[0, 0, 1] ** 2),
    }
    of_norm = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), of_norm)
    results = [
        jax.jit(functools.partial(module.apply, mutable=["batch_stats"]))(of_norm, images)
        for module in (ours, theirs)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0][0].dtype == dtype


def test_unbiased_batch_norm_keeps_the_variance_of_n_minus_1(assert_matches):
    """And normalises by that of n, like torch."""

    def oracle(images, params, batch_stats, *, train):
        statistics = batch_stats | params
        return oracles.batch_norm(images, **statistics, train=train, unbiased=True)

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            norm = normalization.NORMS["batch_unbiased"](train=train, dtype=None, name="norm")
            nn.share_scope(self, norm)
            return norm(x)

    assert_matches(Norm(), oracle, (2, 2, 1, 3))


def test_no_images_have_logits_and_no_statistics():
    model = create_model("resnet_mini", width=4, stage_sizes=(1,), num_classes=3)
    images = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    assert model.apply(variables, images[:0], train=False).shape == (0, 3)
    with pytest.raises(ValueError, match=r"a batch of shape \(0, 8, 8, 4\) has no statistics"):
        model.apply(variables, images[:0], train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="images of complex64: must be real numbers"):
        model.apply(variables, images.astype(jnp.complex64), train=False)


def test_unbiased_variance_of_one_value_is_refused():
    norm = normalization.batch_norm(train=True, dtype=None, name="norm", unbiased=True)
    variables = norm.init(jax.random.key(0), jnp.zeros((2, 1, 1, 3)))
    with pytest.raises(ValueError, match="unbiased=True: needs two values a channel or more"):
        norm.apply(variables, jnp.zeros((1, 1, 1, 3)), mutable=["batch_stats"])


@pytest.mark.parametrize(("channels", "group_size"), [(32, 16), (24, 8), (10, 2), (7, 1)])
def test_group_norm_takes_groups_of_16_or_the_next_power_of_two(channels, group_size):
    images = np.random.default_rng(0).normal(size=(2, 3, 4, channels)).astype(np.float32)
    norm = normalization.group_norm(train=True, dtype=None, name="norm")

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm(x)

    output, _ = Norm().init_with_output(jax.random.key(0), images)
    ones, zeros = np.ones(channels), np.zeros(channels)
    expected = oracles.group_norm(images, ones, zeros, num_groups=channels // group_size)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_the_head_multiplies_in_the_dtype_of_its_maps_and_adds_up_in_float32():
    """So the gradient of its kernel crosses links in that dtype."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(4, 64)), rng.normal(size=(64, 8))
    x, kernel = (jnp.asarray(each, jnp.bfloat16) for each in (x, kernel))
    logits, pull_back = jax.vjp(product, x, kernel)
    exact = [np.asarray(each, np.float64) for each in (x, kernel)]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact[0] @ exact[1], rtol=1e-5, atol=1e-5)
    of_x, of_kernel = pull_back(jnp.ones_like(logits))
    assert (of_x.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(of_kernel, np.float64)[:, 0], exact[0].sum(0), rtol=1e-2, atol=1e-2
    )
