"""Evaluation: every example once."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cnn_jax.data.pipeline import eval_batches
from cnn_jax.data.sources import Source
from cnn_jax.errors import UserError
from cnn_jax.plan import Plan
from cnn_jax.runtime.files import write_json_file
from cnn_jax.runtime.pictures import draw_confusion, draw_contact_sheet, draw_reliability
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.trained import Trained, open_run
from cnn_jax.training.metrics import mean
from cnn_jax.training.scores import Scores, score
from cnn_jax.training.state import TrainState
from cnn_jax.typing import Metrics

STEPS_IN_FLIGHT = 2
"""Steps that may wait on the device: enough to hide the host, few enough to bound memory."""


MISTAKES = 40
"""Of the contact sheet, at most."""


def evaluate(
    workdir: str | Path,
    *,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool = False,
    json_file: Path | None = None,
    pictures: Path | None = None,
) -> Scores:
    """Returns the scores of a run on every example of a split, once each, and prints them.

    Args:
      workdir: directory of the run.
      split: of its data set, or a slice such as "test[:100]"; by default what it was tested on.
      checkpoint: "last", "best" or a step.
      ema: take the moving averages of the weights and of the statistics.
      json_file: where to write the scores; it must not be there yet.
      pictures: directory for confusion.png, reliability.png and mistakes.png; those of an earlier
        evaluation are replaced.

    Raises UserError for a run or a split that cannot be read, or a file that cannot be written.
    """
    if pictures is not None:
        _make(pictures)
    run = open_run(workdir, checkpoint=checkpoint, ema=ema, log=_say)
    source = run.open_split(split, log=_say)
    _say(f"evaluating {run.described} on {len(source):,} images")
    logits, labels, numbers = _read_by(run, source)
    scores = score(logits, labels)
    if left_out := len(source) - len(numbers):
        _say(f"{left_out:,} damaged {'image' if left_out == 1 else 'images'} left out")
    _say(_table(scores, run))
    if json_file is not None:
        values = {"workdir": str(run.directory), "step": run.step, "ema": run.ema}
        values |= {"split": source.split, "bad_records": left_out}
        values |= scores.as_dict(run.class_names)
        write_json_file(json_file, json.dumps(values, indent=2) + "\n")
        _say(f"written: {json_file}")
    if pictures is not None:
        _draw(pictures, scores, run, source, numbers)
        _say(f"drawn in {pictures}")
    return scores


def _read_by(run: Trained, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the logits, the label and the number of each example that can be read."""
    size = min(run.config.eval.batch_size, len(source))
    predict = run.compile_logits(size)
    data = run.config.data
    batches = eval_batches(
        source, batch_size=size, num_threads=data.num_threads, prefetch=data.prefetch
    )
    logits, labels, counted = [], [], []
    with contextlib.closing(batches):
        for batch in batches:
            real = batch["mask"] > 0
            logits.append(np.asarray(predict(batch["image"]))[real])
            labels.append(batch["label"][real])
            counted.append(real)
    return np.concatenate(logits), np.concatenate(labels), np.flatnonzero(np.concatenate(counted))


def _table(scores: Scores, run: Trained) -> str:
    width = max(len("class"), *map(len, run.class_names))
    lines = [
        f"loss {scores.loss:.4f}  top-1 {scores.top1:.4f}  top-5 {scores.top5:.4f}  "
        f"calibration error {scores.calibration.error:.4f}",
        "",
        f"{'class':<{width}}  precision  recall      f1  examples",
    ]
    rows = zip(
        run.class_names, scores.precision, scores.recall, scores.f1, scores.support, strict=True
    )
    for name, precision, recall, f1, support in rows:
        lines.append(f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:8,}")
    return "\n".join(lines)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--pictures {directory}: cannot be made a directory: {error.strerror or error}"
        ) from error


def _draw(
    directory: Path, scores: Scores, run: Trained, source: Source, numbers: np.ndarray
) -> None:
    """Draws the pictures of an evaluation; `numbers` has the number of each example in `source`."""
    names = run.class_names
    draw_confusion(directory / "confusion.png", scores.confusion, names)
    draw_reliability(directory / "reliability.png", scores.calibration)
    worst = scores.worst(MISTAKES)
    batch = source.batch(numbers[worst])
    captions = [
        f"{names[label]}\ntaken for {names[scores.predicted[place]]}\n"
        f"({scores.confidence[place]:.1%}), number {numbers[place]}"
        for place, label in zip(worst, batch["label"], strict=True)
    ]
    draw_contact_sheet(directory / "mistakes.png", batch["image"], captions)


def _say(text: str) -> None:
    print(text, flush=True)


def mean_metrics(
    plan: Plan,
    eval_step: Callable[..., Metrics],
    state: TrainState,
    source: Source,
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the mean `loss` (nats) and `accuracy` (a fraction) over all examples of `source`.

    `check` is called before every batch and may raise to break off.
    """
    batches = eval_batches(
        source,
        batch_size=plan.config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=plan.config.data.num_threads,
        prefetch=plan.config.data.prefetch,
    )
    sharding = batch_sharding(plan.mesh)
    sums = []
    with contextlib.closing(batches):
        for batch in batches:
            check()
            sums.append(eval_step(state, to_devices(batch, sharding)))
            if len(sums) > STEPS_IN_FLIGHT:
                jax.block_until_ready(sums[-1 - STEPS_IN_FLIGHT])
    return mean(jax.device_get(sums))
