"""Convolutions written otherwise where a platform gains by it: the same numbers."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cnn_jax import create_model
from cnn_jax.models import convolution
from cnn_jax.models.convolution import CHANNELS_LAST, convolve
from cnn_jax.models.layers import ConvBlock

VALID = [(0, 0), (0, 0)]


def lowered_for(platform, strides, padding=VALID, kernel_size=1, size=8, **arguments):
    arguments = {"dimension_numbers": CHANNELS_LAST, **arguments}
    channels = 4 // arguments.get("feature_group_count", 1)

    def call(x, kernel):
        return convolve(x, kernel, strides, padding, **arguments)

    shapes = [(2, size, 8, 4), (kernel_size, kernel_size, channels, 6)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(call).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3)])
def test_outputs_and_gradients_are_those_of_the_formula(strides):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 7, 8, 5)), rng.normal(size=(1, 1, 5, 3))
    seen = x[:, :: strides[0], :: strides[1]]
    expected = np.einsum("nhwc,cd->nhwd", seen, kernel[0, 0])
    cotangent = rng.normal(size=expected.shape)
    of_x = np.zeros_like(x)
    of_x[:, :: strides[0], :: strides[1]] = cotangent @ kernel[0, 0].T
    of_kernel = np.einsum("nhwc,nhwd->cd", seen, cotangent)[None, None]
    with jax.enable_x64(True):
        output, pull_back = jax.vjp(
            lambda x, kernel: convolve(x, kernel, strides, VALID, dimension_numbers=CHANNELS_LAST),
            jnp.asarray(x),
            jnp.asarray(kernel),
        )
        gradients = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(output, expected, rtol=1e-12)
    np.testing.assert_allclose(gradients[0], of_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients[1], of_kernel, rtol=1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding"),
    [(1, (2, 1), VALID), (3, (2, 2), [(1, 1), (1, 1)])],
    ids=["a product", "strided"],
)
def test_every_derivative_is_there(kernel_size, strides, padding):
    """Of both orders and in both modes, as a network that evaluates has: by differences."""
    rng = np.random.default_rng(0)

    def call(x, kernel):
        return convolve(x, kernel, strides, padding, dimension_numbers=CHANNELS_LAST)

    with jax.enable_x64(True):
        arrays = (rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(kernel_size,) * 2 + (5, 3)))
        check_grads(call, tuple(map(jnp.asarray, arrays)), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize(("channels", "features"), [(8, 32), (32, 8)])
def test_the_gradient_of_a_product_moves_no_pixels(channels, features):
    """`x^T dy` of arrays as they lie; XLA first wrote dy anew, with its channels in rows."""

    def pull_back(x, kernel, cotangent):
        def loss(kernel):
            y = convolve(x, kernel, (1, 1), VALID, dimension_numbers=CHANNELS_LAST)
            return jnp.vdot(y, jnp.sin(cotangent))

        return jax.grad(loss)(kernel)

    shapes = [(4, 7, 7, channels), (1, 1, channels, features), (4, 7, 7, features)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(pull_back).trace(*shapes).lower(lowering_platforms=("cpu",)).compile()
    assert f"f32[196,{features}]" in compiled.as_text()
    assert not re.search(r"f32\[\d+,196\]", compiled.as_text())


def test_the_platform_decides():
    assert "dot_general" in lowered_for("cpu", (2, 2))
    assert "stablehlo.convolution" not in lowered_for("cpu", (2, 2))
    for platform in ("tpu", "cuda"):
        assert "dot_general" not in lowered_for(platform, (2, 2))
        assert "stablehlo.convolution" in lowered_for(platform, (2, 2))


def test_one_exported_program_has_what_each_platform_takes():
    def call(x, kernel):
        return convolve(x, kernel, (2, 2), VALID, dimension_numbers=CHANNELS_LAST)

    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [(batch, 7, 7, 4), (1, 1, 4, 6)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    export = jax.export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))
    exported = jax.export.deserialize(export(*shapes).serialize())
    assert "dot_general" in exported.mlir_module()
    assert "stablehlo.convolution" in exported.mlir_module()
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 7, 7, 4), (1, 1, 4, 6))
    )
    expected = x[:, ::2, ::2].astype(np.float64) @ kernel[0, 0].astype(np.float64)
    np.testing.assert_allclose(exported.call(x, kernel), expected, rtol=0, atol=1e-5)


def test_a_network_is_exported_for_images_of_any_size():
    model = create_model("bottleneck_mini", width=8, stage_sizes=(1, 1), num_classes=3)
    images = np.random.default_rng(0).normal(size=(2, 21, 34, 3)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    logits = jax.jit(lambda images: model.apply(variables, images, train=False))
    shape = jax.export.symbolic_shape("b, h, w, 3", constraints=["h >= 8", "w >= 8"])
    exported = jax.export.export(logits)(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(images), logits(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": [(1, 1), (1, 1)]},
        {"padding": [(1, 1), (0, 0)]},
        {"feature_group_count": 2},
        {"lhs_dilation": (2, 2)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_is_no_product_stays_a_convolution(arguments):
    assert "stablehlo.convolution" in lowered_for("cpu", (1, 1), **arguments)


def seen(image, row, column, outputs, strides):
    """Returns the pixels that one place of a kernel meets."""
    rows, columns = (
        slice(start, start + (count - 1) * stride + 1, stride)
        for start, count, stride in zip((row, column), outputs, strides, strict=True)
    )
    return image[:, rows, columns]


def check_by_a_loop(call, kernel_size, strides, padding, size, channels):
    """Compares `call(x, kernel)` and its gradients with a loop over the places of the kernel.

    What no output sees, as the last row of an even image, gets a gradient of zero.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, channels))
    kernel = rng.normal(size=(kernel_size, kernel_size, channels, 5))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    outputs = [(padded.shape[1 + i] - kernel_size) // strides[i] + 1 for i in (0, 1)]
    places = [(row, column) for row in range(kernel_size) for column in range(kernel_size)]
    expected = sum(seen(padded, *place, outputs, strides) @ kernel[place] for place in places)
    cotangent = rng.normal(size=expected.shape)
    of_padded, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for place in places:
        view = seen(of_padded, *place, outputs, strides)
        view += cotangent @ kernel[place].T
        of_kernel[place] = np.einsum(
            "nhwc,nhwd->cd", seen(padded, *place, outputs, strides), cotangent
        )
    (top, _), (left, _) = padding
    of_x = of_padded[:, top : size[0] + top, left : size[1] + left]
    with jax.enable_x64(True):
        output, pull_back = jax.vjp(call, jnp.asarray(x), jnp.asarray(kernel))
        gradients = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients[0], of_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients[1], of_kernel, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "channels"),
    [
        (7, (2, 2), ((3, 3), (3, 3)), 3),  # the stem of ResNet
        (3, (2, 2), ((1, 1), (1, 1)), 3),
        (5, (2, 2), ((2, 0), (1, 3)), 1),
        (4, (4, 4), ((0, 0), (0, 0)), 1),  # the stem of ConvNeXt, of one channel
        (2, (2, 1), ((0, 1), (1, 0)), 3),
        (1, (2, 2), ((1, 1), (1, 1)), 2),
    ],
)
def test_pixels_of_a_stride_as_channels_are_the_same_convolution(
    kernel_size, strides, padding, channels
):
    def by_blocks(x, kernel):
        blocks, taps, sides = convolution.by_blocks(x, kernel, strides, padding)
        assert blocks.shape[-1] == 16
        return jax.lax.conv_general_dilated(
            blocks, taps, (1, 1), sides, dimension_numbers=CHANNELS_LAST
        )

    check_by_a_loop(by_blocks, kernel_size, strides, padding, (12, 16), channels)


STRIDED = [
    (3, (2, 2), ((1, 1), (1, 1)), (7, 8)),  # of a residual block
    (7, (2, 2), ((3, 3), (3, 3)), (12, 16)),
    (2, (2, 2), ((0, 0), (0, 0)), (7, 6)),  # of ConvNeXt; a last row that no output sees
    (5, (3, 2), ((2, 0), (1, 3)), (11, 9)),
    (4, (4, 4), ((0, 0), (0, 0)), (12, 16)),
    (3, (2, 3), ((4, 5), (0, 1)), (9, 10)),  # more padding than kernel
]


@pytest.mark.parametrize(("kernel_size", "strides", "padding", "size"), STRIDED)
def test_a_sum_over_phases_is_the_same_convolution(kernel_size, strides, padding, size):
    def by_phases(x, kernel):
        return sum(
            jax.lax.conv_general_dilated(*each, dimension_numbers=CHANNELS_LAST)
            for each in convolution.by_phases(x, kernel, strides, padding)
        )

    check_by_a_loop(by_phases, kernel_size, strides, padding, size, 5)


@pytest.mark.parametrize(("kernel_size", "strides", "padding", "size"), STRIDED)
def test_a_strided_convolution_and_its_gradients(kernel_size, strides, padding, size):
    def call(x, kernel):
        return convolve(x, kernel, strides, padding, dimension_numbers=CHANNELS_LAST)

    check_by_a_loop(call, kernel_size, strides, padding, size, 17)


def test_a_strided_convolution_has_the_gradient_by_one_argument_alone():
    """As a frozen kernel or an image has; also in bfloat16, image by image and made again."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 8, 5)), jnp.bfloat16)

    def loss(convolution, x, kernel):
        y = convolution(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=CHANNELS_LAST)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    exact = functools.partial(loss, jax.lax.conv_general_dilated)
    of_x, of_kernel = jax.grad(exact, (0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
    ours = functools.partial(loss, convolve)
    by_image = jax.vmap(jax.grad(lambda x: ours(x[None], kernel)))(x)
    by_kernel = jax.grad(jax.checkpoint(functools.partial(ours, x)))(kernel)
    for found, expected in ((by_image, of_x), (by_kernel, of_kernel)):
        assert found.dtype == jnp.bfloat16
        error = np.abs(found.astype(jnp.float32) - expected).max()
        assert error <= 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(("platform", "zeros"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_on_a_cpu_no_gradient_is_of_an_image_with_zeros_between_its_pixels(platform, zeros):
    def loss(x, kernel):
        y = convolve(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=CHANNELS_LAST)
        return jnp.sum(jnp.sin(y))

    shapes = [(2, 8, 8, 8), (3, 3, 8, 6)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("lhs_dilate = [2, 2]") == zeros


STEM = {"strides": (2, 2), "kernel_size": 3, "padding": [(1, 1), (1, 1)]}


def test_a_stem_on_a_gpu_has_the_pixels_of_a_stride_as_channels():
    assert "x16xf32>" in lowered_for("cuda", **STEM)
    for platform in ("tpu", "cpu"):
        assert "x16xf32>" not in lowered_for(platform, **STEM)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": (1, 1)},
        {"strides": (4, 4)},  # 64 channels
        {"size": 9},  # rows
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 2)},
        {"padding": "SAME"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_is_no_stem_stays_as_it_is(arguments):
    text = lowered_for("cuda", **{**STEM, **arguments})
    assert text.count("stablehlo.convolution") == 1
    assert "x16xf32>" not in text


def test_layers_use_it():
    block = ConvBlock(8, kernel_size=1, padding=0)
    image = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), image, train=False))
    lowered = jax.jit(lambda v, x: block.apply(v, x, train=False)).lower(variables, image)
    assert "stablehlo.convolution" not in lowered.as_text()
