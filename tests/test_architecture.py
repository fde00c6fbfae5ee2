"""Imports point down, configs stop at the door, and habits that only a rule can keep."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NOUNS = {"typing", "errors", "storage", "models", "data", "training", "runtime"}
BETWEEN = {"config", "plan", "weights", "trained", "exported", "feeding"}
OF_A_RUN = {  # what the package itself has, loaded when it is used
    "commands.evaluate",
    "commands.export",
    "commands.features",
    "commands.inspect",
    "commands.plot",
    "commands.predict",
    "commands.serve",
}
MAY_IMPORT = {  # of the package, by part; every part may import itself
    "typing": set(),
    "errors": set(),
    "storage": {"errors"},
    "models": {"typing", "errors"},
    "data": {"typing", "errors", "storage"},
    "training": {"typing", "errors"},
    "runtime": {"typing", "errors", "storage", "training"},
    "weights": {"typing", "errors", "storage", "models", "runtime"},
    "config": NOUNS | {"weights"},
    "plan": NOUNS | {"config", "weights"},
    "feeding": NOUNS | {"config", "plan"},
    "trained": NOUNS | {"config", "plan", "weights"},
    "exported": NOUNS,
    "serving": NOUNS | {"trained", "exported"},
    "benchmarking": NOUNS,
    "commands.bench": NOUNS | BETWEEN | {"benchmarking"},
    "commands.bench_data": NOUNS | BETWEEN | {"benchmarking"},
    "commands.evaluate": NOUNS | BETWEEN,
    "commands.serve": NOUNS | {"serving"},
    "commands.train": NOUNS | BETWEEN | {"commands.evaluate"},
    "commands": set(),
    "__init__": {"models", "training", "typing"} | OF_A_RUN,  # for the type checker alone
    "__main__": {"__init__", "errors", "runtime", "cli"},
    "cli": {
        "__init__",
        "errors",
        "storage",
        "runtime",
        "config",
        "plan",
        "benchmarking",
        "commands.bench",
        "commands.bench_data",
        "commands.compile",
        "commands.convert",
        "commands.data",
        "commands.train",
    }
    | OF_A_RUN,
}
A_COMMAND = NOUNS | BETWEEN  # imports no other command, unless it is named above

LIGHT = {"jax", "flax", "optax", "numpy", "jaxtyping"}
NOT_FROM_OUTSIDE = {  # a worker process that touches a JAX backend would claim the accelerator
    "data": {"jax", "jaxlib", "flax", "optax", "orbax", "ml_collections"},
    "storage": {"jax", "jaxlib", "flax", "optax", "orbax", "ml_collections"},
    "runtime": {"ml_collections"},
    "config": {"ml_collections"},
    "plan": {"ml_collections"},
    "commands": {"ml_collections"},
}
ONLY_FROM_OUTSIDE = {"typing": LIGHT, "errors": set(), "models": LIGHT, "training": LIGHT}

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def part_of(module: str) -> str:
    """`cnn_jax.models.layers` belongs to `models`; commands are one part each."""
    names = module.split(".")[1:]
    return ".".join(names[: 2 if names[:1] == ["commands"] else 1]) or "__init__"


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def module_of(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that the file imports anywhere, in functions too."""
    package = module_of(root, path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = root.joinpath(*module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield node.lineno, f"{module}.{alias.name}" if is_module else module


def may_import(part: str, module: str) -> bool:
    """Whether an arrow from this part of the package to that module is on the map."""
    family, outside = part.split(".")[0], module.split(".")[0]
    if outside == "cnn_jax":
        allowed = MAY_IMPORT.get(part, A_COMMAND if family == "commands" else set())
        return part_of(module) in allowed | {part}
    if family in ONLY_FROM_OUTSIDE:
        return outside in ONLY_FROM_OUTSIDE[family] | sys.stdlib_module_names
    return outside not in NOT_FROM_OUTSIDE.get(family, set())


def violations(root: Path) -> Iterator[str]:
    """Every import of the package that points up, sideways or out, with its file and line."""
    for path in python_files(root, "cnn_jax"):
        part = part_of(module_of(root, path))
        for line, module in imports(root, path):
            if not may_import(part, module):
                yield f"{path.relative_to(root)}:{line}: {part} must not import {module}"


def test_imports_point_down():
    assert list(violations(ROOT)) == []


def test_every_part_is_on_the_map():
    parts = {part_of(module_of(ROOT, path)) for path in python_files(ROOT, "cnn_jax")}
    assert {part for part in parts if not part.startswith("commands.")} <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("models/layers.py", "from cnn_jax.training import losses"),
        ("models/layers.py", "from ..data import sources"),
        ("models/layers.py", "import orbax.checkpoint"),
        ("training/steps.py", "def f():\n    import cnn_jax.models"),
        ("training/steps.py", "from cnn_jax import ModernCNN"),
        ("training/steps.py", "from cnn_jax import runtime"),
        ("training/steps.py", "from cnn_jax.config import Config"),
        ("data/sources.py", "import jax.numpy as jnp"),
        ("data/sources.py", "from ..plan import make_plan"),
        ("runtime/report.py", "from cnn_jax.data import sources"),
        ("runtime/report.py", "from .. import commands"),
        ("typing.py", "from cnn_jax.errors import UserError"),
        ("config.py", "from cnn_jax.plan import make_plan"),
        ("config.py", "from ml_collections import ConfigDict"),
        ("plan.py", "import cnn_jax.commands.train"),
        ("commands/evaluate.py", "from cnn_jax.commands.train import train"),
        ("commands/predict.py", "from cnn_jax.commands import evaluate"),
        ("commands/predict.py", "from .evaluate import evaluate"),
        ("commands/predict.py", "from cnn_jax.serving import batching"),
        ("serving/network.py", "from cnn_jax.commands import predict"),
        ("commands/train.py", "from cnn_jax.__main__ import main"),
        ("__init__.py", "from cnn_jax.runtime import checkpoint"),
        ("newcomer.py", "from cnn_jax import models"),
    ],
)
def test_an_arrow_that_points_elsewhere_is_seen(file, statement, tmp_path):
    names = ["commands/train", "commands/evaluate", "models/layers", "training/losses", "plan"]
    for name in [
        *names,
        "data/sources",
        "runtime/checkpoint",
        "config",
        "errors",
        "serving/batching",
    ]:
        path = (tmp_path / "cnn_jax" / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = tmp_path / "cnn_jax" / file
    path.write_text(f"import json\n{statement}\n")
    (violation,) = violations(tmp_path)
    assert violation.startswith(f"cnn_jax/{file}:{3 if 'def' in statement else 2}: ")


def test_configs_import_each_other_and_ml_collections_only():
    allowed = {"configs", "ml_collections", "typing"}
    assert [
        f"{path.relative_to(ROOT)}:{line}: a config must not import {module}"
        for path in python_files(ROOT, "configs")
        for line, module in imports(ROOT, path)
        if module.split(".")[0] not in allowed
    ] == []


def test_nothing_imports_tensorflow():
    files = [*python_files(ROOT, "cnn_jax", "configs", "tests", "benchmarks"), ROOT / "train.py"]
    assert [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files
        for line, module in imports(ROOT, path)
        if module.split(".")[0] in {"tensorflow", "clu"}  # clu's metric writers import it
    ] == []


def test_no_assert_stands_for_a_message_to_the_user():
    assert [
        f"{path.relative_to(ROOT)}:{node.lineno}: raise ValueError instead of assert"
        for path in [*python_files(ROOT, "cnn_jax"), ROOT / "train.py"]
        for node in ast.walk(ast.parse(path.read_text(), path))
        if isinstance(node, ast.Assert)
    ] == []


def test_no_file_or_folder_has_a_vague_name():
    assert [
        str(path.relative_to(ROOT))
        for path in python_files(ROOT, "cnn_jax", "configs", "tests", "benchmarks")
        if VAGUE_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
    ] == []
