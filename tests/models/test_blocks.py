"""ResidualBlock and BottleneckBlock against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax import BottleneckBlock, ResidualBlock
from cnn_jax.models import blocks


@pytest.mark.parametrize(
    ("shape", "features", "strides", "project", "arguments"),
    [
        ((2, 6, 6, 3), 3, 1, False, {}),
        ((2, 7, 5, 5), 4, 1, True, {"relu_before_add": False}),
        ((2, 9, 6, 1), 4, 2, True, {"use_bias": False}),
    ],
)
def test_residual_block(assert_matches, shape, features, strides, project, arguments):
    downsample = functools.partial(blocks.projection, features, strides=strides)
    block = ResidualBlock(
        features, strides, downsample=downsample if project else None, **arguments
    )
    assert_matches(
        block,
        oracles.residual_block,
        shape,
        strides=strides,
        project=project,
        relu_before_add=arguments.get("relu_before_add", True),
    )


@pytest.mark.parametrize(
    ("shape", "features", "strides", "expansion", "project", "arguments"),
    [
        ((2, 6, 6, 8), 2, 1, 4, False, {}),
        ((2, 7, 5, 3), 3, 1, 2, True, {"relu_before_add": True, "use_bias": True}),
        ((2, 9, 6, 5), 2, 3, 4, True, {"use_bias": True}),
    ],
)
def test_bottleneck_block(assert_matches, shape, features, strides, expansion, project, arguments):
    downsample = functools.partial(blocks.projection, features * expansion, strides=strides)
    block = BottleneckBlock(
        features,
        strides,
        expansion=expansion,
        downsample=downsample if project else None,
        **arguments,
    )
    assert_matches(
        block,
        oracles.bottleneck_block,
        shape,
        strides=strides,
        project=project,
        relu_before_add=arguments.get("relu_before_add", False),
    )


@pytest.mark.parametrize(
    ("block", "last"), [(ResidualBlock(4), "conv2"), (BottleneckBlock(1), "conv3")]
)
@pytest.mark.parametrize("relu_before_add", [True, False])
def test_relu_before_the_addition(block, last, relu_before_add):
    """A branch of -10 everywhere leaves the identity alone if a ReLU stands before the addition."""
    block = block.clone(relu_before_add=relu_before_add)
    images = np.random.default_rng(0).uniform(size=(2, 5, 5, 4)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape),
        jax.eval_shape(lambda: block.init(jax.random.key(0), images, train=False)),
    )
    variables["params"][last]["norm"] = {"scale": jnp.zeros(4), "bias": jnp.full(4, -10.0)}
    output = block.apply(variables, images, train=False)
    np.testing.assert_array_equal(output, images if relu_before_add else 0 * images)


def test_blocks_by_default_are_the_printed_one_and_resnet_50s():
    def convolutions(block):
        images = jnp.zeros((1, 5, 5, 8))
        params = jax.eval_shape(lambda: block.init(jax.random.key(0), images, train=False))
        return {
            name: jax.tree.map(jnp.shape, layer["conv"]) for name, layer in params["params"].items()
        }

    assert convolutions(ResidualBlock(8)) == {
        "conv1": {"kernel": (3, 3, 8, 8), "bias": (8,)},
        "conv2": {"kernel": (3, 3, 8, 8), "bias": (8,)},
    }
    assert convolutions(BottleneckBlock(2)) == {
        "conv1": {"kernel": (1, 1, 8, 2)},
        "conv2": {"kernel": (3, 3, 2, 2)},
        "conv3": {"kernel": (1, 1, 2, 8)},
    }


@pytest.mark.parametrize(
    "block", [ResidualBlock(4), ResidualBlock(3, strides=2), BottleneckBlock(3)]
)
def test_an_identity_that_does_not_fit_is_refused(block):
    with pytest.raises(ValueError, match=r"downsample=None: .* must be equal.*projection"):
        jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((2, 6, 6, 3)), train=False))


def test_stochastic_depth_keeps_the_mean():
    """Whole images are 0 or divided by what survives; without training nothing happens."""
    images = jnp.ones((4000, 2, 2, 3))
    module = blocks.StochasticDepth(0.25)
    dropped = module.apply({}, images, train=True, rngs={"dropout": jax.random.key(0)})
    values = np.unique(np.asarray(dropped).reshape(4000, -1), axis=0)
    np.testing.assert_allclose(values, [[0.0] * 12, [4 / 3] * 12], rtol=1e-6)
    assert abs(float(dropped.mean()) - 1) < 4 * np.sqrt(0.25 / 0.75 / 4000)
    np.testing.assert_array_equal(module.apply({}, images, train=False), images)


@pytest.mark.parametrize(
    "block",
    [
        ResidualBlock(3, relu_before_add=True, zero_init_last=True),
        BottleneckBlock(3, expansion=1, relu_before_add=True, zero_init_last=True),
    ],
)
def test_a_branch_that_could_never_train_is_refused(block):
    with pytest.raises(ValueError, match=r"zero_init_last=True: .* gradient is 0, and never train"):
        jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((2, 6, 6, 3)), train=False))


def test_a_convnext_block_of_other_channels_is_refused():
    block = blocks.ConvNeXtBlock(4)
    with pytest.raises(ValueError, match="features=4: must be the 3 channels of the input"):
        jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((2, 6, 6, 3)), train=False))
