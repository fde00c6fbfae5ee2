"""Class activation maps against float64 NumPy, and where the evidence is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import create_model
from cnn_jax.models.explaining import (
    class_activation_map,
    effective_receptive_field,
    feature_maps,
)
from cnn_jax.models.geometry import grouped, layers


@pytest.fixture(scope="module")
def network():
    """A small network, its variables and images, seen by its channels and its head alone."""
    model = create_model("resnet_mini", num_classes=4, width=4, stage_sizes=(1, 1))
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    return model, variables, images


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam++"])
def test_maps_of_the_last_stage_by_their_formulas(network, method):
    model, variables, images = network
    classes = np.array([0, 3, 1])
    found = class_activation_map(model, variables, images, classes, method=method)
    A = np.asarray(model.apply(variables, images, train=False, method="stages")[-1], np.float64)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    expected = np.zeros(A.shape[:3])
    for image, label in enumerate(classes):
        for k in range(A.shape[-1]):
            g = kernel[k, label] / A[0, ..., 0].size  # the head is a mean and a product
            weight = g
            if method == "grad_cam++":
                share = g**2 / (2 * g**2 + g**3 * A[image, ..., k].sum())
                weight = A[0, ..., 0].size * share * max(g, 0)
            expected[image] += weight * A[image, ..., k]
    expected = np.maximum(expected, 0)
    assert expected.max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_inside_has_the_gradient_of_a_finite_difference(network):
    model, variables, images = network
    stem = np.asarray(feature_maps(model, variables, images)["stem"])
    found = class_activation_map(model, variables, images, np.array([2, 2, 2]), layer="stem")

    def mean_gradient(channel: int, step: float = 1e-2) -> np.ndarray:
        """Of each image, by adding to all pixels of one channel of the stem."""

        def logits(amount: float) -> np.ndarray:
            def change(call, args, kwargs, context):
                output = call(*args, **kwargs)
                is_stem = context.module.path == ("stem",) and context.method_name == "__call__"
                return output.at[..., channel].add(amount) if is_stem else output

            with nn.intercept_methods(change):
                return np.asarray(model.apply(variables, images, train=False))[:, 2]

        return (logits(step) - logits(-step)) / (2 * step) / stem[0, ..., 0].size

    weights = np.stack([mean_gradient(k) for k in range(stem.shape[-1])], axis=-1)
    expected = np.maximum((stem * weights[:, None, None, :]).sum(axis=-1), 0)
    np.testing.assert_allclose(found, expected, atol=0.03 * expected.max())


class Curved(nn.Module):
    """Of which everything behind the layer `inner` bends, so that each place has its gradient."""

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = jnp.tanh(nn.Conv(3, (3, 3), name="inner")(images))
        x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False, name="outer")(x)
        return nn.Dense(2, use_bias=False, name="head")((x**2).mean((1, 2)))


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam++"])
@pytest.mark.parametrize("label", [0, 1])
def test_a_layer_inside_by_its_formula_and_differences_in_float64(label, method):
    model, images = Curved(), jax.random.normal(jax.random.key(0), (1, 6, 7, 2))
    variables = model.init(jax.random.key(1), images, train=False)
    found = class_activation_map(
        model, variables, images, np.array([label]), layer="inner", method=method
    )
    A = np.float64(feature_maps(model, variables, images)["inner"][0])
    outer, head = (np.float64(variables["params"][name]["kernel"]) for name in ("outer", "head"))

    def logit(x):
        windows = np.lib.stride_tricks.sliding_window_view(np.tanh(x), (3, 3), axis=(0, 1))
        x = np.einsum("yxcij,ijck->yxk", windows, outer)
        return (x**2).mean((0, 1)) @ head[:, label]

    np.testing.assert_allclose(
        logit(A), model.apply(variables, images, train=False)[0, label], rtol=1e-5
    )
    g = np.zeros_like(A)
    for place in np.ndindex(A.shape):
        step = np.zeros_like(A)
        step[place] = 1e-5
        g[place] = (logit(A + step) - logit(A - step)) / 2e-5
    if method == "grad_cam":
        weights = g.mean((0, 1))
    else:
        weights = (g**2 / (2 * g**2 + g**3 * A.sum((0, 1))) * np.maximum(g, 0)).sum((0, 1))
    expected = np.maximum((weights * A).sum(-1), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4 * expected.max())


class Brightest(nn.Module):
    """Class 1 by the brightness of any place, class 0 by the darkness."""

    @nn.compact
    def __call__(self, images, *, train: bool):
        kernel = nn.initializers.constant(1 / 9)
        x = nn.relu(nn.Conv(1, (3, 3), kernel_init=kernel, name="conv")(images))
        return jnp.concatenate([-x.mean((1, 2)), x.mean((1, 2))], axis=-1)


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam++"])
@pytest.mark.parametrize(("row", "column"), [(2, 3), (9, 12)])
def test_the_evidence_lies_on_the_patch_that_decides(row, column, method):
    images = np.zeros((1, 16, 16, 1), np.float32)
    images[0, row : row + 3, column : column + 3] = 1
    variables = Brightest().init(jax.random.key(0), images, train=False)
    found = class_activation_map(Brightest(), variables, images, np.array([1]), method=method)[0]
    assert np.unravel_index(np.argmax(found), (16, 16)) == (row + 1, column + 1)
    around = np.zeros((16, 16), bool)
    around[row - 1 : row + 4, column - 1 : column + 4] = True
    assert float(found[around].min()) > 0
    assert float(found[~around].max()) == 0
    against = class_activation_map(Brightest(), variables, images, np.array([0]), method=method)
    assert float(against.max()) == 0


class Kernels(nn.Module):
    """Two convolutions without anything between, so that what is seen is their convolution."""

    @nn.compact
    def __call__(self, images, *, train: bool):
        x = nn.Conv(2, (3, 3), padding=1, use_bias=False, name="a")(images)
        return nn.Conv(3, (5, 5), strides=2, padding=2, use_bias=False, name="b")(x)


def test_what_the_middle_sees_is_the_product_of_the_kernels():
    images = jax.random.normal(jax.random.key(0), (2, 17, 17, 1))
    variables = Kernels().init(jax.random.key(1), images, train=False)
    found = effective_receptive_field(Kernels(), variables, images, layer="b")
    a, b = (np.asarray(variables["params"][name]["kernel"], np.float64) for name in "ab")
    expected = np.zeros((17, 17))
    for y, x in np.ndindex(5, 5):  # the middle of 9 x 9 is about pixel 8 of 17 x 17
        for dy, dx in np.ndindex(3, 3):
            paths = a[dy, dx, 0, :, None] * b[y, x]
            expected[8 - 2 + y - 1 + dy, 8 - 2 + x - 1 + dx] += paths.sum()
    np.testing.assert_allclose(found, [np.abs(expected)] * 2, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="layer='c': must be one of 'a', 'b'"):
        effective_receptive_field(Kernels(), variables, images, layer="c")


def test_what_the_middle_sees_is_the_theoretical_field(network):
    model, variables, _ = network
    images = jax.random.normal(jax.random.key(2), (3, 48, 48, 3))
    rows = {row.path: row for row in grouped(layers(model, (48, 48, 3)), depth=1)}
    for name in ("stem", "stage1_block1", "stage2_block1"):
        row = rows[name]
        found = effective_receptive_field(model, variables, images, layer=name)
        seen = np.argwhere(np.asarray(found).max(axis=0))
        assert (np.ptp(seen, axis=0) + 1).tolist() == list(row.receptive_field)
        middle = row.centre[0] + row.strides[0] * (row.output[0] // 2)
        assert seen.mean(axis=0) == pytest.approx([middle] * 2, abs=0.5)


def test_feature_maps_are_named_and_equal_the_stages(network):
    model, variables, images = network
    maps = feature_maps(model, variables, images)
    stages = model.apply(variables, images, train=False, method="stages")
    for name, stage in zip(("stem", "stage1_block1", "stage2_block1"), stages, strict=True):
        np.testing.assert_array_equal(maps[name], stage)
    assert "stage1_block1/conv1/norm" in maps
    assert "head" not in maps


def test_what_cannot_be_is_named(network, untyped):
    model, variables, images = network
    classes = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match=r"method='cam': must be one of 'grad_cam', 'grad"):
        class_activation_map(model, variables, images, classes, method="cam")
    with pytest.raises(ValueError, match="layer='stage9': must be one of 'stem/conv', "):
        class_activation_map(model, variables, images, classes, layer="stage9")
    with pytest.raises(ValueError, match=r"classes of shape \(1,\): must be one for each image"):
        class_activation_map(model, variables, images, classes[:1])
    without_head = model.clone(features_only=True)
    parts = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head"}}
    with pytest.raises(ValueError, match=r"gives no logits \[b, k\]; it has features_only=True"):
        class_activation_map(without_head, parts, images, classes, layer="stem")


def test_a_class_that_is_not_there_has_no_evidence(network):
    model, variables, images = network
    classes = np.array([0, model.num_classes, -1], np.int32)
    maps = class_activation_map(model, variables, images, classes)
    expected = class_activation_map(model, variables, images, np.zeros(3, np.int32))
    np.testing.assert_array_equal(maps[0], expected[0])
    assert np.isnan(maps[1:]).all()
