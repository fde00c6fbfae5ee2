"""`convert`: from a file of PyTorch to a directory and back, bit for bit or with one message."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import create_model
from cnn_jax.__main__ import main
from cnn_jax.models.torch_weights import fold_conv_biases, to_torch
from cnn_jax.runtime.weight_files import read_directory, read_tensors, sha256, write_tensors

MODELS = {  # name: flags of convert, arguments of the model, layout
    "resnet_mini": ([], {}, "torchvision"),
    "resnext_mini": (
        ["--argument=stem=deep", "--argument", "downsample=average", "--argument=stage_sizes=1,"],
        {"stem": "deep", "downsample": "average", "stage_sizes": (1,)},
        "torchvision",
    ),
    "cbam_resnet_mini": (["--num-classes=5"], {}, "torchvision"),
    "googlenet_mini": (["--argument=blocks=3a,5b"], {"blocks": ("3a", "5b")}, "torchvision"),
    "convnext_mini": ([], {}, "timm"),
}


def make_variables(name, *, num_classes=5, channels=1, dtype=np.float32, **arguments):
    """Random variables of a small model, no two alike."""
    model = create_model(name, num_classes=num_classes, **arguments)
    images = jnp.zeros((1, 64, 64, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), dict(shapes))


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Returns a function that types the command in an empty folder: (exit code, output)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["convert", *arguments])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run


@pytest.fixture
def resnet(tmp_path):
    """The path of a file with weights of resnet_mini, for 5 classes and 1 channel."""
    path = tmp_path / "resnet.safetensors"
    write_tensors(path, to_torch(make_variables("resnet_mini")))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_bits(name, dtype, convert, tmp_path):
    flags, arguments, layout = MODELS[name]
    variables = make_variables(name, dtype=dtype, **arguments)
    average = arguments.get("downsample") == "average"
    tensors = to_torch(variables, layout, average_downsample=average)
    write_tensors(tmp_path / "a.safetensors", tensors)

    code, output = convert("a.safetensors", f"--model={name}", "--to=weights/a", *flags)
    assert code == 0, output
    assert f"a.safetensors: {name}(num_classes=5" in output
    assert output.endswith("a run starts from it with --config.init_from=weights/a\n")
    found, record = read_directory(tmp_path / "weights" / "a")
    assert jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), found, variables)
    assert record["model"]["name"] == name
    assert record["source"]["sha256"] == sha256(tmp_path / "a.safetensors")
    assert record["source"]["layout"] == layout

    code, output = convert("weights/a", "--to", "b.safetensors")
    assert code == 0, output
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_of_torch_gives_what_it_holds(convert, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = to_torch(make_variables("resnet_mini"))
    state_dict = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    for name, zipped in (("new", True), ("old", False)):
        path = tmp_path / f"{name}.pth"
        torch.save({"state_dict": state_dict}, path, _use_new_zipfile_serialization=zipped)
        assert convert(f"{name}.pth", "--model=resnet_mini", "--to", name)[0] == 0
        assert convert(name, "--to", f"{name}.safetensors")[0] == 0
        found = read_tensors(tmp_path / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        assert all(found[key].tobytes() == tensors[key].tobytes() for key in tensors)


def test_another_layout_and_a_plain_change_of_names(convert, tmp_path):
    variables = make_variables("convnext_mini")
    write_tensors(tmp_path / "a.safetensors", to_torch(variables, "torchvision"))
    flags = ("--model=convnext_mini", "--layout=timm", "--to=b.safetensors")
    assert convert("a.safetensors", *flags)[0] == 0
    expected = to_torch(variables, "timm")
    found = read_tensors(tmp_path / "b.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == expected[key].tobytes() for key in found)


def test_an_ignored_head_is_random_and_of_any_size(convert, resnet, tmp_path):
    flags = ("--model=resnet_mini", "--ignore=head", "--num-classes=7", "--to=weights")
    assert convert(str(resnet), *flags)[0] == 0
    found, record = read_directory(tmp_path / "weights")
    expected = make_variables("resnet_mini")
    assert record["source"]["ignored"] == ["head"]
    assert found["params"]["head"]["kernel"].shape[1] == 7
    assert 0 < found["params"]["head"]["kernel"].std() < 0.5
    for part in expected["params"].keys() - {"head"}:
        ours, theirs = found["params"][part], expected["params"][part]
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_biases_fold_and_come_back_as_zeros(convert, tmp_path):
    literal = make_variables("bottleneck_mini", variant="literal")
    write_tensors(tmp_path / "a.safetensors", to_torch(literal))
    code, output = convert("a.safetensors", "--model=bottleneck_mini", "--to=weights")
    assert code == 1
    assert "conv1.bias: float32 " in output
    assert "biases in front of BatchNorm can be folded or added; see `convert --help`" in output

    flags = ("--model=bottleneck_mini", "--conv-biases=fold", "--to=folded.safetensors")
    code, output = convert("a.safetensors", *flags)
    assert code == 0, output
    assert "the ReLU that variant='literal' has before each addition is another matter" in output
    folded, expected = read_tensors(tmp_path / "folded.safetensors"), fold_conv_biases(literal)
    for name, array in to_torch(expected).items():
        assert folded[name].tobytes() == array.tobytes()

    flags = ("--model=bottleneck_mini", "--argument=variant=literal", "--conv-biases=zero")
    assert convert("folded.safetensors", *flags, "--to=b.safetensors")[0] == 0
    back = read_tensors(tmp_path / "b.safetensors")
    assert back.keys() == to_torch(literal).keys()
    assert not back["conv1.bias"].any()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--conv-biases=fold", "--argument=variant=literal"], "no convolution without bias"),
        (["--conv-biases=zero"], "no bias before a BatchNorm"),
        (["--conv-biases=fold", "--argument=norm=group"], "no convolution without bias"),
    ],
)
def test_biases_that_are_not_there_to_convert(flags, text, convert, resnet):
    code, output = convert(str(resnet), "--model=resnet_mini", "--to=weights", *flags)
    assert (code, text in output) == (1, True), output


def test_a_run_is_a_directory_of_weights(convert, trainer, reference, tmp_path):
    code, output = convert(str(reference), "--to", "run.safetensors")
    assert code == 0, output
    variables, record = read_directory(reference)
    found = read_tensors(tmp_path / "run.safetensors")
    for name, array in to_torch(variables).items():
        assert found[name].tobytes() == array.tobytes()

    assert convert(str(reference), "--to", "weights")[0] == 0
    again, converted = read_directory(tmp_path / "weights")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))
    arguments = dict(record["config"]["model"])
    assert converted["model"]["name"] == arguments.pop("name")
    assert converted["model"]["arguments"] == {**arguments, "num_classes": 10}
    json.dumps(converted)


MISTAKES = {
    "no such file": (["resnt.safetensors", "--to=x"], r"no file 'resnt.*did you mean 'resnet\.s"),
    "no model": (["resnet.safetensors", "--to=x"], "does not say what model it is for: --model"),
    "another model": (
        ["resnet.safetensors", "--model=convnext_mini", "--to=x"],
        "is it another model",
    ),
    "other classes": (
        ["resnet.safetensors", "--model=resnet_mini", "--num-classes=7", "--to=x"],
        r"fc\.bias: float32 \(5,\), must be floating \(7,\)\n  fc\.weight",
    ),
    "a part that is not there": (
        ["resnet.safetensors", "--model=resnet_mini", "--ignore=haed", "--to=x"],
        "haed: to be ignored, but there is no such part or tensor .did you mean 'head'",
    ),
    "arguments that cannot be": (
        ["resnet.safetensors", "--model=resnet_mini", "--argument=width=-1", "--to=x"],
        r"resnet_mini\(width=-1\): width=-1: must be",
    ),
    "a target that is there": (
        ["resnet.safetensors", "--model=resnet_mini", "--to=resnet.safetensors"],
        "exists already and is left as it is",
    ),
    "a file of torch to write": (
        ["resnet.safetensors", "--model=resnet_mini", "--to=x.pth"],
        "files are written as .safetensors; in PyTorch, safetensors.torch.load_file reads them",
    ),
    "an empty directory": (["empty", "--to=x"], "holds no good checkpoint"),
    "a model for a directory": (["empty", "--model=resnet18", "--to=x"], "says itself what model"),
    "a layout that no model has": (
        ["g.safetensors", "--model=googlenet_mini", "--layout=timm", "--to=x.safetensors"],
        "layout='timm'.*; layouts of it: torchvision",
    ),
}

OF_THE_COMMAND = {"no model", "a model for a directory", "a file of torch to write"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_written(mistake, convert, resnet, tmp_path):
    (tmp_path / "empty").mkdir()
    if mistake == "a layout that no model has":
        write_tensors(tmp_path / "g.safetensors", to_torch(make_variables("googlenet_mini")))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments, text = MISTAKES[mistake]
    code, output = convert(*arguments)
    assert code == (2 if mistake in OF_THE_COMMAND else 1)
    assert re.search(text, output), output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


USAGE = {
    "no target": (["a.pth"], "the following arguments are required: --to"),
    "unknown model": (["a.pth", "--to=x", "--model=resnt18"], "did you mean 'resnet18'"),
    "no value": (["a.pth", "--to=x", "--argument=width"], "--argument width: must be KEY=VALUE"),
    "a key of a run": (["a.pth", "--to=x", "--config.seed=1"], "--config.seed: not an option of"),
    "classes as an argument": (
        ["a.pth", "--to=x", "--model=resnet18", "--argument=num_classes=3"],
        "--argument num_classes: must be --num-classes N",
    ),
}


@pytest.mark.parametrize("mistake", USAGE)
def test_a_wrong_command_line_is_exit_code_2(mistake, convert, capsys):
    arguments, text = USAGE[mistake]
    with pytest.raises(SystemExit) as caught:
        convert(*arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_wrong_arguments_of_the_model_are_exit_code_2(convert):
    flags = ("--argument=widht=3", "--argument=stem=3.5", "--argument", "width=wide")
    code, output = convert("a.pth", "--to=x", "--model=resnet_mini", *flags)
    assert code == 2
    assert "model.widht: unknown key (did you mean 'width'?)" in output
    assert "model.width = 'wide': must be an integer" in output
