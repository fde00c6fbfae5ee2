"""`features`, on the command line."""

import argparse
from collections.abc import Sequence
from typing import Any

from cnn_jax.cli.arguments import (
    add_command,
    add_reading,
    add_run,
    new_file,
    refuse_overrides,
)

DESCRIPTION = """\
Writes what layers of a trained network make of every image as arrays in an .npz file:
of the run's data set with the labels, or of image files with their paths, in order. A
feature map is averaged over its positions."""

EPILOG = """\
examples:
  %(prog)s --workdir runs/quickstart --to features.npz
  %(prog)s --workdir runs/quickstart --split train --to train.npz
  %(prog)s --workdir runs/quickstart --layer stem --pool none --to stem.npz photos/

Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else. A file
that cannot be read is named and left out.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "features",
        run,
        help="write what layers of a trained network make of images, as arrays",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_run(parser)
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", help="file, folder or pattern, in place of the data set"
    )
    parser.add_argument(
        "--split", metavar="SPLIT", help="of the data set, or a slice (default: the run's test)"
    )
    parser.add_argument(
        "--to", metavar="FILE", type=new_file, required=True, help="the .npz; must not exist"
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        action="append",
        default=[],
        help="as inspect --depth 9 shows it; may come several times (default: the last stage)",
    )
    parser.add_argument(
        "--pool",
        choices=("average", "none"),
        default="average",
        help="over the positions of a feature map (default: average)",
    )
    add_reading(parser)


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    refuse_overrides(options, overrides)
    if options.paths and options.split:
        options.parser.error("--split: only without PATH")
    if options.to.suffix != ".npz":
        options.parser.error(f"--to {options.to}: the name must end in .npz")
    from cnn_jax.commands.features import features

    arrays = features(
        options.workdir,
        options.to,
        paths=options.paths,
        split=options.split,
        layers=options.layer,
        pool=options.pool,
        checkpoint=options.checkpoint,
        ema=options.ema,
        batch_size=options.batch_size,
        num_threads=options.threads,
    )
    print(f"{options.to}:")
    for name, array in arrays.items():
        print(f"  {name}  {' x '.join(map(str, array.shape))}  {array.dtype.name}")
    return 0
