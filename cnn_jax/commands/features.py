"""Features: what layers of a trained network make of every image of a data set, as arrays."""

import contextlib
import io
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnn_jax.data.pipeline import eval_batches
from cnn_jax.errors import UserError, nearest
from cnn_jax.models.explaining import feature_maps, feature_shapes, last_stage
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.storage import write_atomically
from cnn_jax.trained import Trained, open_run
from cnn_jax.typing import Images

POOLS = ("average", "none")
"""What is done to a feature map: its mean over the positions, or nothing."""

Facts = dict[str, np.ndarray]
"""What is known of images, beside their features, by the name of its array."""

Part = tuple[np.ndarray, np.ndarray, Facts]
"""A batch of uint8 images, which of them count, and the facts of those that do."""


def features(
    workdir: str | Path,
    to: str | Path,
    *,
    paths: Sequence[str] = (),
    split: str | None = None,
    layers: Sequence[str] = (),
    pool: str = "average",
    checkpoint: str = "last",
    ema: bool = False,
    batch_size: int = 64,
    num_threads: int = 2,
) -> dict[str, np.ndarray]:
    """Writes the outputs of layers for every image, in order, as an `.npz`; returns its arrays.

    There is an array for each layer, float32 [n, channels], or [n, h, w, channels] without pool; of
    a split also `label`, int32 [n], and of files `path` [n]. `class_names` has the
    names of the labels. All of it is in memory until it is written.

    Args:
      workdir: directory of the run.
      to: the file; it must not be there yet.
      paths: files, folders and patterns; see `cnn_jax.data.image_files`.
      split: without paths, of the data set; by default what the run was tested on.
      layers: paths of modules as in `explaining.feature_maps`; by default the last stage.
      pool: one of `POOLS`.
      checkpoint: "last", "best" or a step.
      ema: take the moving averages of the weights.
      batch_size: images that are computed together.
      num_threads: that read and decode.

    A file that cannot be read is named to stderr and left out. Raises UserError for a run, a split
    or a layer that is not there, no image at all, or a file that cannot be written.
    """
    to = Path(to)
    refuse_existing(to)
    run = open_run(workdir, checkpoint=checkpoint, ema=ema, log=_warn)
    layers = _checked(run, layers)
    if paths:
        parts = _of_files(run, paths, batch_size, num_threads)
    else:
        parts = _of_split(run, split, batch_size)

    def outputs(variables: Any, images: Images) -> list[Any]:
        maps = feature_maps(run.model, variables, images)
        found = [maps[layer].astype(jnp.float32) for layer in layers]
        return [each.mean((1, 2)) for each in found] if pool == "average" else found

    compute = run.compile("features", outputs, batch_size, layers=list(layers), pool=pool)
    arrays: dict[str, list[np.ndarray]] = {}
    with contextlib.closing(parts):
        for images, counts, facts in parts:
            found = zip(layers, (np.asarray(each)[counts] for each in compute(images)), strict=True)
            for name, array in (*found, *facts.items()):
                arrays.setdefault(name, []).append(array)
    if not arrays or not sum(map(len, arrays[layers[0]])):
        raise UserError("features: there is no image that can be read")
    whole: dict[str, Any] = {name: np.concatenate(each) for name, each in arrays.items()}
    whole["class_names"] = np.array(run.class_names)
    contents = io.BytesIO()
    np.savez(contents, **whole)
    try:
        write_atomically(to, contents.getvalue())
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}") from error
    return whole


def _checked(run: Trained, layers: Sequence[str]) -> list[str]:
    image = np.zeros((1, *run.dataset.image_shape), np.uint8)
    shapes = feature_shapes(run.model, run.variables, run.normalize(image))
    for layer in layers:
        if layer not in shapes:
            raise UserError(
                f"layer {layer!r}: the network has none with a feature map of that name"
                f"{nearest(layer, shapes)}; `inspect --workdir {run.directory} --depth 9` shows all"
            )
    return list(dict.fromkeys(layers)) or [last_stage(shapes)]


def _of_files(
    run: Trained, paths: Iterable[str], batch_size: int, num_threads: int
) -> Generator[Part, None, None]:
    batches = run.read_files(paths, batch_size=batch_size, num_threads=num_threads)
    with contextlib.closing(batches):
        for batch in batches:
            for error in filter(None, batch.errors):
                _warn(error)
            good = [number for number, error in enumerate(batch.errors) if error is None]
            names = np.array([str(batch.paths[number]) for number in good], np.str_)
            yield batch.images, np.array(good, np.intp), {"path": names}


def _of_split(run: Trained, split: str | None, batch_size: int) -> Generator[Part, None, None]:
    data, source = run.config.data, run.open_split(split, log=_warn)
    batches = eval_batches(
        source, batch_size=batch_size, num_threads=data.num_threads, prefetch=data.prefetch
    )
    with contextlib.closing(batches):
        for batch in batches:
            real = np.flatnonzero(batch["mask"])
            yield batch["image"], real, {"label": batch["label"][real]}


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
