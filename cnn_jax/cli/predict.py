"""`predict`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from cnn_jax.cli.arguments import (
    add_command,
    add_reading,
    add_run,
    positive,
    refuse_overrides,
)

DESCRIPTION = """\
Says what is on images: the most probable classes with their probabilities. An image
is turned as its EXIF tag says, cut to its middle and resized as in the evaluation of
the run. A file that cannot be read is reported, and the others go on."""

EPILOG = """\
examples:
  %(prog)s --workdir runs/quickstart shoe.png photos/ 'more/**/*.jpg'
  %(prog)s --workdir runs/quickstart --format jsonl photos > predictions.jsonl
  find photos -name '*.png' | %(prog)s --workdir runs/quickstart -

Exit code: 0 when done, 2 for a mistake in the command, 1 if a file could not be read
and for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "predict",
        run,
        help="say what is on images",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_run(parser)
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="file, folder or pattern; -: a list on standard input, one a line",
    )
    parser.add_argument(
        "--top", metavar="K", type=positive, default=5, help="classes for each (default: 5)"
    )
    parser.add_argument(
        "--format", choices=("table", "jsonl", "csv"), default="table", help="default: table"
    )
    add_reading(parser)


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    refuse_overrides(options, overrides)
    from cnn_jax.commands.predict import predict, write_predictions

    lines = (line.rstrip("\r\n") for line in sys.stdin)
    named = (path for text in options.paths for path in (lines if text == "-" else [text]) if path)
    predictions = predict(
        options.workdir,
        named,
        checkpoint=options.checkpoint,
        ema=options.ema,
        top=options.top,
        batch_size=options.batch_size,
        num_threads=options.threads,
    )
    return write_predictions(predictions, options.format, stream=sys.stdout)
