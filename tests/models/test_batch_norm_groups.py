"""BatchNorm by groups of images: outputs, gradients and running statistics against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax import create_model
from cnn_jax.models.normalization import BatchNorm, pooled

SHAPE = (12, 3, 4, 5)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=SHAPE) + 3 * RNG.normal(size=(12, 1, 1, 5))  # no two groups alike
PARAMS = {"scale": RNG.uniform(0.5, 1.5, 5), "bias": RNG.normal(size=5)}


def statistics(rows=None):
    shape = (5,) if rows is None else (rows, 5)
    rng = np.random.default_rng(rows)
    return {"mean": rng.normal(size=shape), "var": rng.uniform(0.5, 1.5, shape)}


def oracle(images, size, kept, *, unbiased=False):
    """Each group normalised alone, and the running statistics moved by a row's images together."""
    groups = [images[i : i + size] for i in range(0, len(images), size)]
    zeros = {"mean": np.zeros(5), "var": np.ones(5)}
    outputs = [oracles.batch_norm(group, **PARAMS, **zeros, train=True)[0] for group in groups]
    rows = np.atleast_2d(kept["mean"]).shape[0]
    moved = [
        oracles.batch_norm(
            part,
            **PARAMS,
            mean=np.atleast_2d(kept["mean"])[row],
            var=np.atleast_2d(kept["var"])[row],
            train=True,
            unbiased=unbiased,
        )[1]
        for row, part in enumerate(np.split(images, rows))
    ]
    shape = kept["mean"].shape
    new = {name: np.stack([each[name] for each in moved]).reshape(shape) for name in kept}
    return np.concatenate(outputs), new


def apply(images, kept, *, use_running_average=False, **arguments):
    module = BatchNorm(use_running_average=use_running_average, **arguments)
    with jax.enable_x64(True):
        variables = {"params": PARAMS, "batch_stats": kept}
        return jax.device_get(module.apply(variables, images, mutable=["batch_stats"]))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("size", "rows"), [(1, None), (3, None), (12, None), (3, 4), (3, 2), (2, 3), (6, 2), (12, 1)]
)
def test_groups_and_rows_equal_the_oracle(size, rows, unbiased):
    kept = statistics(rows)
    output, updated = apply(IMAGES, kept, group_size=size, unbiased=unbiased)
    expected, moved = oracle(IMAGES, size, kept, unbiased=unbiased)
    np.testing.assert_allclose(output, expected, atol=1e-9)
    for name, values in moved.items():
        np.testing.assert_allclose(updated["batch_stats"][name], values, atol=1e-9)


@pytest.mark.parametrize("size", [3, 12])
def test_gradients_are_the_slopes_of_the_oracle(size):
    """Of images, scale and bias, along random directions."""
    weights = RNG.normal(size=SHAPE)
    kept = statistics()
    module = BatchNorm(use_running_average=False, group_size=size)

    def loss(images, params):
        output, _ = module.apply(
            {"params": params, "batch_stats": kept}, images, mutable=["batch_stats"]
        )
        return jnp.sum(output * weights)

    with jax.enable_x64(True):
        by_images, by_params = jax.device_get(jax.grad(loss, argnums=(0, 1))(IMAGES, PARAMS))

    def exact(images, scale, bias):
        zeros = {"mean": np.zeros(5), "var": np.ones(5)}
        groups = np.split(images, 12 // size)
        outputs = [
            oracles.batch_norm(group, scale, bias, **zeros, train=True)[0] for group in groups
        ]
        return np.sum(np.concatenate(outputs) * weights)

    for _ in range(5):
        d_images, d_scale, d_bias = (RNG.normal(size=s) for s in (SHAPE, (5,), (5,)))
        far, near = (
            exact(IMAGES + h * d_images, PARAMS["scale"] + h * d_scale, PARAMS["bias"] + h * d_bias)
            for h in (1e-6, -1e-6)
        )
        slope = np.sum(by_images * d_images) + by_params["scale"] @ d_scale
        slope += by_params["bias"] @ d_bias
        np.testing.assert_allclose(slope, (far - near) / 2e-6, rtol=1e-6)


def test_evaluation_pools_the_rows():
    """Means and second moments: what two halves of a sample say together is what the whole says."""
    sample = RNG.normal(size=(4, 50, 5)) + 5 * RNG.normal(size=(4, 1, 5))
    kept = {"mean": sample.mean(axis=1), "var": sample.var(axis=1)}
    whole = {"mean": sample.reshape(-1, 5).mean(axis=0), "var": sample.reshape(-1, 5).var(axis=0)}
    assert np.abs(kept["var"].mean(axis=0) - whole["var"]).min() > 1, "not the mean of variances"
    with jax.enable_x64(True):
        mean, var = jax.device_get(pooled(jnp.asarray(kept["mean"]), jnp.asarray(kept["var"])))
    np.testing.assert_allclose(mean, whole["mean"], rtol=1e-12)
    np.testing.assert_allclose(var, whole["var"], rtol=1e-12)
    for size in (None, 4):
        output, updated = apply(IMAGES, kept, use_running_average=True, group_size=size)
        expected, _ = oracles.batch_norm(IMAGES, **PARAMS, **whole, train=False)
        np.testing.assert_allclose(output, expected, atol=1e-9)
        np.testing.assert_array_equal(updated["batch_stats"]["mean"], kept["mean"])


@pytest.mark.parametrize(
    ("arguments", "rows", "message"),
    [
        ({"group_size": 5}, None, "group_size=5: must divide the 12 images of a batch"),
        ({"group_size": 0}, None, "group_size=0: must divide the 12 images of a batch"),
        ({"group_size": 4}, 2, "group_size=4: makes 3 groups of a batch, which must divide into"),
        ({}, 2, "group_size=None: makes 1 groups of a batch, which must divide into the 2 rows"),
    ],
)
def test_groups_that_do_not_divide_are_refused(arguments, rows, message):
    with pytest.raises(ValueError, match=message):
        apply(IMAGES, statistics(rows), **arguments)


@pytest.mark.parametrize("name", ["googlenet_mini", "cbam_resnet_mini"])
def test_every_norm_of_a_model_has_the_groups(name):
    """A model of two groups of images gives each what it gives it alone."""
    images = jnp.asarray(RNG.normal(size=(4, 8, 8, 3)), jnp.float32)
    dropout = {"rngs": {"dropout": jax.random.key(0)}}
    model = create_model(name, num_classes=3, features_only=True)
    grouped = model.clone(batch_norm_group_size=2)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()

    @jax.jit
    def call(images):
        both, _ = grouped.apply(variables, images, train=True, mutable=["batch_stats"], **dropout)
        halves = [
            model.apply(variables, half, train=True, mutable=["batch_stats"], **dropout)[0]
            for half in jnp.split(images, 2)
        ]
        return both, jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *call(images))


def test_a_model_without_batch_norm_refuses_groups():
    model = create_model("convnext_mini", batch_norm_group_size=2)
    with pytest.raises(ValueError, match="batch_norm_group_size=2: must be None with norm='layer'"):
        model.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), train=False)
