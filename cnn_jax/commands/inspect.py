"""Inspecting: the layers of a network, what each sees of the image and what it costs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cnn_jax.config import Config
from cnn_jax.errors import UserError
from cnn_jax.models import create_model
from cnn_jax.models.geometry import Layer, grouped, layers, table, total
from cnn_jax.plan import make_model
from cnn_jax.runtime.files import write_json_file

LEGEND = """\
Of one image. stride: pixels of the image between neighbours of the output; field: pixels of the
image that one of them sees, padding included ("image": all of it, "?": not known); mult-adds: of
convolutions and matrix products; activation: the output in memory."""


def inspect_config(config: Config, *, depth: int = 1, json_file: str | None = None) -> int:
    """Prints the layers of the network that a run with `config` would train; returns 0.

    With a `json_file` the rows are written there as well, or, if it is "-", printed alone.

    Raises UserError where the file is already there or cannot be written.
    """
    image_shape = config.data.dataset().image_shape
    model, dtype = make_model(config), jnp.dtype(config.precision)
    rows = grouped(layers(model, image_shape, dtype=dtype), depth)
    return _show(config.model.name, image_shape, rows, json_file)


def inspect_model(
    name: str, image_shape: Sequence[int], *, depth: int = 1, json_file: str | None = None
) -> int:
    """Prints the layers of a network in `cnn_jax.MODELS`; returns 0. See `inspect_config`.

    Raises UserError for an unknown name or an image that the network does not take as well.
    """
    model = create_model(name)
    try:
        rows = grouped(layers(model, image_shape), depth)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    return _show(name, image_shape, rows, json_file)


def _show(
    name: str, image_shape: Sequence[int], rows: Sequence[Layer], json_file: str | None
) -> int:
    text = json.dumps(_plain(name, image_shape, rows), indent=2)
    if json_file == "-":
        print(text)
        return 0
    if json_file is not None:
        write_json_file(Path(json_file), text + "\n")
    shape = " x ".join(map(str, image_shape))
    print(f"{name}, image {shape}\n\n{table(rows)}\n\n{LEGEND}")
    return 0


def _plain(name: str, image_shape: Sequence[int], rows: Sequence[Layer]) -> dict[str, Any]:
    sums = total(rows)
    return {
        "model": name,
        "image_shape": list(image_shape),
        "parameters": sums.parameters,
        "multiply_adds": sums.multiply_adds,
        "activation_bytes": sums.activation_bytes,
        "layers": [dataclasses.asdict(row) for row in rows],
    }
