"""How weights start: the distribution of every layer, within what its number of weights allows.

The expected distributions are torchvision's and torch's, by their documentation; fans are counted
here from the kernels' shapes, (height, width, inputs of a group, outputs).
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax import create_model

SIGMAS = 5.0  # one test in 1.7 million would fail by chance; the seeds are fixed


def initial(name, *, shape=(1, 32, 32, 3), seed=0, **arguments):
    """Path and values of every variable of a new model."""
    model = create_model(name, **arguments)
    init = jax.jit(lambda key: model.init(key, jnp.zeros(shape), train=False))
    leaves = flatten_dict(init(jax.random.key(seed)), sep="/")
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}


def assert_normal(values, deviation, path):
    """N(0, deviation**2): mean, variance, and tails that no uniform distribution has."""
    size = values.size
    assert abs(values.mean()) < SIGMAS * deviation / math.sqrt(size), path
    assert abs(values.var() / deviation**2 - 1) < SIGMAS * math.sqrt(2 / size), path
    tail = 0.0455  # of a normal distribution beyond two deviations
    share = np.mean(np.abs(values) > 2 * deviation)
    assert abs(share - tail) < SIGMAS * math.sqrt(tail * (1 - tail) / size), path


def assert_uniform(values, bound, path):
    """U(-bound, bound): mean, variance, and bounds that are kept and nearly reached."""
    size = values.size
    assert np.abs(values).max() <= bound * (1 + 1e-6), path
    # P(none of n beyond b (1 - c / n)) = exp(-c): the same odds as five deviations.
    assert np.abs(values).max() > bound * (1 - 15 / size), path
    assert abs(values.mean()) < SIGMAS * bound / math.sqrt(3 * size), path
    assert abs(3 * values.var() / bound**2 - 1) < SIGMAS * math.sqrt(0.8 / size), path


def assert_norms_start_as_one(leaves):
    for path, values in leaves.items():
        if re.search(r"norm/(scale|bias|mean|var)$", path):
            assert np.all(values == (1 if path.endswith(("scale", "var")) else 0)), path


def fan_in(kernel):
    return math.prod(kernel.shape[:-1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "resnet18", "width": 32, "stage_sizes": (1, 1, 1, 1)},
        {"name": "modern_cnn", "width": 16, "stage_sizes": (1, 2)},
        {"name": "resnext50_32x4d", "width": 16, "groups": 4, "stage_sizes": (1, 1)},
        {"name": "resnet50d", "width": 16, "stage_sizes": (1, 1)},
        {"name": "seresnet50", "width": 16, "stage_sizes": (1, 1)},
        {"name": "modern_cnn_literal", "width": 16, "stage_sizes": (1, 1)},
        {"name": "resnet50", "width": 16, "stage_sizes": (1, 1), "norm": "group"},
    ],
    ids=lambda arguments: f"{arguments['name']}-{arguments.get('norm', 'batch')}",
)
def test_residual_networks_start_as_torchvision_s(arguments):
    """Convolutions N(0, 2 / fan_out); the head as torch's Linear."""
    leaves = initial(num_classes=50, **arguments)
    assert_norms_start_as_one(leaves)
    head = leaves.pop("params/head/kernel")
    assert_uniform(head, 1 / math.sqrt(fan_in(head)), "head/kernel")
    assert_uniform(leaves.pop("params/head/bias"), 1 / math.sqrt(fan_in(head)), "head/bias")
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel")}
    assert len(kernels) >= 7
    for path, kernel in kernels.items():
        fan_out = math.prod(kernel.shape[:-2]) * kernel.shape[-1]
        assert_normal(kernel, math.sqrt(2 / fan_out), path)
    for path, leaf in leaves.items():
        if re.search(r"(conv|reduce|expand)/bias$", path):
            assert np.all(leaf == 0), path


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "resnet50", "width": 16, "stage_sizes": (1, 1)},
        {"name": "resnet50", "width": 16, "stage_sizes": (1, 1), "norm": "none"},
        {"name": "modern_cnn_literal", "width": 16, "stage_sizes": (1, 1)},
        {"name": "resnext50_32x4d", "width": 16, "groups": 4, "stage_sizes": (1, 1)},
        {"name": "seresnet50", "width": 16, "stage_sizes": (1, 1)},
        {"name": "cbam_resnet50", "width": 16, "stage_sizes": (1, 1)},
        {"name": "ecaresnet50", "width": 16, "stage_sizes": (1, 1)},
        {"name": "googlenet", "width": 32, "blocks": ("3a", "4a")},
        {"name": "convnext_tiny", "width": 16, "stage_sizes": (1, 1)},
    ],
    ids=lambda arguments: f"{arguments['name']}-{arguments.get('norm', 'batch')}",
)
def test_the_defaults_of_torch_s_layers(arguments):
    """Weights and biases U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), convolutions and dense alike."""
    leaves = initial(num_classes=50, initialization="torch", **arguments)
    assert_norms_start_as_one(leaves)
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel")}
    for path, kernel in kernels.items():
        bound = 1 / math.sqrt(fan_in(kernel))
        assert_uniform(kernel, bound, path)
        bias = leaves.get(f"{path.removesuffix('kernel')}bias")
        if bias is not None:
            assert_uniform(bias, bound, path)
    assert len(kernels) >= 7


def test_googlenet_starts_as_torchvision_s():
    """All weights N(0, 0.01**2): torchvision cuts at -2 and 2, which no weight reaches."""
    leaves = initial("googlenet", width=32, blocks=("3a", "4a"), num_classes=50)
    assert_norms_start_as_one(leaves)
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel")}
    assert len(kernels) == 3 + 6 + 6 + 1
    for path, kernel in kernels.items():
        assert_normal(kernel, 0.01, path)
    bound = 1 / math.sqrt(leaves["params/head/kernel"].shape[0])
    assert_uniform(leaves["params/head/bias"], bound, "head/bias")


def test_convnext_starts_as_torchvision_s():
    """All weights N(0, 0.02**2), cut at -2 and 2; biases 0; branches scaled by 1e-6."""
    leaves = initial("convnext_tiny", width=16, stage_sizes=(1, 2), num_classes=50)
    assert_norms_start_as_one(leaves)
    scales = [leaf for path, leaf in leaves.items() if path.endswith("layer_scale")]
    assert len(scales) == 3
    assert np.all(np.concatenate(scales) == np.float32(1e-6))
    for path, leaf in leaves.items():
        if path.endswith("kernel"):
            assert_normal(leaf, 0.02, path)
        elif path.endswith("bias"):
            assert np.all(leaf == 0), path


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"name": "resnet18", "width": 8, "stage_sizes": (2, 1)}, "conv2"),
        ({"name": "resnet50", "width": 8, "stage_sizes": (2, 1)}, "conv3"),
        ({"name": "cbam_resnet50", "width": 8, "stage_sizes": (2, 1)}, "conv3"),
        ({"name": "resnet50", "width": 16, "stage_sizes": (1, 1), "norm": "group"}, "conv3"),
    ],
)
def test_zero_init_last_silences_the_last_norm_of_each_block_only(arguments, last):
    leaves = initial(zero_init_last=True, **arguments)
    scales = {path: leaf for path, leaf in leaves.items() if path.endswith("norm/scale")}
    silent = {path for path, leaf in scales.items() if np.all(leaf == 0)}
    assert silent == {path for path in scales if re.search(rf"_block\d+/{last}/norm/scale$", path)}
    assert len(silent) == sum(arguments["stage_sizes"])
    for path in scales.keys() - silent:
        assert np.all(scales[path] == 1), path


def test_two_keys_give_two_networks_and_no_two_layers_are_alike():
    first, again, other = (
        initial("resnet_mini", seed=seed, stage_sizes=(2,), num_classes=5) for seed in (0, 0, 1)
    )
    kernels = [path for path in first if path.endswith("conv/kernel")]
    for path in kernels:
        np.testing.assert_array_equal(first[path], again[path])
        assert not np.any(first[path] == other[path]), path
    same_shape = [first[path] for path in kernels if first[path].shape == (3, 3, 16, 16)]
    assert len(same_shape) == 4
    assert len({one.tobytes() for one in same_shape}) == 4
