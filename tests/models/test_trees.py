"""The parameter tree of every public model is pinned, so that old checkpoints keep loading."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cnn_jax import MODELS, create_model

TREES = Path(__file__).with_name("trees")


def tree_lines(name: str) -> list[str]:
    """A line for each array: its path and shape; equal blocks in a row share their lines."""
    images = jnp.zeros((1, 224, 224, 3))
    model = create_model(name)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    parts: dict[str, list[str]] = {}
    for path, leaf in jax.tree.leaves_with_path(variables):
        collection, part, *rest = (str(key.key) for key in path)
        shape = " ".join(map(str, leaf.shape))
        parts.setdefault(part, []).append(f"{collection} {'/'.join(rest)}: {shape}")

    def block(part: str) -> tuple[str, int]:
        match = re.fullmatch(r"(stage\d+_block)(\d+)", part)
        return (match[1], int(match[2])) if match else (part, 0)

    lines = []
    ordered = sorted(parts, key=block)
    for _, group in itertools.groupby(ordered, key=lambda part: (block(part)[0], parts[part])):
        first, *others = group
        label = f"{first}..{block(others[-1])[1]}" if others else first
        lines += [f"{label} {line}\n" for line in parts[first]]
    return lines


@pytest.mark.parametrize("name", MODELS)
def test_parameter_tree_is_pinned(name, tmp_path):
    lines = tree_lines(name)
    pinned = TREES / f"{name}.txt"
    before = pinned.read_text().splitlines(keepends=True) if pinned.is_file() else []
    fresh = tmp_path / pinned.name
    fresh.write_text("".join(lines))
    moved = [f"- {line}" for line in before if line not in lines]
    moved += [f"+ {line}" for line in lines if line not in before]
    assert lines == before, (
        f"checkpoints of {name} no longer load; what moved:\n{''.join(moved)}"
        f"If that is wanted, say so in CHANGELOG.md and pin the new tree:\n  cp {fresh} {pinned}"
    )


def test_every_pinned_tree_is_that_of_a_model():
    assert {path.stem for path in TREES.iterdir()} == set(MODELS)
