"""Every public model, with other classes, channels and norms, and as a list of feature maps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cnn_jax import MODELS, ConvNeXt, GoogLeNet, ModernCNN, create_model

DISTINCT = [name for name in MODELS if name not in ("resnet101", "resnet152")]  # but for depth
SMALL = [name for name in MODELS if name.endswith("_mini")]


def outputs(model, shape, train=False):
    """The abstract output and variables."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(lambda: model.init_with_output(rngs, jnp.zeros(shape), train=train))


@functools.cache
def shapes_of_parameters(name):
    _, variables = outputs(create_model(name), (2, 64, 64, 3))
    return jax.tree.map(jnp.shape, variables["params"])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", DISTINCT)
def test_any_norm_classes_and_channels(name, norm):
    model = create_model(name, num_classes=7, norm=norm)
    logits, variables = outputs(model, (2, 64, 64, 1))
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert ("batch_stats" in variables) == (norm == "batch")
    biases = [
        path
        for path, _ in jax.tree.leaves_with_path(variables["params"])
        if path[-1].key == "bias" and path[-2].key == "conv"
    ]
    assert bool(biases) == (norm == "none" or "literal" in name or "convnext" in name)


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("sides", [(64, 64), (96, 65)])
def test_feature_maps_and_their_strides(name, sides):
    model = create_model(name, features_only=True)
    maps, variables = outputs(model, (2, *sides, 3))
    assert len(maps) == len(model.feature_strides)
    for one, stride in zip(maps, model.feature_strides, strict=True):
        for side, extent in zip(sides, one.shape[1:3], strict=True):
            assert extent in (side // stride, -(-side // stride))
    whole = shapes_of_parameters(name)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes | {"head": whole["head"]} == whole
    assert whole["head"]["kernel"] == (maps[-1].shape[-1], 1000)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_small_models_take_small_images(name, channels):
    for side in (8, 64):
        logits, variables = outputs(create_model(name, num_classes=10), (1, side, side, channels))
        assert logits.shape == (1, 10)
        size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert 0.05e6 < size < 0.25e6


@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_those_of_their_families(name):
    family = {"googlenet_mini": GoogLeNet, "convnext_mini": ConvNeXt}.get(name, ModernCNN)
    assert isinstance(create_model(name), family)


@pytest.mark.parametrize("pool", ["average", "max", "generalized_mean"])
@pytest.mark.parametrize("name", ["resnet_mini", "googlenet_mini", "convnext_mini"])
def test_any_pool(name, pool):
    _, variables = outputs(create_model(name, pool=pool), (1, 8, 8, 3))
    assert ("pool" in variables["params"]["head"]) == (pool == "generalized_mean")


@pytest.mark.parametrize("name", ["resnet_mini", "googlenet_mini", "convnext_mini"])
@pytest.mark.parametrize("arguments", [{"initialization": "torch"}, {"dtype": jnp.bfloat16}])
def test_other_starts_and_precisions_have_the_same_tree(name, arguments):
    changed, same = (
        outputs(create_model(name, **one), (2, 8, 8, 3), train=True) for one in (arguments, {})
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), changed) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), same
    )


def test_strides_of_a_network_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="stem='larg': must be one of 'large'"):
        _ = create_model("resnet_mini", stem="larg").feature_strides


def test_a_model_has_the_name_it_is_given_inside_another():
    assert create_model("resnet_mini", features_only=True, name="backbone").name == "backbone"


def test_an_unknown_model_lists_the_known_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"'resnt50': unknown \(did you mean 'resnet50'\?\); known"
    ):
        create_model("resnt50")


def test_what_is_no_name_is_refused_as_one(untyped):
    for name in (None, 3, []):
        with pytest.raises(ValueError, match=r"^model .*: unknown; known: bottleneck_mini, "):
            create_model(name)


def test_an_unknown_argument_lists_the_known_and_the_nearest():
    message = r"widht: not an argument of model 'resnet18' \(did you mean 'width'\?\); known: anti"
    with pytest.raises(ValueError, match=message):
        create_model("resnet18", widht=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet_mini", {"num_classes": 0}, "num_classes=0: must be >= 1"),
        ("convnext_mini", {"pool": "x", "features_only": True}, "pool='x': must be one of"),
        ("resnet_mini", {"pool": "sum"}, "pool='sum': must be one of 'average', 'max', 'gen"),
        ("resnet_mini", {"attention": "se"}, "attention='se': must be one of 'none', 'squeeze"),
        ("resnet_mini", {"downsample": "x"}, "downsample='x': must be one of 'projection', 'av"),
        ("resnet_mini", {"initialization": "x"}, "initialization='x': must be one of 'torchv"),
        ("resnet_mini", {"groups": 2}, "groups=2, width_per_group=64: must be 1 and 64"),
        ("resnet_mini", {"stochastic_depth_rate": -0.1}, "depth_rate=-0.1: must be >= 0 and < 1"),
        ("resnet_mini", {"stochastic_depth_rate": 1.0}, "depth_rate=1.0: must be >= 0 and < 1"),
        ("resnext_mini", {"width_per_group": 3}, "width_per_group=3: .* >= 4 where features=16"),
        ("resnext_mini", {"groups": 0}, "groups=0: must be >= 1"),
        ("resnet50d", {"width": 1}, "width=1: must be >= 2"),
        ("bottleneck_mini", {"width": 24, "norm": "group"}, "width=24: must be a multiple of 16"),
        (
            "resnet_mini",
            {"variant": "literal", "zero_init_last": True},
            "zero_init_last=True: must not be combined with relu_before_add=True",
        ),
        ("resnet_mini", {"norm": "none", "zero_init_last": True}, "norm='none': has no scale"),
        ("googlenet_mini", {"blocks": ()}, r"blocks=\(\): must name one"),
        ("googlenet_mini", {"blocks": ("4a", "3a")}, "must be some of 3a, .*, in this order"),
        ("googlenet_mini", {"blocks": ("3a", "6a")}, "must be some of 3a, .*, in this order"),
        ("googlenet_mini", {"stem": "deep"}, "stem='deep': must be one of 'large', 'small'"),
        ("googlenet_mini", {"width": 3}, "width=3: must be >= 4"),
        ("googlenet_mini", {"dropout_rate": 1.0}, "dropout_rate=1.0: must be >= 0 and < 1"),
        ("googlenet_mini", {"norm": "x"}, "norm='x': must be one of"),
        ("convnext_mini", {"stem": "large"}, "stem='large': must be one of 'patch', 'small'"),
        ("convnext_mini", {"stage_sizes": (0,)}, r"stage_sizes=\(0,\): must be one or more"),
        ("convnext_mini", {"width": 0}, "width=0: must be >= 1"),
        ("convnext_mini", {"norm": "x"}, "norm='x': must be one of"),
    ],
)
def test_networks_that_cannot_be_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        outputs(create_model(name, **arguments), (1, 64, 64, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1.5}, "width=1.5: must be an integer >= 1"),
        ({"width": "8"}, "width='8': must be an integer >= 1"),
        ({"stage_sizes": 2}, "stage_sizes=2: must be one or more numbers"),
        ({"stage_sizes": "22"}, "stage_sizes='22': must be one or more numbers"),
        ({"stage_sizes": (2.5,)}, r"stage_sizes=\(2\.5,\): must be one or more numbers"),
    ],
)
def test_arguments_of_another_type_are_refused(monkeypatch, arguments, message):
    """By the message that users see, who run without the type checks of these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        outputs(create_model("resnet_mini", **arguments), (1, 64, 64, 3))


@pytest.mark.parametrize("name", ["resnet50", "googlenet", "convnext_tiny"])
def test_images_smaller_than_the_strides_are_refused(name):
    with pytest.raises(ValueError, match=r"\(1, 31, 40, 3\): .* at least 32 pixels"):
        outputs(create_model(name), (1, 31, 40, 3))


@pytest.mark.parametrize(
    ("name", "branch"), [("resnet_mini", "conv2"), ("bottleneck_mini", "conv3")]
)
def test_zero_initialised_scales_make_each_block_the_identity_at_first(name, branch):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    model = create_model(name, zero_init_last=True, stage_sizes=(3,))
    variables = model.init(jax.random.key(0), images, train=False)
    scales = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(variables["params"])
        if path[-1].key == "scale"
    }
    zero = {path for path, leaf in scales.items() if (leaf == 0).all()}
    assert zero == {f"stage1_block{number}/{branch}/norm/scale" for number in (1, 2, 3)}
    assert all((leaf == 1).all() for path, leaf in scales.items() if path not in zero)
    _, captured = model.apply(variables, images, train=False, capture_intermediates=True)
    blocks = [captured["intermediates"][f"stage1_block{n}"]["__call__"][0] for n in (1, 2, 3)]
    np.testing.assert_array_equal(blocks[1], blocks[0])
    np.testing.assert_array_equal(blocks[2], blocks[0])


@pytest.mark.parametrize("name", ["resnet_mini", "convnext_mini"])
def test_stochastic_depth_rises_with_the_depth_and_ends_with_training(name):
    """Of ten blocks with rates 0 to 0.9, the first never and the last nearly always is left out."""
    images = jnp.ones((256, 4, 4, 1))
    model = create_model(
        name, stage_sizes=(10,), width=4, stochastic_depth_rate=0.9, features_only=True
    )
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(lambda: model.init(rngs, images, train=False))()
    if name == "convnext_mini":
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # beyond 1e-6 of the branch

    def skipped(train):
        def run(variables, images):
            return model.apply(
                variables,
                images,
                train=train,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: "block" in (module.name or ""),
                rngs={"dropout": jax.random.key(2)},
            )

        _, updated = jax.jit(run)(variables, images)
        blocks = [
            updated["intermediates"][f"stage1_block{n + 1}"]["__call__"][0] for n in range(10)
        ]
        return [
            float(np.mean(np.all(np.asarray(after == before), axis=(1, 2, 3))))
            for before, after in itertools.pairwise(blocks)
        ]

    expected = np.arange(1, 10) / 10
    np.testing.assert_allclose(skipped(True), expected, atol=4 * 0.5 / np.sqrt(256))
    assert skipped(False) == [0.0] * 9
