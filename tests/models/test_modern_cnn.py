"""ModernCNN against the oracle, the reference's shapes and the published counts."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import oracles
import pytest

from cnn_jax import ModernCNN

RESNET_50 = 25_557_032
PUBLISHED = {  # torchvision's tables, but for the literal reading, which nobody else counts
    "resnet18": ({"block": "residual", "stage_sizes": (2, 2, 2, 2)}, 11_689_512),
    "resnet34": ({"block": "residual"}, 21_797_672),
    "resnet50": ({}, RESNET_50),
    "literal": ({"variant": "literal"}, 25_583_592),
}

TINY = {"num_classes": 7, "stage_sizes": (1, 2), "width": 4}
COMBINATIONS = [  # every pair of two settings of these occurs
    {"variant": "standard", "stem": "large", "block": "bottleneck"},
    {"variant": "standard", "stem": "small", "block": "residual"},
    {"variant": "literal", "stem": "large", "block": "residual"},
    {"variant": "literal", "stem": "small", "block": "bottleneck"},
]


@functools.cache
def default_variables():
    return abstract_variables(ModernCNN(), (1, 224, 224, 3))


def abstract_variables(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda names: "-".join(names.values()))
def test_stages(assert_matches, combination):
    arguments = {key: TINY[key] for key in ("stage_sizes", "width")}
    assert_matches(
        ModernCNN(**TINY, **combination),
        oracles.modern_cnn_stages,
        (3, 17, 22, 5),
        method="stages",
        float32=2e-4,
        **arguments,
        **combination,
    )


def test_logits(assert_matches):
    arguments = {"stage_sizes": (1, 1, 1, 1), "width": 4} | COMBINATIONS[1]
    assert_matches(
        ModernCNN(num_classes=7, **arguments),
        oracles.modern_cnn,
        (4, 28, 28, 1),
        float32=2e-4,
        **arguments,
    )


@pytest.mark.parametrize(
    ("norm", "stem"),
    [
        ("group", {"conv": {"kernel"}, "norm": {"scale", "bias"}}),
        ("none", {"conv": {"kernel", "bias"}}),
    ],
)
def test_other_norms(assert_matches, norm, stem):
    """Neither keeps statistics; without a norm the convolutions have biases."""
    arguments = {"stage_sizes": (1, 1), "width": 16, "block": "residual", "stem": "medium"}
    model = ModernCNN(num_classes=7, norm=norm, **arguments)
    shape = (2, 7, 6, 3)
    variables = abstract_variables(model, shape)
    assert variables.keys() == {"params"}
    assert {name: set(layer) for name, layer in variables["params"]["stem"].items()} == stem
    assert_matches(
        model,
        oracles.modern_cnn_stages,
        shape,
        method="stages",
        variant="standard",
        **arguments,
    )


@pytest.mark.parametrize(("height", "width"), [(224, 224), (225, 225), (65, 65), (97, 131)])
def test_stage_by_stage_shapes_of_the_reference(height, width):
    def convolve(kernel_size, padding, strides):
        return [math.floor((side - kernel_size + 2 * padding) / strides) + 1 for side in sides]

    sides = [height, width]
    sides = convolve(7, 3, 2)
    stem = (2, *sides, 64)
    sides = convolve(3, 1, 2)
    expected = [(2, *sides, 64), (2, *sides, 256)]
    for channels in (512, 1024, 2048):
        assert convolve(3, 1, 2) == convolve(1, 0, 2)
        sides = convolve(3, 1, 2)
        expected.append((2, *sides, channels))

    def run(method):
        return jax.eval_shape(
            lambda variables, images: ModernCNN().apply(
                variables,
                images,
                train=False,
                method=method,
                capture_intermediates=lambda module, _: module.path[:1] == ("stem",),
            ),
            default_variables(),
            jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32),
        )

    maps, captured = run("stages")
    layers = captured["intermediates"]["stem"]
    assert layers["conv"]["__call__"][0].shape == layers["norm"]["__call__"][0].shape == stem
    assert layers["__call__"][0].shape == expected[0]
    assert [one.shape for one in maps] == expected
    assert run(None)[0].shape == (2, 1000)


def test_224_pixels_end_as_7():
    """The sizes that every table of ResNet-50 prints."""
    maps = jax.eval_shape(
        lambda variables, images: ModernCNN().apply(
            variables, images, train=False, method="stages"
        ),
        default_variables(),
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
    assert [one.shape[1] for one in maps] == [56, 56, 28, 14, 7]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    arguments, published = PUBLISHED[name]
    params = abstract_variables(ModernCNN(**arguments), (1, 64, 64, 3))["params"]
    assert count(params) == published
    assert oracles.modern_cnn_parameters(**arguments) == published


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda names: "-".join(names.values()))
def test_parameter_counts_at_other_sizes(combination):
    params = abstract_variables(ModernCNN(**TINY, **combination), (1, 32, 32, 5))["params"]
    assert count(params) == oracles.modern_cnn_parameters(channels=5, **TINY, **combination)


def test_bfloat16_is_for_the_computation_only():
    model = ModernCNN(**TINY, dtype=jnp.bfloat16)
    shape = (2, 32, 32, 3)
    variables = abstract_variables(model, shape)

    def run(method):
        return jax.eval_shape(
            lambda variables, images: model.apply(
                variables, images, train=True, mutable=["batch_stats"], method=method
            ),
            variables,
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )

    logits, updated = run(None)
    maps, _ = run("stages")
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updated, logits))} == {
        jnp.dtype("float32")
    }
    assert {one.dtype for one in maps} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("argument", ["variant", "stem", "block", "norm"])
def test_unknown_names_are_refused_with_the_known_ones(argument):
    known = {
        "variant": "'standard', 'literal'",
        "stem": "'large', 'deep', 'medium', 'small'",
        "block": "'bottleneck', 'residual'",
        "norm": "'batch', 'batch_unbiased', 'group', 'layer', 'none'",
    }[argument]
    with pytest.raises(ValueError, match=f"{argument}='larg': must be one of {known}"):
        abstract_variables(ModernCNN(**{argument: "larg"}), (1, 64, 64, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_sizes": ()}, r"stage_sizes=\(\): must be .* >= 1"),
        ({"stage_sizes": (1, 0)}, r"stage_sizes=\(1, 0\): must be .* >= 1"),
        ({"width": 0}, "width=0: must be >= 1"),
    ],
)
def test_networks_without_blocks_or_channels_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        abstract_variables(ModernCNN(**arguments), (1, 64, 64, 3))


@pytest.mark.parametrize(
    ("arguments", "shape", "least"),
    [
        ({}, (1, 16, 16, 3), 32),
        ({}, (1, 31, 64, 3), 32),
        ({}, (1, 64, 31, 3), 32),
        ({}, (1, 0, 0, 3), 32),
        ({"stem": "medium"}, (1, 15, 16, 3), 16),
        ({"stem": "small"}, (1, 7, 8, 3), 8),
        ({"stage_sizes": (1, 1)}, (1, 7, 8, 3), 8),
    ],
)
def test_images_smaller_than_the_strides_are_refused(arguments, shape, least):
    with pytest.raises(ValueError, match=rf"images of shape \({shape[0]}, {shape[1]}, .*{least}"):
        abstract_variables(ModernCNN(**arguments), shape)


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 1, 64, 64, 3), (64,)])
def test_images_without_a_batch_are_refused(monkeypatch, shape):
    """By the message that users see, who run without the type checks of these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"images of shape .*\[batch, height, width, channels\]"):
        abstract_variables(ModernCNN(), shape)


@pytest.mark.parametrize(("stem", "side"), [("large", 8), ("medium", 4), ("small", 2)])
def test_images_as_large_as_the_strides_end_as_one_pixel(stem, side):
    model = ModernCNN(**TINY, stem=stem)
    shape = (1, side, side, 3)
    maps = jax.eval_shape(
        lambda variables, images: model.apply(variables, images, train=False, method="stages"),
        abstract_variables(model, shape),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    assert maps[-1].shape[1:3] == (1, 1)
