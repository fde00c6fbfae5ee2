"""Attention against its formulas in NumPy; all of it meets torch in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from cnn_jax import CBAM, EfficientChannelAttention, SqueezeExcite

SHAPE = (3, 5, 4, 32)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def squeeze_excite(images, params, batch_stats, *, train):
    pooled = oracles.global_average_pool(images)
    narrow = oracles.relu(oracles.dense(pooled, **params["reduce"]))
    gate = sigmoid(oracles.dense(narrow, **params["expand"]))
    return images * gate[:, None, None, :], {}


def efficient_channel(images, params, batch_stats, *, train):
    kernel = params["conv"]["kernel"][:, 0, 0]
    pooled = np.pad(oracles.global_average_pool(images), [(0, 0), (len(kernel) // 2,) * 2])
    gate = sum(w * pooled[:, k : k + images.shape[-1]] for k, w in enumerate(kernel))
    return images * sigmoid(gate)[:, None, None, :], {}


def cbam(images, params, batch_stats, *, train):
    def mlp(pooled):
        channel = params["channel"]
        return oracles.relu(pooled @ channel["reduce"]["kernel"]) @ channel["expand"]["kernel"]

    gate = sigmoid(mlp(images.mean(axis=(1, 2))) + mlp(images.max(axis=(1, 2))))
    images = images * gate[:, None, None, :]
    summary = np.stack([images.mean(axis=-1), images.max(axis=-1)], axis=-1)
    gate, statistics = oracles.conv_block(
        summary,
        params["spatial"],
        batch_stats["spatial"],
        train=train,
        padding=params["spatial"]["conv"]["kernel"].shape[0] // 2,
        act=sigmoid,
    )
    return images * gate, {"spatial": statistics}


@pytest.mark.parametrize(
    ("module", "oracle"),
    [
        (SqueezeExcite(reduction=4), squeeze_excite),
        (EfficientChannelAttention(), efficient_channel),
        (EfficientChannelAttention(kernel_size=5), efficient_channel),
        (CBAM(reduction=8), cbam),
        (CBAM(kernel_size=3), cbam),
    ],
)
def test_attention_is_its_formula(assert_matches, module, oracle):
    assert_matches(module, oracle, SHAPE)


@pytest.mark.parametrize(("channels", "size"), [(8, 3), (64, 3), (128, 5), (256, 5), (2048, 7)])
def test_efficient_channel_attention_sees_more_of_more_channels(channels, size):
    """The odd number nearest to log2(c) / 2 + 1/2, as the paper's figure 3 and timm have it."""
    module = EfficientChannelAttention()
    images = jnp.zeros((1, 2, 2, channels))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    assert jax.tree.leaves(params)[0].shape == (size, 1, 1)


@pytest.mark.parametrize("module", [SqueezeExcite(reduction=16), CBAM(reduction=16)])
def test_a_narrow_layer_has_at_least_one_channel(module):
    images = jnp.zeros((1, 4, 4, 3))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))["params"]
    assert params.get("channel", params)["reduce"]["kernel"].shape == (3, 1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SqueezeExcite(reduction=0), "reduction=0: must be >= 1"),
        (CBAM(reduction=-1), "reduction=-1: must be >= 1"),
        (CBAM(kernel_size=4), "kernel_size=4: must be an odd number >= 1"),
        (EfficientChannelAttention(kernel_size=2), "kernel_size=2: must be an odd number >= 1"),
    ],
)
def test_gates_that_cannot_be_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), train=False))


@pytest.mark.parametrize("module", [SqueezeExcite(), EfficientChannelAttention(), CBAM()])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_a_gate_keeps_the_dtype_of_the_computation(module, dtype):
    module = module.clone(dtype=dtype)
    images = jnp.zeros((1, 8, 8, 32), jnp.bfloat16)
    output, variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), images, train=False)
    )
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
