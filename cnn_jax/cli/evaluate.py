"""`evaluate`, on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, add_run, new_file, refuse_overrides

DESCRIPTION = """\
Evaluates what a run has learned on every example of a split, once: loss, top-1, top-5,
precision, recall and F1 of each class, and the expected calibration error. With
--pictures also the confusion matrix, a reliability diagram and the worst mistakes."""

EPILOG = """\
examples:
  %(prog)s --workdir runs/quickstart
  %(prog)s --workdir runs/quickstart --checkpoint best --pictures pictures --json scores.json
  %(prog)s --workdir runs/quickstart --split 'train[:1000]'

Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        help="say how good a trained network is",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_run(parser)
    parser.add_argument(
        "--split", metavar="SPLIT", help="of the data set, or a slice (default: the run's test)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=new_file, help="write the scores to FILE as well"
    )
    parser.add_argument("--pictures", metavar="DIR", type=Path, help="draw there")


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    refuse_overrides(options, overrides)
    from cnn_jax.commands.evaluate import evaluate

    evaluate(
        options.workdir,
        split=options.split,
        checkpoint=options.checkpoint,
        ema=options.ema,
        json_file=options.json,
        pictures=options.pictures,
    )
    return 0
