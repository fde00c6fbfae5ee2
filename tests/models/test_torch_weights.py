"""State dicts of PyTorch: names and shapes as the libraries have them, numbers in their places."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax import BottleneckBlock, create_model
from cnn_jax.errors import UserError
from cnn_jax.models.torch_weights import (
    WeightsError,
    fold_conv_biases,
    from_torch,
    from_variables,
    head_and_channels,
    recognize,
    to_torch,
    torch_names,
    unfold_conv_biases,
)

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def published_state_dicts() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by name of every state dict in the file, its abbreviations written out."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in Path(__file__).with_name("torch_state_dicts.txt").read_text().splitlines():
        if line.startswith("["):
            shapes = found[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            pattern, *shape = line.split()
            span = re.search(r"\{(\d+)-(\d+)\}", pattern)
            numbers = range(int(span[1]), int(span[2]) + 1) if span else [0]
            for number in numbers:
                name = pattern.replace(span[0], str(number)) if span else pattern
                if name.endswith(".*"):
                    name = name.removesuffix("*")
                    shapes |= {name + leaf: (int(shape[0]),) for leaf in BATCH_NORM}
                    shapes[f"{name}num_batches_tracked"] = ()
                else:
                    shapes[name] = tuple(map(int, shape))
    return found


PUBLISHED = published_state_dicts()
OTHER_NAMES = {
    "torchvision googlenet_aux": ("googlenet", {}),
    "timm resnet50_cbam": ("cbam_resnet50", {}),
    "timm resnet50_eca": ("ecaresnet50", {}),
    "timm ecaresnet50d": ("ecaresnet50", {"stem": "deep", "downsample": "average"}),
}
SMALL = {
    "resnet_mini": {},
    "bottleneck_mini": {"variant": "literal"},
    "resnext_mini": {"stem": "deep", "downsample": "average"},
    "seresnet_mini": {"norm": "group", "width": 16},
    "ecaresnet_mini": {"pool": "generalized_mean"},
    "cbam_resnet_mini": {},
    "googlenet_mini": {"num_classes": 1},
    "convnext_mini": {},
}


@functools.cache
def abstract(name, channels=3, **arguments):
    model = create_model(name, **arguments)
    images = jnp.zeros((1, 224, 224, channels))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def small(name, dtype=np.float64, **arguments):
    """Variables of a small model, no two numbers equal, and whether it pools in its shortcuts."""
    arguments = {**SMALL[name], **arguments}
    shapes = flatten_dict(abstract(name, **arguments))
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=leaf.shape).astype(dtype) for path, leaf in shapes.items()}
    return unflatten_dict(values), arguments.get("downsample") == "average"


def assert_equal_bits(actual, expected):
    actual, expected = flatten_dict(actual), flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        assert actual[path].shape == array.shape, path
        assert actual[path].tobytes() == array.tobytes(), path


@pytest.mark.parametrize("title", PUBLISHED)
def test_names_and_shapes_are_those_of_the_libraries(title):
    library, name = title.split()
    name, arguments = OTHER_NAMES.get(title, (name, {}))
    shapes = PUBLISHED[title]
    zero = np.zeros((), np.float16)
    tensors = {name: np.broadcast_to(zero, shape) for name, shape in shapes.items()}
    like = abstract(name, **arguments)
    ignore = ("aux1", "aux2") if title.endswith("_aux") else ()

    variables = from_torch(tensors, like, ignore=ignore)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, like)
    assert head_and_channels(tensors, abstract(name, **arguments, num_classes=7)) == (1000, 3)
    average = recognize(tensors, like).average_downsample
    assert average == title.endswith("50d")
    library = "torchvision" if name.startswith("resnet") else library
    written = to_torch(variables, library, average_downsample=average)
    assert {name: array.shape for name, array in written.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith(ignore or "-")
    }
    assert written.get("bn1.num_batches_tracked", np.int64(0)).dtype == np.int64


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_there_and_back_is_the_same_bits(name, dtype):
    variables, average = small(name, dtype)
    for layout in ("torchvision", "timm"):
        if (name, layout) != ("googlenet_mini", "timm"):
            tensors = to_torch(variables, layout, average_downsample=average)
            assert_equal_bits(from_torch(tensors, variables), variables)


def test_every_number_stands_where_torch_has_it():
    cases = {
        ("resnext_mini", "stage1_block1/conv2/conv/kernel"): "layer1.0.conv2.weight",
        ("seresnet_mini", "stage2_block1/attention/expand/kernel"): "layer2.0.se.fc2.weight",
        ("ecaresnet_mini", "stage1_block1/attention/conv/kernel"): "layer1.0.se.conv.weight",
        ("convnext_mini", "stage2_downsample/conv/kernel"): "features.2.1.weight",
        ("convnext_mini", "stage3_block1/depthwise/kernel"): "features.5.0.block.0.weight",
        ("convnext_mini", "stage1_block1/layer_scale"): "features.1.0.layer_scale",
        ("googlenet_mini", "inception4a/branch2/conv/kernel"): "inception4a.branch2.1.conv.weight",
        ("googlenet_mini", "head/kernel"): "fc.weight",
    }
    orders = {1: "a->a", 2: "io->oi", 3: "sio->ois", 4: "hwio->oihw"}
    for (name, path), torch_name in cases.items():
        variables, average = small(name)
        leaf = flatten_dict(variables["params"], sep="/")[path]
        tensor = to_torch(variables, average_downsample=average)[torch_name]
        np.testing.assert_array_equal(
            tensor.reshape(tensor.shape[: leaf.ndim]), np.einsum(orders[leaf.ndim], leaf)
        )


def test_torch_names_are_given_by_path():
    like = abstract("convnext_mini")
    names = torch_names(like, "timm")
    assert (
        names["params", "stage2_block1", "expand", "kernel"] == "stages.1.blocks.0.mlp.fc1.weight"
    )
    assert len(set(names.values())) == len(names) == len(jax.tree.leaves(like))


def test_a_linear_layer_and_a_1x1_convolution_read_alike():
    variables, _ = small("convnext_mini")
    tensors = to_torch(variables, "timm")
    for name in ("stages.0.blocks.0.mlp.fc1.weight", "stages.0.blocks.0.gamma"):
        tensors[name] = tensors[name][..., None, None]
    assert_equal_bits(from_torch(tensors, variables), variables)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_taken_off(prefix):
    variables, _ = small("resnet_mini")
    tensors = {prefix + name: array for name, array in to_torch(variables).items()}
    assert_equal_bits(from_torch(tensors, variables), variables)


def test_counters_of_batches_may_be_missing():
    variables, _ = small("resnet_mini")
    tensors = {k: x for k, x in to_torch(variables).items() if not k.endswith("_tracked")}
    assert_equal_bits(from_torch(tensors, variables), variables)


def test_all_that_does_not_fit_is_listed_at_once():
    variables, _ = small("resnet_mini", num_classes=10)
    tensors = to_torch(variables)
    channels = variables["params"]["head"]["kernel"].shape[0]
    tensors["fc.weight"], tensors["fc.bias"] = np.zeros((7, channels)), np.zeros(7)
    tensors["bn1.running_var"] = tensors["bn1.running_var"].astype(np.int8)
    tensors["extra.num_batches_tracked"] = np.zeros((), np.int64)
    del tensors["layer1.0.bn1.weight"]
    with pytest.raises(WeightsError) as caught:
        from_torch(tensors, variables, ignore=["heed"])
    width = variables["params"]["stem"]["norm"]["scale"].size
    assert sorted(caught.value.problems) == [
        f"bn1.running_var: int8 ({width},), must be floating ({width},)",
        "extra.num_batches_tracked: int64 (), not expected",
        "fc.bias: float64 (7,), must be floating (10,)",
        f"fc.weight: float64 (7, {channels}), must be floating (10, {channels})",
        "heed: to be ignored, but there is no such part or tensor (did you mean 'head'?)",
        f"layer1.0.bn1.weight: missing, must be ({width},)",
    ]
    assert str(caught.value).startswith("the weights do not fit the model:\n  ")


def test_what_is_changed_afterwards_changes_nothing_that_was_converted():
    """As torch does, which trains in place."""
    variables, _ = small("resnet_mini")
    tensors = to_torch(variables)
    loaded, kept = from_torch(tensors, variables), to_torch(variables)
    for array in tensors.values():
        array += 1
    assert_equal_bits(loaded, variables)
    assert_equal_bits(from_torch(kept, variables), variables)


def test_what_is_no_state_dict_is_named(untyped):
    variables, _ = small("resnet_mini")
    tensors = to_torch(variables)
    with pytest.raises(UserError, match=r"^state_dict: is a dict, must be a NumPy array; of a tor"):
        from_torch({"state_dict": tensors}, variables)
    for part in (lambda: to_torch(variables["params"]), lambda: from_torch(tensors, {"stem": {}})):
        with pytest.raises(UserError, match=r'^variables of .*stem.*: must be all .*\{"params": '):
            part()
    assert from_torch(tensors, variables, ignore="head")["params"]["head"] is not None
    with pytest.raises(WeightsError, match="heed: to be ignored, but"):
        from_torch(tensors, variables, ignore="heed")


def test_shape_matters_even_where_the_numbers_are_as_many():
    variables, _ = small("resnet_mini")
    tensors = to_torch(variables)
    tensors["conv1.weight"] = tensors["conv1.weight"].transpose(2, 3, 1, 0)
    with pytest.raises(WeightsError, match=r"conv1\.weight: float64 \(3, 3, 3, \d+\), must be"):
        from_torch(tensors, variables)


@pytest.mark.parametrize(
    "ignore", [["head"], ["fc"], ["head/kernel", "fc.bias"], ["head", "stage1_block1/conv1"]]
)
def test_an_ignored_part_stays_as_it_stands(ignore):
    variables, _ = small("resnet_mini", num_classes=10)
    like = abstract("resnet_mini", num_classes=4)
    loaded = from_torch(to_torch(variables), like, ignore=ignore)
    assert loaded["params"]["head"] == like["params"]["head"]
    first = loaded["params"]["stage1_block1"]["conv1"]["conv"]["kernel"]
    assert isinstance(first, np.ndarray) == (len(ignore) == 1 or "fc.bias" in ignore)


def test_a_part_is_ignored_by_whole_names_only():
    variables, _ = small("resnet_mini")
    tensors = to_torch(variables) | {"fc2.weight": np.zeros(3)}
    with pytest.raises(WeightsError, match="fc2") as caught:
        from_torch(tensors, variables, ignore=["fc"])
    assert len(caught.value.problems) == 1


def test_another_model_is_suspected():
    variables, _ = small("convnext_mini")
    with pytest.raises(WeightsError, match="have other names; is it another model\\?"):
        from_torch(to_torch(variables), abstract("resnet_mini"))


@pytest.mark.parametrize(("file", "model"), [("literal", "standard"), ("standard", "literal")])
def test_biases_that_one_side_has_are_explained(file, model):
    variables, _ = small("bottleneck_mini", variant=file)
    with pytest.raises(WeightsError, match="can be folded or added; see `convert --help`"):
        from_torch(to_torch(variables), abstract("bottleneck_mini", variant=model))


def test_an_unknown_layout_and_a_model_of_neither_library():
    variables, _ = small("googlenet_mini")
    with pytest.raises(UserError, match=r"layout='timm'.*; layouts of it: torchvision"):
        to_torch(variables, "timm")
    with pytest.raises(UserError, match=r"no counterpart.*, where nothing is like params/mine/x"):
        to_torch({"params": {"mine": {"x": np.zeros(1)}}})


def test_variables_are_accounted_for_as_tensors_are():
    variables, _ = small("resnet_mini", np.float32, num_classes=10)
    like = abstract("resnet_mini", num_classes=4)
    loaded = from_variables(variables, like, ignore=["head"])
    assert loaded["params"]["head"] == like["params"]["head"]
    assert_equal_bits(loaded["batch_stats"], variables["batch_stats"])
    del variables["params"]["stem"]
    with pytest.raises(WeightsError) as caught:
        from_variables(variables, like)
    names = {problem.partition(":")[0] for problem in caught.value.problems}
    parts = {"conv/kernel", "norm/scale", "norm/bias"}
    assert names == {*(f"stem/{part}" for part in parts), "head/kernel", "head/bias"}


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_classes_and_channels_are_read_off(name, channels):
    shapes = abstract(name, channels, **{**SMALL[name], "num_classes": 5})
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    average = SMALL[name].get("downsample") == "average"
    tensors = to_torch(variables, average_downsample=average)
    assert head_and_channels(tensors, abstract(name, **SMALL[name])) == (5, channels)
    assert head_and_channels({}, abstract(name, **SMALL[name])) == (None, None)


class TestConvBiases:
    block = BottleneckBlock(4, use_bias=True)

    def test_folding_keeps_what_evaluation_computes(self):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(2, 5, 5, 16))
        literal = jax.eval_shape(
            lambda: self.block.init(jax.random.key(0), jnp.zeros(images.shape), train=False)
        )
        literal = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), literal)
        folded = fold_conv_biases(literal)
        assert "bias" not in folded["params"]["conv1"]["conv"]
        with jax.enable_x64(True):
            expected = self.block.apply(literal, images, train=False)
            actual = self.block.clone(use_bias=False).apply(folded, images, train=False)
            again = self.block.apply(unfold_conv_biases(folded), images, train=False)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(again, actual)

    def test_models_fold_into_one_another(self):
        literal, _ = small("bottleneck_mini", variant="literal")
        standard = abstract("bottleneck_mini", variant="standard")
        folded = fold_conv_biases(literal)
        assert jax.tree.map(np.shape, folded) == jax.tree.map(np.shape, standard)
        unfolded = unfold_conv_biases(folded)
        assert jax.tree.map(np.shape, unfolded) == jax.tree.map(np.shape, literal)
        assert not unfolded["params"]["stem"]["conv"]["bias"].any()
        assert_equal_bits(fold_conv_biases(unfolded), folded)

    def test_unfolding_leaves_biases_that_are_there(self):
        literal, _ = small("bottleneck_mini", variant="literal")
        assert_equal_bits(unfold_conv_biases(literal), literal)

    @pytest.mark.parametrize("norm", ["layer", "batch"])
    def test_a_convolution_behind_its_norm_keeps_its_bias(self, norm):
        variables, _ = small("convnext_mini", norm=norm)
        folded = fold_conv_biases(variables)
        assert "bias" in folded["params"]["stage2_downsample"]["conv"]
        assert ("bias" in folded["params"]["stem"]["conv"]) == (norm == "layer")
