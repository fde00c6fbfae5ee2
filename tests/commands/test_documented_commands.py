"""Every command in the documents: run, read by its own parser, or listed with a reason."""

import io
import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cnn_jax.__main__ import _parser, main
from cnn_jax.cli.config_files import parsed, split_overrides
from cnn_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

PYTHON = {"python", "py"}  # run by test_readme.py and, the one block of `py`, by test_export.py
OF_THE_SITE = {"{toctree}", "{eval-rst}"}
FILES = {"yaml"}  # parts of files, shown

STARTS_A_COMMAND = re.compile(
    r"(\w+=\S+ )*(python|python3|pip|pytest|ruff|pyright|cnn-jax|bash|sh|git|cd|find|until|for"
    r"|while|docker|kubectl|gcloud|gsutil|aws|sbatch|srun|mpirun|curl|wget|tar|apt-get|export) "
)

NOT_RUN = {
    "git clone REPOSITORY cnn_jax": "needs the network",
    "cd cnn_jax": "into what was cloned",
    "python -m venv .venv": "an environment",
    ". .venv/bin/activate": "an environment",
    "[ $code -eq 0 ]": "a condition of the loop in docs/faults.md, whose syntax is checked",
    "pytest": "the tests themselves",
    "pytest -m not slow": "the tests themselves",
    "pytest tests/models": "the tests themselves",
    "ruff check .": "CI's own step",
    "ruff format .": "CI's own step",
    "pyright": "CI's own step",
    "python -m sphinx -W --keep-going -b html docs build/docs": "CI's own step",
    "python -c import jax; print(jax.devices())": "nothing of this package",
    "find photos -name *.png": "the other end of its pipe is run below",
}
"""By their words, what is neither run here nor read by a parser of this package, and why."""

TRAINS = "trains for minutes; test_train*.py run it shortened"
NEEDS_WEIGHTS = "needs torchvision's weights; test_convert.py has a file of its own"
COMPILES = "compiles for minutes; test_compile.py has smaller networks"
ANSWERS = "runs until it is stopped; test_serve.py asks it"
LEFT_OUT = {
    "python train.py --config configs/quickstart.py": TRAINS,
    "python train.py --config configs/quickstart.py --step-timeout 600": TRAINS,
    "python train.py --config configs/quickstart.py --workdir runs/broken_off": TRAINS,
    "python train.py --config configs/quickstart.py --config.model.name=seresnet_mini "
    "--workdir runs/attention": TRAINS,
    "python train.py --config configs/mine.py": TRAINS,
    "python train.py --config configs/quickstart.py --config.mesh.fsdp=2 --workdir runs/eight": (
        TRAINS
    ),
    "python train.py --config configs/synthetic.py": TRAINS,
    "python train.py --config configs/synthetic.py --config.mesh.data=4 --config.mesh.fsdp=2": (
        TRAINS
    ),
    "python train.py --config configs/synthetic.py --workdir gs://BUCKET/runs/synthetic": TRAINS,
    "python train.py --config FILE --config.init_from=weights/resnet50 "
    "--config.init_ignore=head,": TRAINS,
    "python -m cnn_jax convert resnet50.pth --model resnet50 --to weights/resnet50": NEEDS_WEIGHTS,
    "python -m cnn_jax compile --config configs/synthetic.py --topology v5e:2x2,h200:8": COMPILES,
    "python -m cnn_jax compile --config configs/synthetic.py --topology v5e:2x2,h200:8 "
    "--plot pictures": COMPILES,
    "python -m cnn_jax compile --config configs/synthetic.py --topology h200 "
    "--step train,prediction": COMPILES,
    **{
        "python train.py --config configs/quickstart.py --coordinator 127.0.0.1:8476 "
        f"--num-processes 2 --process-id {index}": "two at once; test_train_processes.py has them"
        for index in range(2)
    },
    "python -m cnn_jax data prepare cifar10": "needs the network",
    "python -m cnn_jax data prepare --config configs/imagenet_resnet50.py --resize 256 "
    "--output DIR": "needs ImageNet; test_data.py resizes other images",
    "python -m cnn_jax serve --workdir runs/quickstart": ANSWERS,
    "python -m cnn_jax export --workdir runs/quickstart --format onnx --to clothes.onnx": (
        "needs the extra onnx; test_export.py has it"
    ),
}
"""By their words, the commands of this package that are read by their parser alone, and why."""

MISTAKEN = {
    "python train.py --config configs/quickstart.py --config.optimizer.learning_rate=-1 "
    "--config.model.widht=3 --config.batch_size 1e3 --config.data.name=fashion",
    "python train.py --config configs/quickstart.py --config.optimizer.learning_rate=-1 --dry-run",
}
"""Commands that show a mistake in a configuration."""

PLACEHOLDERS = {
    "FILE": "configs/quickstart.py",
    "configs/mine.py": "configs/quickstart.py",  # which the reader writes
    "runs/NAME": "runs/quickstart",
}


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Document, language and text of every fenced block."""
    for path in DOCUMENTS:
        for language, text in re.findall(
            r"^```(\S*)[^\n]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            yield path, language, text


def logical_lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", text).splitlines()


def scripts() -> Iterator[tuple[Path, str]]:
    """What is typed in each block of commands: all of it, or what stands behind its `$`."""
    for path, language, text in blocks():
        lines = logical_lines(text)
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if not language and (typed or any(map(STARTS_A_COMMAND.match, lines))):
            yield path, "\n".join(typed or lines)


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of each command, without what joins commands and without redirections."""
    keywords = {"until", "while", "do", "done", "if", "then", "fi"}
    for line in script.splitlines():
        if re.match(r"\s*(case|\S*\)|esac|done)\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token and set(token) <= set("&|;"):
                if words:
                    yield words
                words = []
            elif words or (token not in keywords and not re.fullmatch(r"\w+=\S*", token)):
                words.append(token)


COMMANDS = [
    pytest.param(words, id=f"{path.stem}: {shlex.join(words)}")
    for path, script in scripts()
    for words in simple_commands(script)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory in which what the documents name is there."""
    place = tmp_path_factory.mktemp("place")
    for name in ("configs", "train.py", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    for name in ("runs/quickstart", "runs/wide", "photos", "more", "DIR/train/a", "DIR/train/b"):
        (place / name).mkdir(parents=True)
    shutil.copytree(place / "DIR" / "train", place / "DIR" / "validation")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for name in ("shoe.png", "photos/a.png", "more/b.jpg"):
        Image.fromarray(pixels).save(place / name)
    for number in range(128):
        for split, label in (("train", "a"), ("train", "b"), ("validation", "a")):
            Image.fromarray(pixels[:2, :2]).save(place / "DIR" / split / label / f"{number}.png")
    Image.fromarray(pixels[:2, :2]).save(place / "DIR" / "validation" / "b" / "0.png")
    return place


def test_every_block_is_of_a_kind_that_is_checked():
    assert {language for _, language, _ in blocks()} <= {"", *PYTHON, *OF_THE_SITE, *FILES}


def test_every_block_of_yaml_is_part_of_a_recipe():
    recipes = [
        part
        for path in ROOT.glob("launch/*.yaml")
        for whole in yaml.safe_load_all(path.read_text())
        for part in parts_of(whole)
    ]
    for path, language, text in blocks():
        if language == "yaml":
            for key, value in yaml.safe_load(text).items():
                assert any(part.get(key) == value for part in recipes), (path, key)


def parts_of(whole: object) -> Iterator[dict]:
    """Every mapping within a document of YAML."""
    if isinstance(whole, dict):
        yield whole
    if isinstance(whole, dict | list):
        for part in whole.values() if isinstance(whole, dict) else whole:
            yield from parts_of(part)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_shell_reads_every_block_of_commands(path):
    for other, script in scripts():
        if other == path:
            result = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
            assert (result.returncode, result.stderr) == (0, ""), script


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_known(words, place, monkeypatch):
    text = " ".join(words)
    if text in NOT_RUN:
        return
    monkeypatch.chdir(place)
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[:2] == ["pip", "install"]:
        check_install(words[2:])
    elif words[:2] == ["python", "train.py"]:
        check_command(["train", *words[2:]], mistaken=text in MISTAKEN)
    elif words[:3] == ["python", "-m", "cnn_jax"]:
        check_command(words[3:])
    elif words[0] == "curl":
        check_request(words[1:])
    elif words[:2] == ["docker", "build"]:
        check_build(words[2:])
    elif words[:2] == ["docker", "run"]:
        check_command(words[words.index("cnn_jax") + 1 :])
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        check_script(words[1], words[2:])
    else:
        pytest.fail(f"{text!r}: run it here, or list it in NOT_RUN with the reason")


def check_install(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = extras["optional-dependencies"]
    assert words[:1] == ["-e"]
    for extra in filter(None, re.sub(r"^\.\[?|\]$", "", words[1]).split(",")):
        assert extra in known


def check_request(arguments: list[str]) -> None:
    """A request whose answer tests/commands/test_serve.py checks: the path is one of the server."""
    (address,) = (word for word in arguments if word.startswith("http"))
    path = "/" + address.partition("://")[2].partition("/")[2].partition("?")[0]
    assert f'"{path}"' in (ROOT / "cnn_jax" / "serving" / "application.py").read_text()


def check_build(arguments: list[str]) -> None:
    """An image, not built here: its arguments are those of the Dockerfile."""
    asked = [word for flag, word in itertools.pairwise(arguments) if flag == "--build-arg"]
    for name in (word.partition("=")[0] for word in asked):
        assert f"ARG {name}=" in (ROOT / "Dockerfile").read_text()


def check_command(arguments: list[str], *, mistaken: bool = False) -> None:
    """The command's own parser takes the arguments, and the configuration is a good one."""
    flags, overrides = split_overrides(arguments)
    options, unknown = _parser().parse_known_args(flags)
    assert not unknown
    if getattr(options, "config", None) is None:
        return
    if mistaken:
        with pytest.raises(ConfigError):
            parsed(options.config, overrides)
    else:
        parsed(options.config, overrides)


def check_script(path: str, arguments: list[str]) -> None:
    source = (ROOT / path).read_text()
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source


def test_every_command_that_is_not_run_is_in_a_document():
    texts = {" ".join(words) for path, script in scripts() for words in simple_commands(script)}
    assert LEFT_OUT.keys() <= texts


@pytest.mark.slow
def test_commands_of_this_package_run(place, reference, monkeypatch, capsys):
    shutil.rmtree(place / "runs" / "quickstart")
    shutil.copytree(reference, place / "runs" / "quickstart")
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/a.png\n"))
    starts = {("python", "train.py"): ["train"], ("python", "-m", "cnn_jax"): []}
    ran = set()
    for path, script in scripts():
        for words in simple_commands(script):
            text = " ".join(words)
            for start, command in starts.items():
                if tuple(words[: len(start)]) != start or text in LEFT_OUT or text in ran:
                    continue
                arguments = [PLACEHOLDERS.get(word, word) for word in words[len(start) :]]
                if "plot" in arguments:
                    shutil.copy(reference / "metrics.jsonl", place / "runs" / "wide")
                if "--seconds" in arguments:
                    arguments.append("--seconds=1")  # the last one counts
                code = main([*command, *arguments])
                assert code == (2 if text in MISTAKEN else 0), (path, text, capsys.readouterr())
                ran.add(text)
    assert len(ran) >= 20
    assert {path.name for path in (place / "pictures").glob("*.png")} >= {
        "confusion.png",
        "evidence.png",
        "receptive_fields.png",
    }
