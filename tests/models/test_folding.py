"""BatchNorm folded into convolutions: no BatchNorm left, and the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import create_model
from cnn_jax.models.folding import fold_batch_norms

FOLDED = {
    "resnet_mini": {"norm": "batch_unbiased", "remat": "block"},
    "bottleneck_mini": {"zero_init_last": True},
    "resnext_mini": {"batch_norm_group_size": 2},
    "seresnet_mini": {},
    "googlenet_mini": {},
    "modern_cnn_literal": {"stage_sizes": (1, 1), "width": 4},
}
LEFT = {
    "cbam_resnet_mini": {},  # a convolution without a bias even where there is no norm
    "convnext_mini": {"norm": "batch"},  # norms before convolutions
    "resnet_mini": {"norm": "group"},
}


def trained_model(name, arguments, images):
    """A network whose scales, biases and statistics are as different as training makes them."""
    model = create_model(name, num_classes=10, **arguments)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng, of_kernels = np.random.default_rng(0), np.random.default_rng(1)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            deviation = np.sqrt(2 / np.prod(shape[:-1]))
            return jnp.asarray(of_kernels.normal(0, deviation, shape), jnp.float32)
        low, high = {"scale": (0.5, 1.5), "var": (0.1, 3.0)}.get(name, (-0.3, 0.3))
        return jnp.asarray(rng.uniform(low, high, shape), jnp.float32)

    return model, jax.tree.map_with_path(draw, shapes)


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


@pytest.mark.parametrize("name", FOLDED)
def test_the_same_logits_without_batch_norms(name, images):
    model, variables = trained_model(name, FOLDED[name], images)
    folded, weights = fold_batch_norms(model, variables, images)
    assert folded.norm == "none"
    assert set(weights) == {"params"}
    expected = jax.jit(lambda: model.apply(variables, images, train=False))()
    found = jax.jit(lambda: folded.apply(weights, images, train=False))()
    assert float(jnp.ptp(expected)) > 0.1
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_a_folded_block_is_the_formula_in_float64(images):
    model, variables = trained_model("resnet_mini", {}, images)
    _, weights = fold_batch_norms(model, variables, images)
    before, stats = variables["params"]["stem"], variables["batch_stats"]["stem"]["norm"]
    factor = np.float64(before["norm"]["scale"]) / np.sqrt(np.float64(stats["var"]) + 1e-5)
    after = weights["params"]["stem"]["conv"]
    kernel = np.float64(before["conv"]["kernel"]) * factor
    np.testing.assert_allclose(after["kernel"], kernel, rtol=1e-7)
    bias = before["norm"]["bias"] - stats["mean"] * factor
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_that_cannot_be_folded_is_left(name, images):
    model, variables = trained_model(name, LEFT[name], images)
    found = fold_batch_norms(model, variables, images)
    assert found[0] is model
    assert found[1] is variables
