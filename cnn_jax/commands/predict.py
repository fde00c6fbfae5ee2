"""Prediction: the classes of images in files."""

import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from cnn_jax.data.image_files import find_images, read_image
from cnn_jax.errors import UserError
from cnn_jax.trained import most_probable, open_run

FORMATS = ("table", "jsonl", "csv")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one file: its most probable classes with their probabilities, or the `error`."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    workdir: str | Path,
    paths: Iterable[str],
    *,
    checkpoint: str = "last",
    top: int = 5,
    batch_size: int = 64,
    num_threads: int = 2,
) -> Iterator[Prediction]:
    """Gives a prediction for each image that `paths` name, in order, batch after batch.

    Args:
      workdir: directory of the run.
      paths: files, folders and patterns; see `cnn_jax.data.image_files`.
      checkpoint: "last", "best" or a step.
      top: classes for each image, or all where there are fewer.
      batch_size: images that are computed together; there is one compiled program, of that size.
      num_threads: that read and decode, while the last batch is computed.

    A file that cannot be read gives a prediction with an `error`, and the others go on. Raises
    UserError for a run that cannot be read.
    """
    run = open_run(workdir, checkpoint=checkpoint, log=_warn)
    logits = run.compile_logits(batch_size)
    shape = run.dataset.image_shape
    files = find_images(paths)

    def read(path: Path) -> np.ndarray | UserError:
        try:
            return read_image(path, shape)
        except UserError as error:
            return error

    with ThreadPoolExecutor(num_threads) as threads:
        waiting = None
        while chunk := list(itertools.islice(files, batch_size)):
            images = np.zeros((batch_size, *shape), np.uint8)
            read_files = list(threads.map(read, chunk))
            for image, content in zip(images, read_files, strict=False):
                if isinstance(content, np.ndarray):
                    image[:] = content
            computed = jax.nn.softmax(logits(images))
            if waiting is not None:
                yield from _predictions(*waiting, run.class_names, top)
            waiting = chunk, read_files, computed
        if waiting is not None:
            yield from _predictions(*waiting, run.class_names, top)


def _predictions(
    paths: list[Path],
    contents: list[np.ndarray | UserError],
    computed: jax.Array,
    class_names: tuple[str, ...],
    top: int,
) -> Iterator[Prediction]:
    for path, content, row in zip(paths, contents, np.asarray(computed), strict=False):
        if isinstance(content, UserError):
            yield Prediction(path, error=str(content))
            continue
        yield Prediction(path, most_probable(row, class_names, top))


def write_predictions(predictions: Iterable[Prediction], form: str, *, stream: TextIO) -> int:
    """Writes predictions as they come, in one of `FORMATS`, errors to stderr; returns an exit code.

    It is 1 if a file could not be read, or none was given; else 0.
    """
    write = {"table": _write_table, "jsonl": _write_json, "csv": _csv_writer(stream)}[form]
    good = bad = 0
    for each in predictions:
        if each.error is not None:
            bad += 1
            _warn(each.error)
            continue
        good += 1
        write(each, stream)
    if bad:
        _warn(f"{bad:,} of {good + bad:,} files could not be read")
    return int(bad > 0 or good == 0)


def _write_table(each: Prediction, stream: TextIO) -> None:
    classes = "  ".join(f"{name} {probability:.2%}" for name, probability in each.classes)
    print(f"{each.path}  {classes}", file=stream)


def _write_json(each: Prediction, stream: TextIO) -> None:
    classes = [{"class": name, "probability": share} for name, share in each.classes]
    print(json.dumps({"file": str(each.path), "classes": classes}), file=stream)


def _csv_writer(stream: TextIO) -> Callable[[Prediction, TextIO], None]:
    writer = csv.writer(stream, lineterminator="\n")
    header = [("file", "rank", "class", "probability")]

    def write(each: Prediction, stream: TextIO) -> None:
        while header:
            writer.writerow(header.pop())
        for rank, (name, probability) in enumerate(each.classes, start=1):
            writer.writerow((each.path, rank, name, probability))

    return write


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
