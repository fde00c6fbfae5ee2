"""Pools against NumPy; torch's rules for edges are compared with torch in tests/parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import pooling

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 7, 6, 3)).astype(np.float32)


@pytest.mark.parametrize("pool", [pooling.max_pool, pooling.average_pool])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0, "strides": 1}, "window=0, strides=1, padding=0: .* >= 1"),
        ({"window": 2, "strides": 0}, "window=2, strides=0, padding=0: .* >= 1"),
        ({"window": 2, "strides": 1, "padding": 2}, "padding=2: .* half the window"),
        ({"window": 9, "strides": 1}, "window=9, padding=0: .* 7 x 6 pixels"),
        ({"window": (1, 2, 3), "strides": 1}, r"\(1, 2, 3\): must be one number of pixels or"),
    ],
)
def test_windows_that_cannot_be_are_refused(pool, arguments, message):
    with pytest.raises(ValueError, match=message):
        pool(IMAGES, **arguments)


def test_average_pool_counts_the_padding_or_not():
    ones = jnp.ones((1, 4, 4, 1))
    pool = functools.partial(pooling.average_pool, window=3, strides=2, padding=1)
    assert pool(ones)[0, :, :, 0].tolist() == pytest.approx(np.array([[4, 6], [6, 9]]) / 9)
    assert pool(ones, count_include_pad=False)[0, :, :, 0].tolist() == [[1, 1], [1, 1]]
    ceiled = pool(ones, ceil_mode=True, window=2, padding=0)
    assert ceiled.shape == (1, 2, 2, 1)
    odd = jnp.ones((1, 5, 5, 1))
    np.testing.assert_array_equal(pool(odd, ceil_mode=True, window=2, padding=0), 1)


def test_ceil_mode_leaves_no_window_in_the_padding():
    """torch: a window has to begin inside the image or its left padding."""
    row = jnp.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    pooled = pooling.max_pool(row, window=(1, 2), strides=(1, 3), padding=(0, 1), ceil_mode=True)
    assert pooled.ravel().tolist() == [1, 4]


def test_blur_pool_is_the_binomial_filter_over_reflected_edges():
    padded = np.pad(IMAGES.astype(np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    taps = np.array([1, 2, 1]) / 4
    rows = sum(tap * padded[:, i : i + 7] for i, tap in enumerate(taps))
    blurred = sum(tap * rows[:, :, j : j + 6] for j, tap in enumerate(taps))
    np.testing.assert_allclose(pooling.blur_pool(IMAGES), blurred[:, ::2, ::2], rtol=1e-5)
    np.testing.assert_allclose(pooling.blur_pool(IMAGES, strides=1), blurred, rtol=1e-5)


def test_blur_pool_of_a_shifted_image_moves_less_than_taking_every_second_pixel():
    image = np.zeros((1, 16, 16, 1), np.float32)
    image[:, ::2] = 1  # stripes, gone or everywhere once every second row is taken
    shifted = np.roll(image, 1, axis=1)
    assert np.abs(image[:, ::2] - shifted[:, ::2]).max() == 1
    inner = slice(1, -1)
    moved = pooling.blur_pool(image)[:, inner] - pooling.blur_pool(shifted)[:, inner]
    np.testing.assert_array_equal(moved, 0)


@pytest.mark.parametrize(
    ("shape", "arguments"), [((1, 1, 5, 2), {}), ((1, 9, 9, 2), {"kernel_size": 1})]
)
def test_blur_pool_refuses_what_it_cannot_reflect(shape, arguments):
    with pytest.raises(ValueError, match="must be"):
        pooling.blur_pool(jnp.zeros(shape), **arguments)


def test_generalized_mean_is_between_average_and_maximum():
    images = np.abs(IMAGES) + 0.1

    def pooled(power):
        module = pooling.GeneralizedMeanPool(power=power)
        variables = module.init(jax.random.key(0), images)
        assert jax.tree.map(jnp.shape, variables) == {"params": {"power": (1,)}}
        return module.apply(variables, images)

    np.testing.assert_allclose(pooled(1.0), images.mean(axis=(1, 2)), rtol=1e-5)
    expected = (images.astype(np.float64) ** 3).mean(axis=(1, 2)) ** (1 / 3)
    np.testing.assert_allclose(pooled(3.0), expected, rtol=1e-5)
    np.testing.assert_allclose(pooled(60.0), images.max(axis=(1, 2)), rtol=0.08)


def test_generalized_mean_has_a_gradient_where_the_image_is_zero():
    module = pooling.GeneralizedMeanPool()
    images = jnp.zeros((1, 4, 4, 2))
    variables = module.init(jax.random.key(0), images)
    gradients = jax.grad(lambda v, x: module.apply(v, x).sum(), argnums=(0, 1))(variables, images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_largest_is_the_maximum_and_its_gradient_goes_to_the_first_that_is_it():
    values = jnp.asarray([[1.0, 3.0, 3.0], [-2.0, -5.0, -2.0]])
    np.testing.assert_array_equal(pooling.largest(values, (1,)), [3, -2])
    gradient = jax.grad(lambda x: (pooling.largest(x, (1,)) * jnp.array([1.0, 7.0])).sum())
    np.testing.assert_array_equal(gradient(values), [[0, 1, 0], [7, 0, 0]])
    np.testing.assert_array_equal(pooling.global_max_pool(IMAGES), IMAGES.max(axis=(1, 2)))


def test_the_gradient_of_a_maximum_survives_a_compiler_that_computes_twice():
    """As XLA does here without its optimisations: jnp.max then has a gradient of 0 / 0."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 7, 6, 32)), jnp.float32)
    scale, bias = jnp.asarray(rng.uniform(0.5, 1.5, size=(2, 32)), jnp.float32)

    def normalized(x):
        mean = x.mean(axis=(0, 1, 2))
        var = (x * x).mean(axis=(0, 1, 2)) - mean * mean
        factor = jax.lax.rsqrt(var + 1e-5) * scale
        return (x - mean.reshape(1, 1, 1, -1)) * factor.reshape(1, 1, 1, -1) + bias.reshape(
            1, 1, 1, -1
        )

    def gradient(pool):
        return jax.jit(jax.grad(lambda x: (pool(normalized(x)) ** 2).sum()))(images)

    assert np.isfinite(gradient(pooling.global_max_pool)).all()


@pytest.mark.parametrize("name", ["average", "max"])
def test_global_pools_keep_float32(name):
    images = jnp.asarray(IMAGES, jnp.bfloat16)
    assert pooling.POOLS[name](images).dtype == jnp.float32


def gradient_of_max_pool(x, cotangent, window, strides, before):
    """Each cotangent goes to the first of the largest pixels in its window, row by row."""
    result = np.zeros_like(x)
    for image, row, column, channel in np.ndindex(cotangent.shape):
        places = [
            (image, row * strides[0] - before + i, column * strides[1] - before + j, channel)
            for i, j in np.ndindex(*window)
        ]
        inside = [
            place for place in places if 0 <= place[1] < x.shape[1] and 0 <= place[2] < x.shape[2]
        ]
        largest = max(inside, key=lambda place: x[place])  # the first of equal ones
        result[largest] += cotangent[image, row, column, channel]
    return result


@pytest.mark.parametrize(
    ("window", "strides", "padding", "ceil_mode"),
    [((3, 3), (2, 2), 1, False), ((2, 3), (1, 2), 0, True), ((3, 3), (1, 1), 1, False)],
)
def test_the_gradient_of_max_pool_goes_to_the_first_maximum(window, strides, padding, ceil_mode):
    x = RNG.integers(4, size=(2, 7, 6, 3)).astype(np.float64)  # many equal pixels
    with jax.enable_x64(True):
        pool = functools.partial(
            pooling.max_pool, window=window, strides=strides, padding=padding, ceil_mode=ceil_mode
        )
        pooled, pull_back = jax.vjp(pool, jnp.asarray(x))
        cotangent = RNG.normal(size=pooled.shape)
        (gradient,) = pull_back(jnp.asarray(cotangent))
        tangent = jax.jvp(pool, (jnp.asarray(x),), (jnp.asarray(x),))[1]
    expected = gradient_of_max_pool(x, cotangent, window, strides, padding)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(tangent, pooled)  # of a function that is linear along x
    np.testing.assert_array_equal(pooled, pool(x))


@pytest.mark.parametrize(
    ("window", "strides", "sides"),
    [
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((2, 3), (1, 2), ((0, 0), (0, 1))),
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((2, 2), (3, 3), ((0, 0), (1, 0))),  # some pixels stand nowhere
        ((5, 4), (2, 3), ((2, 1), (2, 2))),
    ],
)
def test_an_image_in_parts_has_the_same_places(window, strides, sides):
    """And they send back the same: each form's sum, weighted by place and output."""
    x = RNG.normal(size=(2, 7, 6, 3))

    def seen(places, x):
        return jnp.stack(places(x, window, strides, sides, -1.0))

    with jax.enable_x64(True):
        views, pull_back = jax.vjp(functools.partial(seen, pooling.places_of_slices), x)
        of_parts, pull_back_parts = jax.vjp(functools.partial(seen, pooling.places_of_parts), x)
        cotangent = jnp.asarray(RNG.normal(size=views.shape))
        gradient, of_parts_back = pull_back(cotangent)[0], pull_back_parts(cotangent)[0]
    np.testing.assert_array_equal(of_parts, views)
    np.testing.assert_allclose(of_parts_back, gradient, rtol=1e-12, atol=1e-12)


def test_only_a_gpu_takes_the_image_in_parts():
    def loss(x):
        return jnp.sum(pooling.max_pool(x, window=3, strides=2, padding=1))

    traced = jax.jit(jax.grad(loss)).trace(np.zeros((2, 8, 8, 3), np.float32))
    for platform, strided in {"cpu": True, "cuda": False, "tpu": False}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("0:7:2, 0:7:2" in text) == strided, text


def test_a_window_of_more_pixels_than_a_byte_counts():
    x = np.zeros((1, 12, 12, 1), np.float32)
    x[0, 11, 11] = 1
    gradient = jax.grad(lambda x: jnp.sum(pooling.max_pool(x, window=12, strides=1)))
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    np.testing.assert_array_equal(jax.jit(gradient, compiler_options=options)(x), x)


def test_the_gradient_of_max_pool_scatters_nothing():
    def loss(x):
        return jnp.sum(pooling.max_pool(x, window=3, strides=2, padding=1))

    assert "select_and_scatter" not in jax.jit(jax.grad(loss)).lower(IMAGES).as_text()
