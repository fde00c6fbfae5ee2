"""Inspecting: the layers of a network, what each sees of the image and what it costs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cnn_jax.config import Config
from cnn_jax.data.image_files import read_image
from cnn_jax.errors import UserError, nearest
from cnn_jax.models import create_model
from cnn_jax.models.explaining import (
    METHODS,
    class_activation_map,
    effective_receptive_field,
    feature_maps,
    feature_shapes,
)
from cnn_jax.models.geometry import Layer, grouped, layers, table, total
from cnn_jax.plan import make_model
from cnn_jax.runtime.files import write_json_file
from cnn_jax.runtime.pictures import (
    Field,
    draw_evidence,
    draw_feature_maps,
    draw_filters,
    draw_receptive_fields,
)
from cnn_jax.trained import Trained, open_run
from cnn_jax.typing import Images

LEGEND = """\
Of one image. stride: pixels of the image between neighbours of the output; field: pixels of the
image that one of them sees, padding included ("image": all of it, "?": not known); mult-adds: of
convolutions and matrix products; activation: the output in memory."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a run's network is and has learned.

    Attributes:
      layers: its rows, as they are printed.
      filters: the kernel of its first convolution, [h, w, c, n].
      of_image: what it makes of the image; None without one.
    """

    layers: list[Layer]
    filters: np.ndarray
    of_image: "OfImage | None"


@dataclasses.dataclass(frozen=True)
class OfImage:
    """What a run's network makes of an image.

    Attributes:
      pixels: uint8 [h, w, c], as the network sees it.
      probabilities: by class name, as those are numbered.
      stages: what every stage makes of it, [h, w, c], by name.
      fields: how much of it the middle of every stage sees.
      class_name: whose evidence it is.
      evidence: where in the last stage the evidence for that class lies, [h, w].
    """

    pixels: np.ndarray
    probabilities: Mapping[str, float]
    stages: Mapping[str, np.ndarray]
    fields: Sequence[Field]
    class_name: str
    evidence: np.ndarray


def inspect_config(config: Config, *, depth: int = 1, json_file: str | None = None) -> list[Layer]:
    """Returns the layers of the network that a run with `config` would train, and prints them.

    With a `json_file` the rows are written there as well, or, if it is "-", printed alone.

    Raises UserError where the file is already there or cannot be written.
    """
    dataset = config.data.dataset()
    rows = _rows(make_model(config, dataset), config, dataset.image_shape, depth)
    return _show(config.model.name, dataset.image_shape, rows, json_file)


def inspect_model(
    name: str, image_shape: Sequence[int], *, depth: int = 1, json_file: str | None = None
) -> list[Layer]:
    """Returns the layers of a network in `cnn_jax.MODELS`, and prints them. See `inspect_config`.

    Raises UserError for an unknown name or an image that the network does not take as well.
    """
    model = create_model(name)
    try:
        rows = grouped(layers(model, image_shape), depth)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    return _show(name, image_shape, rows, json_file)


def inspect(
    workdir: str | Path,
    *,
    checkpoint: str = "last",
    ema: bool = False,
    pictures: str | Path | None = None,
    image: str | Path | None = None,
    class_name: str | None = None,
    method: str = "grad_cam",
    depth: int = 1,
    json_file: str | None = None,
) -> Inspection:
    """Returns what a run's network is and has learned, prints its layers and draws the rest.

    The directory `pictures` receives `filters.png`, those of the first convolution. With the file
    of an `image` also `stages.png`, what every stage makes of it; `receptive_fields.png`, how much
    of it the middle of every stage sees; and `evidence.png`, where the evidence for a class lies by
    one of `explaining.METHODS`: the predicted one, or that of `class_name`. Without `pictures` all
    of it is returned alike.

    Raises UserError for a run, an image or a class that is not there, or a directory that cannot be
    written. See `inspect_config`.
    """
    run = open_run(workdir, checkpoint=checkpoint, ema=ema)
    if class_name is not None and class_name not in run.class_names:
        hint = nearest(class_name, run.class_names)
        raise UserError(f"class {class_name!r}: is not one of the run's classes{hint}")
    shape = run.dataset.image_shape
    pixels = None
    if image is not None:
        pixels = read_image(Path(image), shape, fraction=run.eval_fraction)
    rows = _rows(run.model, run.config, shape, depth)
    _show(run.config.model.name, shape, rows, json_file)
    of_image = None if pixels is None else _of_image(run, pixels, class_name, method)
    found = Inspection(rows, _filters(run), of_image)
    if pictures is None:
        return found
    directory = Path(pictures)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _draw(directory, found, METHODS[method])
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from error
    if json_file != "-":
        print(f"\ndrawn in {directory}")
    return found


def _filters(run: Trained) -> np.ndarray:
    images = run.normalize(np.zeros((1, *run.dataset.image_shape), np.uint8))
    params = flatten_dict(run.variables["params"], sep="/")
    paths = feature_shapes(run.model, run.variables, images)
    kernels = (params[f"{path}/kernel"] for path in paths if f"{path}/kernel" in params)
    return np.asarray(next(kernels), np.float32)


def _of_image(run: Trained, pixels: np.ndarray, class_name: str | None, method: str) -> OfImage:
    images = run.normalize(pixels[None])
    stages = run.model.clone(features_only=True).apply(run.variables, images, train=False)
    logits = run.model.apply(run.variables, images, train=False)
    shares = dict(zip(run.class_names, jax.nn.softmax(logits)[0].tolist(), strict=True))
    class_name = class_name or _predicted(shares)
    classes = jnp.array([run.class_names.index(class_name)])
    maps = class_activation_map(run.model, run.variables, images, classes, method=method)
    return OfImage(
        pixels=pixels,
        probabilities=shares,
        stages={f"stage {n}": np.asarray(x[0], np.float32) for n, x in enumerate(stages, start=1)},
        fields=_fields(run, images),
        class_name=class_name,
        evidence=np.asarray(maps[0], np.float32),
    )


def _predicted(probabilities: Mapping[str, float]) -> str:
    return max(probabilities, key=lambda name: probabilities[name])


def _draw(directory: Path, found: Inspection, method: str) -> None:
    draw_filters(directory / "filters.png", found.filters)
    seen = found.of_image
    if seen is None:
        return
    draw_feature_maps(directory / "stages.png", seen.stages)
    draw_receptive_fields(directory / "receptive_fields.png", seen.pixels, seen.fields)
    predicted = _predicted(seen.probabilities)
    caption = f"{seen.class_name} ({seen.probabilities[seen.class_name]:.1%})"
    if seen.class_name != predicted:
        caption += f"; predicted: {predicted} ({seen.probabilities[predicted]:.1%})"
    draw_evidence(directory / "evidence.png", seen.pixels, seen.evidence, caption, method)


def _fields(run: Trained, images: Images) -> list[Field]:
    """Returns what the last module before each reduction sees of an image, from its middle."""
    maps = feature_maps(run.model, run.variables, images)
    rows = _rows(run.model, run.config, run.dataset.image_shape, 1)
    last = {row.strides: row for row in rows if row.path in maps}
    return [
        Field(
            f"{row.path}\nstride {_by(row.strides)}\n"
            f"field {'image' if row.sees_whole_image else _by(row.receptive_field)}",
            _box(row),
            np.asarray(
                effective_receptive_field(run.model, run.variables, images, layer=row.path)[0],
                np.float32,
            ),
        )
        for row in last.values()
    ]


def _by(pair: Sequence[int | None]) -> str:
    return " x ".join("?" if number is None else str(number) for number in pair)


def _box(row: Layer) -> tuple[float, float, float, float] | None:
    """Returns top, left, height and width of what the middle of a layer's output sees."""
    facts: Any = (row.strides, row.receptive_field, row.centre)
    if None in (*row.strides, *row.receptive_field, *row.centre):
        return None
    (top, height), (left, width) = (
        (centre + (length // 2) * stride - (extent - 1) / 2, extent)
        for stride, extent, centre, length in zip(*facts, row.output[:2], strict=True)
    )
    return top, left, height, width


def _rows(model: Any, config: Config, image_shape: Sequence[int], depth: int) -> list[Layer]:
    return grouped(layers(model, image_shape, dtype=jnp.dtype(config.precision)), depth)


def _show(
    name: str, image_shape: Sequence[int], rows: list[Layer], json_file: str | None
) -> list[Layer]:
    text = json.dumps(_plain(name, image_shape, rows), indent=2)
    if json_file == "-":
        print(text)
        return rows
    if json_file is not None:
        write_json_file(Path(json_file), text + "\n")
    shape = " x ".join(map(str, image_shape))
    print(f"{name}, image {shape}\n\n{table(rows)}\n\n{LEGEND}")
    return rows


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
