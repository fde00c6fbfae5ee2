"""`plot`, on the command line."""

import argparse
from collections.abc import Sequence
from typing import Any

from cnn_jax.cli.arguments import add_command, existing_run, new_picture

DESCRIPTION = """\
Draws loss, accuracy, learning rate and images/s of one or several runs in one
picture: raw values pale, an exponential moving average over them."""

EPILOG = """\
examples:
  %(prog)s runs/quickstart
  %(prog)s runs/quickstart runs/wide --to wide.png --smooth 0.9

Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "plot",
        run,
        help="draw the curves of runs",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "workdirs", metavar="RUN", nargs="+", type=existing_run, help="directory of a run"
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        type=new_picture,
        default="plot.png",
        help="the picture, which must not exist (default: plot.png)",
    )
    parser.add_argument(
        "--smooth",
        metavar="WEIGHT",
        type=_weight,
        default=0.8,
        help="weight of the past, >= 0 and < 1; 0: raw values alone (default: 0.8)",
    )


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number >= 0 and < 1")
    return weight


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    if overrides:
        options.parser.error(f"--config.{overrides[0][0]}: the runs have their configurations")
    from cnn_jax.commands.plot import plot

    plot(options.workdirs, options.to, smooth=options.smooth)
    print(f"drawn in {options.to}")
    return 0
