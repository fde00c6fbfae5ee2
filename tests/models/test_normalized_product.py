"""BatchNorm of a product from the covariance of its input: against the formula, in float64."""

import functools

import flax.linen as nn
import formulas
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from formulas import EPSILON

from cnn_jax.models import normalized_product
from cnn_jax.models.initialization import KAIMING
from cnn_jax.models.layers import ConvBlock, relu
from cnn_jax.models.normalization import BatchNorm, batch_norm
from cnn_jax.models.normalized_product import (
    MOST_CHANNELS,
    MOST_CHANNELS_ON_CPU,
    normalize_product,
    pays,
)
from cnn_jax.runtime import hlo
from cnn_jax.training.freezing import frozen_statistics


def formula(x, kernel, scale, bias):
    return formulas.batch_norm(x @ kernel, scale, bias)


def ours(x, kernel, scale, bias):
    return normalize_product(x, kernel, scale, bias, EPSILON, x.dtype)


def numbers(channels, features, *, images=4, size=(5, 3), seed=0):
    """Behind a ReLU, as a block has it."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(images, *size, channels)), 0)
    kernel = rng.normal(size=(channels, features)) / np.sqrt(channels)
    return x, kernel, rng.normal(size=features), rng.normal(size=features)


@pytest.mark.parametrize("channels", [6, MOST_CHANNELS_ON_CPU + 1])
def test_values_and_gradients_are_those_of_the_formula(channels):
    """The gradients that come in through mean and variance too; both ways that a CPU has."""
    arguments = numbers(channels, 14)
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=size) for size in ((4, 5, 3, 14), (14,), (14,)))
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(jnp.asarray, (arguments, cotangents))
        values, pull_back = jax.vjp(ours, *arguments)
        expected, pull_back_formula = jax.vjp(formula, *arguments)
        gradients = pull_back(cotangents), pull_back_formula(cotangents)
    for found, wanted in [*zip(values, expected, strict=True), *zip(*gradients, strict=True)]:
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_second_derivatives_are_those_of_the_formula():
    arguments, directions = numbers(3, 7), numbers(3, 7, seed=1)
    with jax.enable_x64(True):
        curvatures = [
            jax.jvp(
                jax.grad(lambda *all_, of=of: jnp.sum(of(*all_)[0] ** 3), argnums=(0, 1, 2, 3)),
                tuple(map(jnp.asarray, arguments)),
                tuple(map(jnp.asarray, directions)),
            )[1]
            for of in (ours, formula)
        ]
    for found, wanted in zip(*curvatures, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-9)


def plain(x, kernel, scale, bias):
    """The same network's other way, BatchNorm behind the product."""
    return normalized_product._of_output(x, kernel, scale, bias, epsilon=EPSILON, dtype=x.dtype)


@pytest.mark.parametrize(
    ("dtype", "mean"), [("float32", 0), ("float32", 30), ("bfloat16", 0), ("bfloat16", 3)]
)
def test_rounds_as_a_norm_behind_the_product_does(dtype, mean):
    """Values and gradients of 6,400 pixels, also of inputs whose mean is 5 and 50 deviations."""
    x, kernel, scale, bias = numbers(16, 64, images=16, size=(20, 20))
    x = jnp.asarray(x + mean, dtype)
    y_bar = np.random.default_rng(1).normal(size=(*x.shape[:3], 64)) + 0.5
    y_bar = jnp.asarray(y_bar, dtype)
    parameters = [jnp.asarray(each, jnp.float32) for each in (kernel, scale, bias)]

    def derived(of, x, y_bar, *parameters):
        y, pull_back = jax.vjp(lambda *arguments: of(*arguments)[0], x, *parameters)
        return y, *pull_back(y_bar)

    found, other = (derived(of, x, y_bar, *parameters) for of in (ours, plain))
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(each, np.float64)) for each in (x, y_bar, *parameters))
        wanted = derived(formula, *exact)
    for ours_, theirs, right in zip(found, other, wanted, strict=True):
        right = np.asarray(right)
        errors = [np.linalg.norm(np.asarray(each, np.float64) - right) for each in (ours_, theirs)]
        assert errors[0] <= 3 * errors[1] + 3e-7 * np.linalg.norm(right)


wide = functools.partial(ConvBlock, 16, kernel_size=1, padding=0, use_bias=False)
"""A 1x1 block that widens, made as blocks are made."""


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("strides", [1, 2])
def test_a_block_trains_as_the_oracle_does(strides, unbiased):
    """Outputs, and the running statistics, of which the unbiased count the outputs."""
    norm = functools.partial(batch_norm, unbiased=unbiased)
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype(np.float32)
    model = wide(norm=norm, strides=strides)
    variables = model.init(jax.random.key(0), images, train=True)
    output, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    params, kept = (variables[kind] for kind in ("params", "batch_stats"))
    expected, moved = oracles.batch_norm(
        np.asarray(images[:, ::strides, ::strides], np.float64)
        @ np.asarray(params["conv"]["kernel"][0, 0], np.float64),
        **{name: np.asarray(value, np.float64) for name, value in params["norm"].items()},
        **{name: np.asarray(value, np.float64) for name, value in kept["norm"].items()},
        train=True,
        unbiased=unbiased,
    )
    np.testing.assert_allclose(output, np.maximum(expected, 0), rtol=1e-5, atol=1e-6)
    for name, value in moved.items():
        np.testing.assert_allclose(
            updated["batch_stats"]["norm"][name], value, rtol=1e-5, atol=1e-7
        )


def products(model, *, train=True, images=None):
    """Returns whether the block normalises a product instead of a feature map."""
    images = jnp.zeros((8, 6, 6, 4)) if images is None else images
    found = []

    def watch(call, arguments, named, context):
        if isinstance(context.module, BatchNorm):
            found.append("kernel" in named)
        return call(*arguments, **named)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=train))
    (found,) = found
    return found


def test_what_is_normalised_as_a_product():
    assert products(wide())
    assert products(wide(strides=2)), "72 pixels of 16 channels"
    assert not products(wide(), train=False)
    assert not products(wide(use_bias=True))
    assert not products(wide(norm=functools.partial(batch_norm, group_size=4)))
    assert not products(wide(strides=2), images=jnp.zeros((1, 6, 6, 4))), "9 pixels"
    assert not products(wide(), images=jnp.zeros((8, 6, 6, 9))), "does not widen twofold"


def test_what_pays():
    assert pays((256, 14, 14, MOST_CHANNELS), 4 * MOST_CHANNELS)
    assert not pays((256, 14, 14, 2 * MOST_CHANNELS), 8 * MOST_CHANNELS)


def test_has_the_parameters_of_a_block_that_convolves():
    images = jnp.ones((8, 6, 6, 4))
    trees = [wide().init(jax.random.key(3), images, train=train) for train in (True, False)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.all(jax.tree.map(np.array_equal, *trees))


def test_a_frozen_norm_behind_a_product_uses_its_running_statistics():
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype(np.float32)
    model = wide()
    variables = model.init(jax.random.key(0), images, train=True)
    statistics = variables["batch_stats"]["norm"]
    statistics = {"mean": statistics["mean"] + 0.5, "var": statistics["var"] * 2}
    variables |= {"batch_stats": {"norm": statistics}}
    with frozen_statistics(lambda path: path == "norm/scale"):
        output, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    expected = model.apply(variables, images, train=False)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, updated["batch_stats"], variables["batch_stats"])
    )


def halved(features, **arguments):
    conv = KAIMING.conv(features, **arguments)
    return lambda x: conv(x) / 2


def masked(features, **arguments):
    return KAIMING.conv(features, **arguments, mask=jnp.full((1, 1, 4, features), 0.5))


@pytest.mark.parametrize("conv", [halved, masked])
def test_other_convolutions_are_asked_to_convolve(conv):
    """Whoever brings a convolution of his own gets it called."""
    model = wide(conv=conv)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 4)), jnp.float32)
    variables = model.init(jax.random.key(0), images, train=True)
    _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    halves = np.asarray(images) @ np.asarray(variables["params"]["conv"]["kernel"][0, 0]) / 2
    np.testing.assert_allclose(
        updated["batch_stats"]["norm"]["mean"], 0.1 * halves.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )


def test_moves_fewer_bytes():
    """A step of a block beside one that normalises groups as large as the batch: the same norm."""
    features, images = 64, jnp.zeros((16, 16, 16, 16))
    identity = jnp.zeros((16, 16, 16, features))

    def step(group_size):
        norm = functools.partial(batch_norm, group_size=group_size)
        block = ConvBlock(features, kernel_size=1, padding=0, use_bias=False, norm=norm, act=None)
        variables = block.init(jax.random.key(0), images, train=True)

        def loss(params, images, identity):
            y, _ = block.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(relu(y + identity))

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = gradient.lower(variables["params"], images, identity).compile()
        return hlo.traffic(hlo.read(compiled.as_text())).total

    assert step(None) < 0.75 * step(16)


def test_strides_are_those_of_the_convolution():
    def unstrided(features, **arguments):
        return KAIMING.conv(features, **(arguments | {"strides": (1, 1)}))

    block = wide(strides=2, conv=unstrided)
    images = jnp.ones((8, 6, 6, 4))
    shapes = [
        jax.eval_shape(
            lambda train=train: block.init_with_output(jax.random.key(0), images, train=train)
        )
        for train in (True, False)
    ]
    assert shapes[0][0].shape == shapes[1][0].shape == (8, 6, 6, 16)


def test_a_norm_of_ones_own_gets_the_feature_map():
    class Centred(BatchNorm):
        def __call__(self, x, *, rectify=False):
            assert x.shape[-1] == 16
            return super().__call__(x - x.mean(), rectify=rectify)

    def norm(*, train, dtype, name):
        return Centred(use_running_average=not train, dtype=dtype, name=name)

    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 4)), jnp.float32)
    output, _ = wide(norm=norm).init_with_output(jax.random.key(0), images, train=True)
    assert output.shape == (8, 6, 6, 16)


def test_trains_on_a_mesh_of_explicit_axes():
    """What JAX makes unless told otherwise; this package's own meshes leave it to the compiler."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype(np.float32)
    model = wide()
    variables = model.init(jax.random.key(0), images, train=True)

    @jax.jit
    def gradient(variables, images):
        def loss(params):
            y, _ = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss)(variables["params"])

    expected = gradient(variables, images)
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        found = gradient(variables, jax.device_put(images, rows))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(("platform", "barriers"), [("cuda", 1), ("tpu", 0), ("cpu", 0)])
@pytest.mark.parametrize("channels", [16, MOST_CHANNELS_ON_CPU + 8])
def test_accelerators_never_make_the_product(platform, barriers, channels):
    """For the statistics alone, a program for each has no array of the size of x W; a CPU's may."""
    pixels, features = (4, 5, 3), 2 * channels
    shapes = [(*pixels, channels), (channels, features), (features,), (features,)]
    traced = jax.jit(lambda *arguments: ours(*arguments)[1:]).trace(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    makes_it = f"tensor<60x{features}xf32>" in text or f"tensor<4x5x3x{features}xf32>" in text
    assert makes_it == (platform == "cpu" and channels > MOST_CHANNELS_ON_CPU)
    assert text.count("stablehlo.optimization_barrier") == barriers
