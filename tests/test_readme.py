"""What the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest

from cnn_jax.__main__ import main

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert int(names["state"].step) == 1
    assert float(names["sums"]["count"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/**/*.md")), ids=lambda path: path.stem)
def test_the_examples_of_the_documents_run(path):
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        exec(code, {})


def test_the_mistakes_are_printed_as_shown(capsys, monkeypatch):
    shown = [
        text for text in re.findall(r"```\n\$ (.*?)```", README, re.DOTALL) if "mistakes" in text
    ]
    command, expected = re.split(r"(?<!\\)\n", shown[0], maxsplit=1)
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.replace("\\\n", " "))[2:]
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err == expected


def test_no_number_is_still_to_be_measured():
    for path in (ROOT / "README.md", *ROOT.glob("configs/*.py")):
        assert not re.search(r"@[A-Z_]+@|TO BE MEASURED", path.read_text()), path


@pytest.mark.parametrize("name", ["quickstart", "fashion_mnist", "synthetic"])
def test_every_config_of_the_table_is_there(name):
    assert f"| `{name}` |" in README
    assert (ROOT / "configs" / f"{name}.py").is_file()
