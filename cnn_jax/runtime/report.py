"""What a run tells: lines and a bar for people, JSON lines and TensorBoard for programs."""

import contextlib
import functools
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cnn_jax.runtime.distributed import from_first, is_first
from cnn_jax.runtime.events import EventFile
from cnn_jax.runtime.files import GrowingFile
from cnn_jax.storage import write_atomically

METRICS = "metrics.jsonl"

LINE_EVERY = 10.0
"""Seconds between the lines of a long task in a log."""

Row = Mapping[str, float]


class Clock:
    """Adds up the seconds spent in each named part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the seconds until the block is left."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def total(self) -> float:
        """Returns the seconds since this clock was made."""
        return time.perf_counter() - self._start


def duration(seconds: float) -> str:
    """Returns `12.3 s`, `4:05` (minutes) or `1:02:03` (hours)."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MetricsLog:
    """The record of a run in its directory: `metrics.jsonl`, and TensorBoard event files.

    Attributes:
      rows: all rows so far, earlier starts of the run included; the first process of a run writes
        them, and others know those of the step it resumes from and what follows.
    """

    def __init__(
        self, directory: Path, *, resume_step: int, confirm: Callable[[], None] = lambda: None
    ) -> None:
        """Opens the log of a run that goes on from `resume_step`; `confirm` as of `GrowingFile`.

        With the first row that is written, rows behind that step are dropped, and so is a last line
        torn by a kill: the run writes them again.
        """
        rows = read_rows(directory / METRICS) if is_first() else []
        rows = [row for row in rows if row["step"] <= resume_step]
        last = from_first("rows", lambda: [row for row in rows if row["step"] == resume_step])
        self.rows: list[Row] = [*(rows if is_first() else last)]
        self._directory = directory
        self._confirm = confirm
        self._resume_step = resume_step

    @functools.cached_property
    def _file(self) -> GrowingFile:
        kept = "".join(json.dumps(row) + "\n" for row in self.rows)
        return GrowingFile(self._directory / METRICS, kept.encode(), confirm=self._confirm)

    @functools.cached_property
    def _events(self) -> EventFile:
        return EventFile(self._directory / "tensorboard", first_step=self._resume_step + 1)

    def write(self, step: int, values: Row) -> None:
        """Adds one row; it is on its way to the disk when this returns, see `GrowingFile`."""
        row = {"step": step, **values}
        if is_first():
            self._file.write(json.dumps(row).encode() + b"\n")
            self._events.write(step, values)
        self.rows.append(row)

    def at(self, step: int, name: str) -> float | None:
        """Returns the value of this name that was written at `step`, if one was."""
        values = (row[name] for row in self.rows if row["step"] == step and name in row)
        return next(values, None)

    def rewind(self, step: int) -> None:
        """Goes on from `step`, as a log does that is opened there."""
        self.close()
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._resume_step = step

    def sync(self) -> None:
        """Returns when all rows survive the end of this machine."""
        for opened in {"_file", "_events"} & self.__dict__.keys():
            self.__dict__[opened].sync()

    def close(self) -> None:
        for opened in {"_file", "_events"} & self.__dict__.keys():
            self.__dict__.pop(opened).close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Returns the rows of a `metrics.jsonl`, without a last line that a kill has torn."""
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """A progress bar on a terminal; elsewhere (a log, a pipe) plain lines.

    Of several processes only the first shows anything.
    """

    def __init__(self, total_steps: int, *, first_step: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._total = total_steps
        self._start = self._told = time.perf_counter()
        self._first = first_step
        self._bar: Any = None
        if is_first() and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                unit="step",
                bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{remaining} left] {desc}",
            )

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, row: Row) -> None:
        """Shows the training metrics of a window that ended at `step`."""
        text = (
            f"epoch {row['epoch']:.2f}  loss {row['train/loss']:.4f}  "
            f"accuracy {row['train/accuracy']:.4f}  {row['images_per_second']:,.0f} images/s"
        )
        if self._bar is not None:
            self._bar.set_description_str(text)
            return
        seconds_a_step = (time.perf_counter() - self._start) / max(1, step - self._first)
        left = duration((self._total - step) * seconds_a_step)
        self.say(f"step {step}/{self._total}  {text}  {left} left")

    def count(self, done: int, what: str) -> None:
        """Shows how many of `what` are done: on the bar, or by lines `LINE_EVERY` seconds apart."""
        self.advance(done)
        now = time.perf_counter()
        if self._bar is not None or now - self._told < LINE_EVERY:
            return
        self._told = now
        rate = (done - self._first) / (now - self._start)
        left = f", {duration((self._total - done) / rate)} left" if rate else ""
        self.say(f"{done:,} of {self._total:,} {what}, {rate:,.0f} a second{left}")

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif is_first():
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Draws loss and accuracy over the epochs, training and test, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("test", "o-")):
            name = f"{split}/{quantity}"
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=4)
        axis.set_xlabel("epoch")
        axis.set_ylabel("cross-entropy (nats)" if quantity == "loss" else "accuracy")
        axis.set_title(quantity)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
