"""Closed formulas against JAX, receptive fields against what a changed pixel changes, costs against
closed sums, published counts and XLA."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cnn_jax
from cnn_jax import ModernCNN, create_model
from cnn_jax.models import geometry
from cnn_jax.models.geometry import grouped, layers, output_size, receptive_field, total

drawn = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@drawn
@given(
    size=st.integers(1, 40),
    kernel_size=st.integers(1, 7),
    strides=st.integers(1, 4),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
)
def test_output_size_is_that_of_a_convolution_and_a_pool(
    size, kernel_size, strides, padding, dilation
):
    if dilation * (kernel_size - 1) + 1 > size + 2 * padding:
        with pytest.raises(ValueError, match=rf"kernel_size={kernel_size}, .*must be <= "):
            output_size(size, kernel_size, strides, padding, dilation)
        return
    expected = output_size(size, kernel_size, strides, padding, dilation)
    sides = [(padding, padding)]
    convolution = nn.Conv(1, (kernel_size,), strides, sides, kernel_dilation=dilation)
    images = jax.ShapeDtypeStruct((1, size, 1), jnp.float32)
    output, _ = jax.eval_shape(convolution.init_with_output, jax.random.key(0), images)
    assert output.shape == (1, expected, 1)
    if dilation == 1:
        pool = functools.partial(
            nn.max_pool, window_shape=(kernel_size,), strides=(strides,), padding=sides
        )
        assert jax.eval_shape(pool, images).shape == (1, expected, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 0, "kernel_size": 1}, "size=0: must be an integer >= 1"),
        ({"size": 8, "kernel_size": 0}, "kernel_size=0: must be an integer >= 1"),
        ({"size": 8, "kernel_size": 3, "strides": 0}, "strides=0: must be an integer >= 1"),
        ({"size": 8, "kernel_size": 3, "padding": -1}, "padding=-1: must be an integer >= 0"),
        ({"size": 8, "kernel_size": 3, "dilation": True}, "dilation=True: must be an integer >= 1"),
        (
            {"size": 8, "kernel_size": 5, "dilation": 3, "padding": 2},
            r"kernel_size=5, dilation=3: spans 13 pixels; must be <= size \+ 2 \* padding = 12",
        ),
    ],
)
def test_output_size_says_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=text):
        output_size(**arguments)


def test_receptive_field_of_a_stack():
    for kernel_size in (1, 2, 3, 7):
        for num_layers in (1, 2, 5):
            expected = kernel_size + (kernel_size - 1) * (num_layers - 1)
            assert geometry.receptive_field_of_stack(kernel_size, num_layers) == expected
            assert receptive_field([(kernel_size, 1)] * num_layers) == expected
    with pytest.raises(ValueError, match="num_layers=0: must be an integer >= 1"):
        geometry.receptive_field_of_stack(3, 0)


def resnet(stage_sizes, *, stride_first):
    """Kernels and strides along the branches; v1 strides in the 1x1, v1.5 (torchvision) in the 3x3.

    The identities see less.
    """
    chain = [(7, 2), (3, 2)]
    for stage, num_blocks in enumerate(stage_sizes):
        for block in range(num_blocks):
            strides = 2 if stage and not block else 1
            chain += [(1, strides), (3, 1)] if stride_first else [(1, 1), (3, strides)]
    return chain


def vgg(stage_sizes):
    return [layer for size in stage_sizes for layer in [(3, 1)] * size + [(2, 2)]]


@pytest.mark.parametrize(
    ("chain", "published"),  # Araujo et al. 2019, doi:10.23915/distill.00021
    [
        ([(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)], 195),
        (vgg((2, 2, 3, 3, 3)), 212),
        (resnet((3, 4, 6, 3), stride_first=True), 483),
        (resnet((3, 4, 23, 3), stride_first=True), 1027),
        (resnet((3, 8, 36, 3), stride_first=True), 1507),
    ],
    ids=["AlexNet", "VGG-16", "ResNet-50", "ResNet-101", "ResNet-152"],
)
def test_published_receptive_fields(chain, published):
    assert receptive_field(chain) == published


def test_receptive_field_with_dilation_and_its_errors(untyped):
    assert receptive_field([]) == 1
    assert receptive_field([(3, 1, 2)]) == 5
    assert receptive_field([(3, 2), (3, 1, 4), (2, 3), (3, 1)]) == 3 + 2 * 8 + 2 + 2 * 6
    with pytest.raises(ValueError, match=r"layers: \(3,\): must be"):
        receptive_field([(3,)])
    with pytest.raises(ValueError, match=r"layers: 3: must be \(kernel_size, strides\) or"):
        receptive_field([3, 1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="strides=0: must be"):
        receptive_field([(3, 0)])


class Network(nn.Module):
    """A network from functions of the image."""

    parts: Sequence[Any]

    @nn.compact
    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


def conv(kernel_size, strides=1, padding: Any = 0, dilation: Any = 1, **arguments):
    kernel_size = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    padding = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    features = arguments.pop("features", 2)
    return lambda x: nn.Conv(
        features, kernel_size, strides, padding, kernel_dilation=dilation, **arguments
    )(x)


def max_pool(window, strides=1, padding=0):
    sides: Any = [(padding, padding)] * 2
    return lambda x: nn.max_pool(x, (window, window), (strides, strides), sides)


def average_pool(window, strides=1, padding=0):
    sides: Any = [(padding, padding)] * 2
    return lambda x: nn.avg_pool(x, (window, window), (strides, strides), sides)


def residual(*parts):
    def add(x):
        y = x
        for part in parts:
            y = part(y)
        return nn.relu(y) + x

    return add


def branches(*each):
    return lambda x: jnp.concatenate([part(x) for part in each], axis=-1)


def gate(x):
    """Squeeze and excite."""
    return x * nn.sigmoid(nn.Dense(x.shape[-1])(nn.Dense(1)(x.mean((1, 2))))[:, None, None])


def pixelwise(x):
    """A 1x1 convolution that puts the channels first."""
    return nn.Einsum((x.shape[-1], 2), "bhwc,cd->bdhw", use_bias=False)(x).transpose(0, 2, 3, 1)


def reflected(x):
    return jnp.pad(x, ((0, 0), (2, 1), (1, 2), (0, 0)), mode="reflect")


def repeated(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")


def seen(model, image_shape):
    """Which pixels change each output: bool [h, w, h', w'], by changing each pixel in turn.

    With weights that are all positive the network rises with every pixel, so nothing cancels, and a
    pixel far above the others wins every maximum.
    """
    height, width, channels = image_shape
    images = np.ones((height * width + 1, height, width, channels), np.float32)
    images.reshape(len(images), height * width, channels)[
        np.arange(height * width), np.arange(height * width)
    ] = 1000.0
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images[:1])))
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 1 / math.prod(leaf.shape[:-1])), variables
    )
    outputs = np.asarray(jax.jit(model.apply)(variables, images))
    changed = np.any(outputs[:-1] != outputs[-1], axis=-1)
    return changed.reshape(height, width, *changed.shape[1:])


def assert_sees(model, image_shape):
    """The last layer's field and centre are those measured, and every output within the image.

    Where a field reaches into the padding, nothing is seen beyond it.
    """
    last, changed = layers(model, image_shape)[-1], seen(model, image_shape)
    inside = 0
    for axis, size in enumerate(image_shape[:2]):
        pixels = changed.any(axis=(1 - axis, 3 - axis))  # of this axis, by output
        strides, field, centre = last.strides[axis], last.receptive_field[axis], last.centre[axis]
        assert strides is not None
        assert field is not None
        assert centre is not None
        for output in range(pixels.shape[1]):
            start = centre - (field - 1) / 2 + (0 if last.sees_whole_image else strides * output)
            measured = np.flatnonzero(pixels[:, output])
            if not measured.size:  # sees padding alone
                continue
            assert start <= measured.min()
            assert measured.max() < start + field
            if start >= 0 and start + field <= size:
                inside += 1
                assert (measured.min(), measured.max()) == (start, start + field - 1)
    assert inside > 0
    assert last.output == (*changed.shape[2:], last.output[-1])


NETWORKS: dict[str, Sequence[Any]] = {
    "convolution": [conv(3, 1, 1)],
    "strides": [conv(3, 2, 1), conv(3, 2), conv(2, 1)],
    "asymmetric": [conv((3, 5), (2, 1), [(0, 1), (2, 1)]), conv((2, 1), (1, 3))],
    "dilation": [conv(3, 1, 0, 2), conv((2, 3), 1, 0, (3, 1))],
    "same padding": [conv(3, 2, "SAME"), conv(4, 1, "SAME")],
    "groups": [conv(3), conv(3, feature_group_count=2)],
    "average pool": [conv(3), average_pool(3, 2, 1), conv(3)],
    "max pool": [conv(3, 1, 1), max_pool(3, 2, 1), conv(2), max_pool(2, 2)],
    "dilated pool": [
        lambda x: jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 3, 2, 1), (1, 1, 2, 1), "VALID", None, (1, 2, 3, 1)
        )
    ],
    "residual": [conv(3), residual(conv(3, 1, 1), conv(3, 1, 1)), conv(2, 2)],
    "projected residual": [lambda x: conv(3, 2, 1)(x) + conv(1, 2)(x)],
    "inception": [branches(conv(1), conv(3, 1, 1), conv(5, 1, 2), max_pool(3, 1, 1)), conv(2)],
    "unequal sides": [branches(conv((1, 3), 1, [(0, 0), (2, 0)]), conv(2, 1, [(0, 1), (0, 1)]))],
    "slices": [conv(3), lambda x: x[:, 1::2, 2:-1], conv(2)],
    "zeros around": [lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0))), conv(3, 2)],
    "reflected border": [conv(2), reflected, conv(5, 2)],
    "repeated border": [repeated, conv(3)],
    "flipped": [
        conv((3, 2), (2, 1)),
        lambda x: x[:, ::-1, ::-1],
        conv(2, 1, [(1, 0), (2, 0)]),
        lambda x: x[:, ::-1, ::-1],
    ],
    "transposed": [
        conv((3, 1), (2, 1)),
        lambda x: conv((2, 1))(x.transpose(0, 2, 1, 3)).swapaxes(1, 2),
        conv(1),
    ],
    "reshaped": [conv(3), lambda x: x.reshape(*x.shape[:3], 1, 2)[..., 0, :], conv(2)],
    "matrix product": [conv(3), nn.Dense(3), pixelwise, conv(2, 2)],
    "layer norm": [conv(3), lambda x: nn.LayerNorm()(x * jnp.array([[[[1.0, 2.0]]]])) + x, nn.gelu],
    "inner functions": [jax.checkpoint(lambda x: nn.silu(x)), conv(3), jax.jit(jnp.tanh)],
    "gate": [conv(3, 1, 1), gate, conv(2)],
    "split channels": [conv(3), lambda x: jnp.add(*jnp.split(x, 2, axis=-1)), conv(2)],
}


@pytest.mark.parametrize("parts", NETWORKS.values(), ids=NETWORKS)
def test_receptive_fields_are_those_measured(parts):
    assert_sees(Network(parts), (17, 14, 3))


LAYERS = st.one_of(
    st.builds(conv, st.integers(1, 4), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    st.builds(
        conv, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(*[st.integers(1, 2)] * 2)
    ),
    st.builds(max_pool, st.integers(2, 3), st.integers(1, 2), st.integers(0, 1)),
    st.builds(average_pool, st.integers(2, 3), st.integers(1, 2), st.integers(0, 1)),
    st.builds(
        lambda kernel, features: residual(conv(2 * kernel + 1, 1, kernel, features=features)),
        st.integers(0, 2),
        st.just(2),
    ),
    st.builds(lambda k: branches(conv(1), conv(2 * k + 1, 1, k)), st.integers(1, 2)),
)
"""Of two features each way, or four behind the branches."""


def fits(model, image_shape):
    """Whether some output sees nothing of the padding, so that there is something to measure."""
    last = layers(model, image_shape)[-1]
    for size, outputs, strides, field, centre in zip(
        image_shape, last.output, last.strides, last.receptive_field, last.centre, strict=False
    ):
        starts = centre - (field - 1) / 2 + strides * np.arange(outputs)
        if not np.any((starts >= 0) & (starts + field <= size)):
            return False
    return True


@settings(drawn, max_examples=25)
@given(
    parts=st.lists(LAYERS, min_size=1, max_size=4),
    height=st.integers(18, 24),
    width=st.integers(18, 24),
)
def test_receptive_fields_of_networks_drawn_at_random(parts, height, width):
    model = Network([conv(1), *[step for part in parts for step in (part, conv(1))]])
    if fits(model, (height, width, 2)):
        assert_sees(model, (height, width, 2))


def test_a_field_of_equal_layers_is_the_closed_formula():
    rows = layers(Network([conv(5)] * 3), (20, 20, 1))
    assert [row.receptive_field[0] for row in rows] == [
        geometry.receptive_field_of_stack(5, number) for number in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((1, 2)),
        lambda x: x.max(1).max(1),
        lambda x: nn.Dense(3)(x.reshape(x.shape[0], -1)),
        lambda x: nn.avg_pool(x, x.shape[1:3])[:, 0, 0],
        lambda x: nn.GroupNorm(1)(x),
    ],
    ids=["mean", "max", "flattened", "whole window", "group norm"],
)
def test_what_sees_the_whole_image(pool):
    rows = layers(Network([conv(3, 1, 1), pool, nn.Dense(2)]), (9, 12, 3))
    assert not rows[0].sees_whole_image
    assert rows[-1].sees_whole_image
    assert rows[-1].centre == (4.0, 5.5)


def test_a_pool_sees_no_pixel_that_the_layers_before_it_leave_out():
    rows = layers(Network([conv(2, 2), lambda x: x.mean((1, 2))]), (9, 8, 1))
    assert rows[-1].kind == "global_pool"
    assert rows[-1].receptive_field == (8, 8)
    assert not rows[-1].sees_whole_image


UNKNOWN: dict[str, Any] = {
    "rolled": lambda x: jnp.roll(x, 5, axis=1),
    "wrapped": lambda x: jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="wrap"),
    "sorted": lambda x: jnp.sort(x, axis=1),
    "summed up": lambda x: jnp.cumsum(x, axis=2),
    "resized": lambda x: jax.image.resize(x, (1, 18, 18, x.shape[-1]), "linear"),
    "transposed convolution": lambda x: nn.ConvTranspose(2, (3, 3), (2, 2))(x),
    "tokens": lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    "space to depth": lambda x: x.reshape(1, 4, 2, 4, 2, -1)[:, :, 0],
    "gate of a corner": lambda x: x * x[:, :1, :1],
    "two resolutions": lambda x: x[:, :4, :4] + x[:, ::2, ::2],
    "branch of a condition": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
}


@pytest.mark.parametrize("part", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_not_guessed(part):
    last = layers(Network([conv(1), part, lambda x: x + 1]), (8, 8, 2))[-1]
    assert None in last.receptive_field
    assert "?" in geometry.table([last])


@pytest.mark.parametrize("part", [lambda x: jnp.sort(x, axis=1), lambda x: jnp.roll(x, 1, axis=1)])
def test_what_is_not_known_stays_unknown(part):
    rows = layers(Network([conv(1), part, conv(3), gate, lambda x: x.mean((1, 2))]), (8, 8, 2))
    assert rows[-1].receptive_field[0] is None


def resnet50_multiply_adds(*, on_padding: bool):
    """Of ResNet-50 at 224 x 224: taps * channels in * channels out of each convolution.

    `on_padding` says whether taps count that fall on zeros beside the image.
    """

    def taps(kernel_size, strides, side):
        outputs = range(0, side, strides)
        reach = kernel_size // 2
        seen = [
            sum(on_padding or 0 <= at + tap < side for tap in range(-reach, reach + 1))
            for at in outputs
        ]
        return sum(seen) ** 2

    count = taps(7, 2, 224) * 3 * 64
    before = 64
    for stage, num_blocks in enumerate((3, 4, 6, 3)):
        width, side = 64 * 2**stage, 56 // 2**stage
        for block in range(num_blocks):
            strides = 2 if stage and not block else 1
            side_before = side * strides
            count += side_before**2 * before * width
            count += taps(3, strides, side_before) * width * width
            count += side**2 * width * 4 * width
            if not block:
                count += side**2 * before * 4 * width
            before = 4 * width
    return count + 2048 * 1000


def test_resnet50():
    rows = layers(ModernCNN(), (224, 224, 3))
    assert total(rows).multiply_adds == resnet50_multiply_adds(on_padding=True) == 4_089_184_256
    assert total(rows).parameters == 25_557_032
    last = grouped(rows, 1)[-2]
    assert last.path == "stage4_block3"
    assert last.strides == (32, 32)
    chain = resnet((3, 4, 6, 3), stride_first=False)
    assert last.receptive_field == (receptive_field(chain),) * 2 == (427, 427)
    assert rows[-1].sees_whole_image


def flops(model, image_shape, **arguments):
    """Floating point operations of one image in XLA's own count."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **arguments), images)
    lowered = jax.jit(lambda *inputs: model.apply(*inputs, **arguments)).lower(variables, images)
    return lowered.cost_analysis()["flops"]


def test_multiply_adds_are_those_that_xla_counts():
    """Two operations each, but for taps on the padding, 3.6 % of ResNet-50's: XLA skips them."""
    model = Network(
        [
            conv(3, 2, use_bias=False, features=8),
            conv((2, 3), 1, 0, 2, use_bias=False, features=8, feature_group_count=4),
            lambda x: nn.Dense(5, use_bias=False)(x),
            lambda x: nn.Dense(3, use_bias=False)(x.reshape(x.shape[0], -1)),
        ]
    )
    assert 2 * (total(layers(model, (20, 24, 3))).multiply_adds or 0) == flops(model, (20, 24, 3))
    measured = flops(ModernCNN(), (224, 224, 3), train=False)
    assert measured == pytest.approx(2 * resnet50_multiply_adds(on_padding=False), rel=0.02)
    assert measured == pytest.approx(2 * resnet50_multiply_adds(on_padding=True), rel=0.03)


@pytest.mark.parametrize("name", cnn_jax.MODELS)
def test_parameters_of_every_model_sum_to_its_tree(name):
    model = create_model(name, num_classes=10)
    images = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    rows = layers(model, (64, 64, 3))
    assert total(rows).parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    for part, size in jax.tree.map(lambda leaf: leaf.size, dict(params)).items():
        inside = [row for row in rows if row.path.split("/")[0] == part]
        assert total(inside).parameters == sum(jax.tree.leaves(size)), part
    assert all(None not in row.receptive_field for row in rows)
    assert {row.kind for row in rows} <= {
        *("conv", "dense", "norm", "max_pool", "average_pool", "global_pool"),
        *("add", "multiply", "concatenate"),
    }


class Tied(nn.Module):
    """One convolution used twice, one that is not used, and a parameter of the model's own."""

    def setup(self):
        self.shared = nn.Conv(3, (3, 3))
        self.idle = nn.Conv(3, (1, 1))
        self.scale = self.param("scale", nn.initializers.ones, (1, 1, 1, 3))

    def __call__(self, x, *, train: bool):
        if self.is_initializing():
            self.idle(x)
        return self.shared(nn.relu(self.shared(x) * self.scale))

    def features(self, x, *, train: bool):
        return self.shared(x)


def test_a_parameter_counts_once():
    rows = layers(Tied(), (8, 8, 3))
    assert [(row.path, row.kind, row.parameters) for row in rows] == [
        ("shared", "conv", 84),
        ("", "Tied", 3),
        ("shared", "conv", 0),
        ("idle", "unused", 12),
    ]
    assert [row.multiply_adds for row in rows] == [64 * 81, 0, 64 * 81, 0]
    assert [row.path for row in layers(Tied(), (8, 8, 3), method="features")][:1] == ["shared"]


def test_lifted_modules_keep_their_names():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.relu(nn.Conv(2, (3, 3), name="inner")(x)), None

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.remat(Block)(name="again")(x)
            x, _ = nn.jit(Block)(name="compiled")(x)
            loop = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5
            )
            return loop(name="loop")(x, None)[0]

    rows = layers(Lifted(), (8, 8, 2))
    assert [row.path for row in rows] == ["again/inner", "compiled/inner", "loop/inner"]
    assert [row.parameters for row in rows] == [38, 38, 190]
    assert [row.multiply_adds for row in rows] == [64 * 36, 64 * 36, 5 * 64 * 36]
    assert [row.receptive_field[0] for row in rows] == [3, 5, None]


def test_what_an_inner_function_does_is_its_modules():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.jit(jnp.matmul)(x, self.param("kernel", nn.initializers.ones, (2, 5)))

    (row,) = layers(Network([lambda x: Inner(name="inner")(x)]), (4, 4, 2))
    assert (row.path, row.kind, row.parameters) == ("inner", "dense", 10)
    assert row.modules == ("Network", "Inner")


def test_arranging_an_output_makes_no_row_and_borders_belong_to_what_follows():
    def blur(x):
        kernel = jnp.ones((3, 3, 1, 2))
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    parts = [
        max_pool(2),
        reflected,
        blur,
        conv(1),
        lambda x: x.reshape(x.shape[0], -1),
        nn.Dense(7),
    ]
    rows = layers(Network(parts), (10, 10, 2))
    assert [(row.kind, row.output) for row in rows] == [
        ("max_pool", (9, 9, 2)),
        ("conv", (5, 5, 2)),
        ("conv", (5, 5, 2)),
        ("dense", (7,)),
    ]
    rows = layers(Network([max_pool(2), lambda x: x[:, 1:-1]]), (10, 10, 2))
    assert [(row.kind, row.output) for row in rows] == [
        ("max_pool", (9, 9, 2)),
        ("slice", (7, 9, 2)),
    ]


def test_a_loop_of_unknown_length_has_unknown_costs():
    def loop(x):
        kernel = jnp.mean(x) * jnp.eye(x.shape[-1])
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ kernel, x)

    rows = layers(Network([conv(1), loop]), (4, 4, 2))
    assert total(rows).multiply_adds is None
    assert geometry.table(rows).splitlines()[-1].split()[-3:-2] == ["?"]


def test_activations_are_those_of_the_precision():
    full, half = (
        total(layers(ModernCNN(dtype=dtype), (64, 64, 3))) for dtype in (None, "bfloat16")
    )
    logits = 4 * 1000  # float32 in either
    assert half.activation_bytes - logits == (full.activation_bytes - logits) // 2
    (row,) = layers(Network([conv(3, features=5)]), (10, 7, 1))
    assert row.activation_bytes == 8 * 5 * 5 * 4


SMALL = ModernCNN(num_classes=10, stage_sizes=(1,), width=4, block="residual", stem="large")


def test_rows_are_in_the_order_of_execution():
    assert [(row.path, row.kind, row.output) for row in layers(SMALL, (32, 48, 1))] == [
        ("stem/conv", "conv", (16, 24, 4)),
        ("stem/norm", "norm", (16, 24, 4)),
        ("stem", "max_pool", (8, 12, 4)),
        ("stage1_block1/conv1/conv", "conv", (8, 12, 4)),
        ("stage1_block1/conv1/norm", "norm", (8, 12, 4)),
        ("stage1_block1/conv2/conv", "conv", (8, 12, 4)),
        ("stage1_block1/conv2/norm", "norm", (8, 12, 4)),
        ("stage1_block1", "add", (8, 12, 4)),
        ("head", "global_pool", (4,)),
        ("head", "dense", (10,)),
    ]


TABLE = """\
layer          kind               output  stride  field  parameters  mult-adds  activation
------------------------------------------------------------------------------------------
stem           ConvBlock      8 x 12 x 4       4     11         204    75.26 k   13.50 KiB
stage1_block1  ResidualBlock  8 x 12 x 4       4     27         304    27.65 k    7.50 KiB
head           Head                   10          image          50         40        56 B
------------------------------------------------------------------------------------------
total                                                           558   102.95 k   21.05 KiB"""


def test_the_table():
    assert geometry.table(grouped(layers(SMALL, (32, 48, 1)), 1)) == TABLE
    oblong = geometry.table(layers(Network([conv((1, 3), (2, 1))]), (4, 5, 1)))
    assert "2 x 3 x 2   2 x 1  1 x 3" in oblong


def test_grouping_keeps_the_sums_at_every_depth():
    rows = layers(ModernCNN(), (64, 64, 3))
    for depth in (1, 2, 3, 9):
        groups = grouped(rows, depth)
        assert total(groups) == total(rows)
        assert max(row.path.count("/") for row in groups) < depth
    assert grouped(rows, 9) == rows
    block = next(row for row in grouped(rows, 1) if row.path == "stage2_block1")
    inside = [row for row in rows if row.path.startswith("stage2_block1")]
    assert block.kind == "BottleneckBlock"
    assert block.modules == ("ModernCNN", "BottleneckBlock")
    assert block.output == inside[-1].output
    assert block.receptive_field == inside[-1].receptive_field
    with pytest.raises(ValueError, match="depth=0: must be an integer >= 1"):
        grouped(rows, 0)


@pytest.mark.parametrize("image_shape", [(8, 8), (8, 0, 3), (1, 8, 8, 3)])
def test_an_image_of_another_form_is_refused(image_shape):
    with pytest.raises(ValueError, match=r"image_shape=.*must be \(height, width, channels\)"):
        layers(ModernCNN(), image_shape)
