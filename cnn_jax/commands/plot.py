"""Plotting: the metrics of one or several runs, in one picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.runtime.pictures import draw_runs
from cnn_jax.runtime.report import METRICS, read_rows
from cnn_jax.storage import absolute, place


def plot(workdirs: Sequence[str | Path], to: str | Path, *, smooth: float = 0.8) -> None:
    """Draws loss, accuracy, learning rate and images/s of runs over their epochs, as a PNG.

    Args:
      workdirs: directories of runs, finished or not.
      to: the picture; it must not be there yet.
      smooth: weight of the past in the smoothed lines, >= 0 and < 1; 0 draws the raw ones alone.

    Raises UserError for a directory without metrics, or a picture that cannot be written.
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth={smooth}: must be >= 0 and < 1")
    refuse_existing(Path(to))
    runs = {}
    directories = [place(each) for each in workdirs]
    for directory, name in zip(directories, _names(directories), strict=True):
        runs[name] = read_rows(directory / METRICS)
        if not runs[name]:
            raise UserError(
                f"{directory}: has no {METRICS} with a row, so there is nothing to plot"
            )
        if not all({"step", "epoch"} <= row.keys() for row in runs[name]):
            raise UserError(f"{directory / METRICS}: has a row without step or epoch")
    try:
        draw_runs(Path(to), runs, smooth=smooth)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror or error}") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that tell them apart."""
    parts = [absolute(path).parts for path in paths]
    candidates = (["/".join(each[-end:]) for each in parts] for end in itertools.count(1))
    return next(names for names in candidates if len(set(names)) == len(set(parts)))
