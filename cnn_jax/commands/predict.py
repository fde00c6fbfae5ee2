"""Prediction: the classes of images in files."""

import contextlib
import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from cnn_jax.data.reading_ahead import FileBatch
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
    ema: bool = False,
    top: int = 5,
    batch_size: int = 64,
    num_threads: int = 2,
) -> Iterator[Prediction]:
    """Gives a prediction for each image that `paths` name, in order, batch after batch.

    Args:
      workdir: directory of the run.
      paths: files, folders and patterns; see `cnn_jax.data.image_files`.
      checkpoint: "last", "best" or a step.
      ema: take the moving averages of the weights.
      top: classes for each image, or all where there are fewer.
      batch_size: images that are computed together; there is one compiled program, of that size.
      num_threads: that read and decode, while the last batch is computed.

    A file that cannot be read gives a prediction with an `error`, and the others go on. Raises
    UserError for a run that cannot be read.
    """
    run = open_run(workdir, checkpoint=checkpoint, ema=ema, log=_warn)
    logits, softmax = run.compile_logits(batch_size), jax.jit(jax.nn.softmax)
    batches = run.read_files(paths, batch_size=batch_size, num_threads=num_threads)
    with contextlib.closing(batches):
        waiting = None
        for batch in batches:
            computed = softmax(logits(batch.images))
            if waiting is not None:
                yield from _predictions(*waiting, run.class_names, top)
            waiting = batch, computed
        if waiting is not None:
            yield from _predictions(*waiting, run.class_names, top)


def _predictions(
    batch: FileBatch, computed: jax.Array, class_names: tuple[str, ...], top: int
) -> Iterator[Prediction]:
    rows = np.asarray(computed)
    for path, error, row in zip(batch.paths, batch.errors, rows, strict=False):
        if error is not None:
            yield Prediction(path, error=error)
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
    elif not good:
        _warn("no file was named")
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
