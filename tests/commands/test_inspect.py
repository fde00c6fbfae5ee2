"""`python -m cnn_jax inspect`: what a person types, reads, and hands to another program."""

import json
from pathlib import Path

import pytest

from cnn_jax.__main__ import main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


@pytest.fixture
def inspect(capsys):
    """Returns a function that types the command: (exit code, output, errors)."""

    def run(*arguments: str) -> tuple[object, str, str]:
        try:
            code: object = main(["inspect", *arguments])
        except SystemExit as end:
            code = end.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


CONFIG = """
from configs import default


def get_config():
    config = default.get_config()
    config.model = {"name": "modern_cnn", "block": "residual", "stem": "medium", "width": 24}
    config.model.stage_sizes = (1, 1, 1)
    config.data.name = "fashion_mnist_10k"
    return config
"""


def test_the_network_of_a_config(inspect, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, nowhere = tmp_path / "mine.py", tmp_path / "nowhere"
    config.write_text(CONFIG)
    code, output, _ = inspect("--config", str(config), f"--config.data.data_dir={nowhere}")
    lines = output.splitlines()
    assert code == 0
    assert lines[0] == "modern_cnn, image 28 x 28 x 1"
    parts = ["stem", "stage1_block1", "stage2_block1", "stage3_block1", "head"]
    assert [line.split()[0] for line in lines[4:9]] == parts
    assert lines[10].split() == ["total", "173,842", "5.72", "M", "235.35", "KiB"]
    assert not nowhere.exists()

    _, wider, _ = inspect("--config", str(config), "--config.model.width=48")
    assert "14 x 14 x 48" in wider


def test_activations_have_the_precision_of_the_config(inspect):
    full, half = (
        json.loads(inspect("--config", QUICKSTART, f"--config.precision={name}", "--json=-")[1])
        for name in ("float32", "bfloat16")
    )
    assert half["layers"][0]["activation_bytes"] * 2 == full["layers"][0]["activation_bytes"]
    assert half["parameters"] == full["parameters"]


def test_a_network_by_name(inspect):
    code, output, _ = inspect("--model", "resnet50")
    assert code == 0
    assert output.startswith("resnet50, image 224 x 224 x 3\n")
    assert "25,557,032     4.09 G" in output
    assert "stage4_block3" in output
    assert "conv1" not in output

    _, output, _ = inspect(
        "--model=resnet_mini", "--image-size=32x48", "--channels=1", "--depth", "9"
    )
    assert output.startswith("resnet_mini, image 32 x 48 x 1\n")
    assert "stage1_block1/conv1/norm" in output


def test_rows_for_another_program(inspect, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--model=resnet_mini", "--image-size=32"]
    code, table, _ = inspect(*arguments, f"--json={path}")
    assert code == 0
    assert "resnet_mini" in table
    written = json.loads(path.read_text())
    _, printed, _ = inspect(*arguments, "--json=-")
    assert json.loads(printed) == written
    assert written["model"] == "resnet_mini"
    assert written["image_shape"] == [32, 32, 3]
    stem = written["layers"][0]
    assert stem["path"] == "stem"
    assert stem["kind"] == "ConvBlock"
    assert stem["receptive_field"] == [3, 3]
    assert stem["output"][:2] == [32, 32]
    for cost in ("parameters", "multiply_adds", "activation_bytes"):
        assert written[cost] == sum(row[cost] for row in written["layers"])

    before = path.read_bytes()
    code, output, error = inspect(*arguments, f"--json={path}")
    assert (code, output) == (2, "")
    assert error.endswith(f"argument --json: '{path}' is already there; name another file\n")
    assert path.read_bytes() == before

    nowhere = tmp_path / "no" / "rows.json"
    code, _, error = inspect(*arguments, f"--json={nowhere}")
    assert code == 2
    assert error.endswith(f"'{nowhere}': there is no directory {nowhere.parent}\n")


USAGE = {
    "a name almost right": (
        ["--model=resnt50"],
        "argument --model: unknown model 'resnt50' (did you mean 'resnet50'?)",
    ),
    "neither": ([], "one of the arguments --config --model --workdir is required"),
    "both": (
        ["--config", QUICKSTART, "--model=resnet50"],
        "argument --model: not allowed with argument --config",
    ),
    "size of a data set": (
        ["--config", QUICKSTART, "--image-size=8"],
        "--image-size: only with --model; the data set gives it",
    ),
    "override of no config": (
        ["--model=resnet50", "--config.seed=1"],
        "--config.seed: only with --config",
    ),
    "pictures of no run": (
        ["--model=resnet50", "--pictures=here"],
        "--pictures: only with --workdir",
    ),
    "an image without pictures": (
        ["--workdir", str(ROOT), "--image=shoe.png"],
        "--image: only with --pictures, where to draw",
    ),
    "a class without an image": (
        ["--workdir", str(ROOT), "--class=Bag"],
        "--class: only with --image",
    ),
    "a method without an image": (
        ["--workdir", str(ROOT), "--method=grad_cam"],
        "--method: only with --image",
    ),
    "averages of no run": (["--model=resnet50", "--ema"], "--ema: only with --workdir"),
    "no size": (
        ["--model=resnet50", "--image-size=12x"],
        "argument --image-size: '12x': must be pixels >= 1, such as 224 or HEIGHTxWIDTH, such as "
        "224x160",
    ),
    "no depth": (
        ["--model=resnet50", "--depth=0"],
        "argument --depth: '0': must be an integer >= 1",
    ),
    "a flag almost right": (
        ["--model=resnet50", "--dept=3"],
        "unrecognized arguments: --dept=3 (did you mean '--depth'?)",
    ),
    "no file": (
        ["--config", str(ROOT / "configs" / "quickstrt.py")],
        f"no file '{ROOT}/configs/quickstrt.py' (did you mean '{QUICKSTART}'?)",
    ),
}


@pytest.mark.parametrize(("arguments", "text"), USAGE.values(), ids=USAGE)
def test_a_wrong_command_line_is_exit_code_2(arguments, text, inspect):
    code, output, error = inspect(*arguments)
    assert (code, output) == (2, "")
    assert error.endswith(f"{text}\n")


def test_a_model_unlike_any_other_gets_all_the_names(inspect):
    _, _, error = inspect("--model=zzz")
    assert error.endswith("convnext_mini\n")
    assert "unknown model 'zzz'; known: modern_cnn, " in error


def test_an_image_that_does_not_fit_the_network_is_one_line(inspect):
    code, output, error = inspect("--model=resnet50", "--image-size=16")
    assert (code, output) == (1, "")
    assert error.startswith("resnet50: images of shape (1, 16, 16, 3): must be")
    assert error.count("\n") == 1


def test_all_mistakes_of_a_config_are_reported(inspect):
    code, output, error = inspect(
        "--config", QUICKSTART, "--config.model.widht=3", "--config.seed=-1"
    )
    assert (code, output) == (2, "")
    assert error == (
        f"{QUICKSTART}: 2 mistakes in the configuration\n"
        "  model.widht: unknown key (did you mean 'width'?)\n"
        "  seed = -1: must be an integer >= 0 and < 2147483648\n"
    )


def test_help(inspect):
    code, output, _ = inspect("--help")
    assert code == 0
    assert "inspect --model resnet50 --json -" in output
    assert "It needs no data." in output
