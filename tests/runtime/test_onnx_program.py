"""Functions in the words of the converter to ONNX: the same numbers, and then the same in ONNX."""

import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cnn_jax import create_model
from cnn_jax.models.pooling import average_pool, max_pool
from cnn_jax.runtime.onnx_program import in_plain_words

pytestmark = pytest.mark.usefixtures("compile_quickly")

INSTALLED = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))
needs_converter = pytest.mark.skipif(
    not INSTALLED, reason='needs pip install jax2onnx onnxruntime "orbax-checkpoint>=0.12.8"'
)

DEEP = {"block": "bottleneck", "stem": "deep", "downsample": "average", "stage_sizes": (1, 1)}


def primitives(jaxpr):
    """Name and parameters of every primitive, also of those inside others."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize("make", [max_pool, average_pool])
@pytest.mark.parametrize(
    ("window", "strides", "padding", "ceil_mode"),
    [(3, 2, 1, False), (3, 2, 0, True), (2, 1, 1, False)],
)
def test_pools_are_those_of_numpy(make, window, strides, padding, ceil_mode):
    x = np.random.default_rng(0).normal(size=(2, 8, 7, 3)).astype(np.float32)
    options = {"window": window, "strides": strides, "padding": padding, "ceil_mode": ceil_mode}
    plain = in_plain_words(lambda x: make(x, **options))
    fill = -np.inf if make is max_pool else np.nan
    wide = np.pad(np.float64(x), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    wide = np.pad(wide, ((0, 0), (0, 9), (0, 9), (0, 0)), constant_values=fill)
    if make is max_pool:
        wide[:, :padding], wide[:, :, :padding] = -np.inf, -np.inf
        wide[:, padding + 8 :], wide[:, :, padding + 7 :] = -np.inf, -np.inf
    found = np.asarray(plain(x))
    expected = np.empty(found.shape)
    for row, column in np.ndindex(*found.shape[1:3]):
        top, left = row * strides, column * strides
        part = wide[:, top : top + window, left : left + window]
        joined = part.max((1, 2)) if make is max_pool else np.nanmean(part, axis=(1, 2))
        expected[:, row, column] = joined
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in primitives(jax.make_jaxpr(plain)(x).jaxpr)]
    assert "platform_index" not in names
    assert "cond" not in names


@pytest.mark.parametrize(
    ("name", "arguments"), [("modern_cnn", {"width": 8, **DEEP}), ("googlenet_mini", {})]
)
def test_a_network_computes_the_same_in_plain_words(name, arguments):
    model = create_model(name, num_classes=4, **arguments)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))

    def logits(images):
        return model.apply(variables, images, train=False)

    plain = in_plain_words(logits)
    np.testing.assert_allclose(
        jax.jit(plain)(images), jax.jit(logits)(images), rtol=1e-5, atol=1e-5
    )
    found = list(primitives(jax.make_jaxpr(plain)(images).jaxpr))
    assert not {"platform_index", "cond", "custom_jvp_call"} & {name for name, _ in found}
    pools = [params["padding"] for name, params in found if name.startswith("reduce_window")]
    assert not np.any(pools)  # which is all that the converter takes


IN_A_PROCESS = """
import jax, jax.numpy as jnp, numpy as np
from cnn_jax import create_model
from cnn_jax.runtime.onnx_program import convert_to_onnx, run_onnx

for name, arguments in NETWORKS:
    model = create_model(name, num_classes=4, **arguments)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    init = jax.jit(lambda key: model.init(key, pixels / 255.0, train=False))
    variables = init(jax.random.key(0))

    def probabilities(images):
        logits = model.apply(variables, images.astype(jnp.float32) / 255 - 0.5, train=False)
        return jax.nn.softmax(logits)

    found = run_onnx(convert_to_onnx(probabilities, (32, 32, 3), {}), pixels)
    expected = np.asarray(jax.jit(probabilities)(pixels))
    print(name, found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5)
"""


@pytest.mark.slow
@needs_converter
def test_networks_of_every_kind_are_converted_right():
    networks = [("modern_cnn", {"width": 8, "anti_alias": blur, **DEEP}) for blur in (False, True)]
    minis = ("googlenet", "convnext", "cbam_resnet", "seresnet", "ecaresnet", "resnext")
    networks += [(f"{name}_mini", {}) for name in minis]
    result = subprocess.run(  # of its own: the converter changes flax and jax while it works
        [sys.executable, "-c", f"NETWORKS = {networks}{IN_A_PROCESS}"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} True" for name, _ in networks]
