"""BatchNorm that pools first: the same numbers as a pooling behind it."""

import functools

import flax.linen as nn
import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import EPSILON

from cnn_jax.models.batch_statistics import normalize, normalize_pooled
from cnn_jax.models.layers import ConvBlock
from cnn_jax.models.normalization import BatchNorm, batch_norm, group_norm
from cnn_jax.models.pooling import max_pool
from cnn_jax.runtime import hlo
from cnn_jax.training.freezing import frozen_statistics

pool = functools.partial(max_pool, window=3, strides=2, padding=1)


def ours(x, scale, bias, rectify=True):
    return normalize_pooled(x, pool, scale, bias, EPSILON, rectify, x.dtype)


def behind(x, scale, bias, rectify=True):
    y, mean, var = normalize(x, scale, bias, EPSILON, rectify, x.dtype)
    return pool(y), mean, var


def numbers(shape=(4, 7, 8, 6), seed=0):
    """A feature map, and scales of which some are negative."""
    rng = np.random.default_rng(seed)
    scale = rng.normal(size=shape[-1])
    assert (scale < 0).any()
    assert (scale > 0).any()
    return rng.normal(size=shape) + 0.5, scale, rng.normal(size=shape[-1])


@pytest.mark.parametrize("rectify", [False, True])
def test_values_and_gradients_are_those_of_a_pooling_behind(rectify):
    """Of the formula as it is written in a book, also those that come in by mean and variance."""

    def formula(x, scale, bias):
        y, mean, var = formulas.batch_norm(x, scale, bias, rectify)
        return pool(y), mean, var

    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=size) for size in ((4, 4, 4, 6), (6,), (6,)))
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(jnp.asarray, (numbers(), cotangents))
        values, pull_back = jax.vjp(functools.partial(ours, rectify=rectify), *arguments)
        expected, pull_back_formula = jax.vjp(formula, *arguments)
        gradients = pull_back(cotangents), pull_back_formula(cotangents)
    for found, wanted in [*zip(values, expected, strict=True), *zip(*gradients, strict=True)]:
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_a_pooling_behind_bit_for_bit(dtype):
    x, scale, bias = numbers((16, 15, 15, 24))
    scale[0] = 0
    arguments = jnp.asarray(x, dtype), *(jnp.asarray(each, jnp.float32) for each in (scale, bias))
    for found, wanted in zip(jax.jit(ours)(*arguments), jax.jit(behind)(*arguments), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize(("of", "place"), [(ours, 2), (behind, 0)])
def test_among_equals_by_rounding_the_gradient_goes_to_the_largest(of, place):
    """The one difference: behind a norm, the first of the equals has it."""
    x = np.asarray([1.0, 2.0, 4.0, 3.0])
    (gradient,) = jax.grad(lambda x: jnp.sum(of(x, jnp.ones(1), jnp.full(1, 1e9))[0]), (0,))(
        jnp.asarray(x, jnp.float32).reshape(1, 2, 2, 1)
    )
    centred, deviation = x - x.mean(), np.sqrt(x.var() + EPSILON)
    expected = (np.eye(4)[place] - 1 / 4) / deviation
    expected -= centred[place] * centred / (4 * deviation**3)
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-5)


class Centred(BatchNorm):
    """A norm of one's own, which knows of no pooling."""

    def __call__(self, x, *, rectify=False):
        return super().__call__(x - x.mean(), rectify=rectify)


def centred(*, train, dtype, name):
    return Centred(use_running_average=not train, dtype=dtype, name=name)


BLOCKS = {
    "as it is": {},
    "without activation": {"act": None},
    "unbiased": {"norm": functools.partial(batch_norm, unbiased=True)},
    "negative scales": {
        "norm": functools.partial(batch_norm, scale_init=nn.initializers.normal(1.0))
    },
    "a product": {"kernel_size": 1, "padding": 0, "use_bias": False},
    "groups of images": {"norm": functools.partial(batch_norm, group_size=4)},
    "an activation that falls": {"act": nn.gelu},
    "another norm": {"norm": group_norm},
    "a norm of one's own": {"norm": centred},
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("arguments", BLOCKS.values(), ids=BLOCKS)
def test_a_block_that_pools_is_a_block_and_a_pooling(arguments, train):
    """Outputs, gradients and statistics; the same parameters from the same key."""
    images = np.random.default_rng(0).normal(size=(8, 9, 8, 4))
    block = ConvBlock(16, **arguments)
    pooling = block.clone(max_pool=pool)
    variables, others = (
        jax.jit(functools.partial(each.init, train=train))(jax.random.key(3), images)
        for each in (pooling, block)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, others))

    def derived(model, follow):
        exact, pixels = jax.tree.map(
            functools.partial(jnp.asarray, dtype=float), (variables, images)
        )

        def loss(params):
            y, updated = model.apply(
                exact | {"params": params}, pixels, train=train, mutable=["batch_stats"]
            )
            y = follow(y)
            return jnp.sum(jnp.sin(3 * y)), (y, updated)

        return jax.jit(jax.grad(loss, has_aux=True))(exact["params"])

    with jax.enable_x64(True):
        found, expected = derived(pooling, lambda y: y), derived(block, pool)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected
    )


@pytest.mark.parametrize("train", [True, False])
def test_norms_of_the_batch_pool(train):
    """Layers evaluate in their usual order, for those who look at them."""
    images = jax.ShapeDtypeStruct((8, 9, 8, 4), jnp.float32)
    first = set()
    for name, arguments in BLOCKS.items():
        block = ConvBlock(16, max_pool=pool, **arguments)
        _, captured = jax.eval_shape(
            lambda images, block=block: block.init_with_output(
                jax.random.key(0), images, train=train, capture_intermediates=True
            ),
            images,
        )
        output = captured["intermediates"]["norm"]["__call__"][-1]
        first |= {name} if output.shape == (8, 5, 4, 16) else set()
    assert first == (set(list(BLOCKS)[:5]) if train else set())


def test_a_frozen_norm_pools_what_it_makes_of_its_running_statistics():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 4)), jnp.float32)
    model = ConvBlock(16, max_pool=pool)
    variables = model.init(jax.random.key(0), images, train=True)
    with frozen_statistics(lambda path: path == "norm/scale"):
        output, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    expected = model.apply(variables, images, train=False)
    assert output.shape == (8, 3, 3, 16)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, updated["batch_stats"], variables["batch_stats"])
    )


def test_moves_fewer_bytes():
    """Values and gradients of a norm, a ReLU and a pooling, beside the pooling behind."""
    x, row = jnp.zeros((16, 32, 32, 16)), jnp.ones(16)

    def traffic(of):
        gradient = jax.jit(jax.grad(lambda *all_: jnp.sum(of(*all_)[0] ** 2), (0, 1, 2)))
        return hlo.traffic(hlo.read(gradient.lower(x, row, row).compile().as_text())).total

    assert traffic(ours) < 0.95 * traffic(behind)
