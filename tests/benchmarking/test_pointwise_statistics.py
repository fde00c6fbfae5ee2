"""The kernel that adds up what it makes, on the CPU by Pallas's interpreter, against NumPy."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pointwise_statistics
from cnn_jax import create_model


@pytest.mark.parametrize("blocks", pointwise_statistics.BLOCKS, ids=str)
def test_outputs_mean_and_variance(blocks):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1, 2, (4, 8, 8, 128)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(128, 256)), jnp.bfloat16)
    y, mean, var = pointwise_statistics.of_kernel(x, kernel, blocks=blocks, interpret=True)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-3)
    rounded = np.asarray(y, np.float64).reshape(-1, 256)
    np.testing.assert_allclose(mean, rounded.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(var, rounded.var(0), rtol=1e-4)


def test_the_layers_are_those_of_a_resnet50():
    model, found = create_model("resnet50"), Counter()

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        if isinstance(module, nn.Conv) and (module.kernel_size, module.strides) == ((1, 1), (1, 1)):
            found[output.shape[1], args[0].shape[3], output.shape[3]] += 1
        return output

    with nn.intercept_methods(watch):
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert found == pointwise_statistics.LAYERS
