"""`inspect`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from cnn_jax.cli.arguments import add_command, existing_file, image_size, model_name, positive
from cnn_jax.cli.config_files import parsed

USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       %(prog)s --model NAME [--image-size N] [--channels N]
       and in either case [--depth N] [--json FILE]"""

DESCRIPTION = """\
Shows the layers of a network with their outputs, strides, receptive fields,
parameters, multiply-adds and activations, without running it. It needs no data."""

EPILOG = """\
examples:
  %(prog)s --config configs/quickstart.py
  %(prog)s --config configs/quickstart.py --config.model.width=64
  %(prog)s --model resnet50 --image-size 224x160 --depth 9
  %(prog)s --model resnet50 --json -

Exit code: 0 when done, 2 for a mistake in the command or the configuration,
1 for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "inspect",
        run,
        help="show the layers of a network and what they cost",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--config", metavar="FILE", type=existing_file, help="the network that a run would train"
    )
    network.add_argument(
        "--model", metavar="NAME", type=model_name, help="a network by name, with 1000 classes"
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a key of FILE")
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=image_size,
        help="with --model: pixels of a side, or HEIGHTxWIDTH (default: 224)",
    )
    parser.add_argument(
        "--channels", metavar="N", type=positive, help="with --model: of the image (default: 3)"
    )
    parser.add_argument(
        "--depth",
        metavar="N",
        type=positive,
        default=1,
        help="one row for each module N names below the network (default: 1; 9 shows every layer)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the rows to FILE, which must not exist; -: to the terminal, without the table",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    given = {"--image-size": options.image_size, "--channels": options.channels}
    misplaced = [flag for flag, value in given.items() if value is not None]
    if options.config and misplaced:
        options.parser.error(f"{misplaced[0]}: only with --model; the data set of FILE gives it")
    if options.model and overrides:
        options.parser.error(f"--config.{overrides[0][0]}: only with --config")

    from cnn_jax.commands.inspect import inspect_config, inspect_model
    from cnn_jax.config import ConfigError

    shown = {"depth": options.depth, "json_file": options.json}
    if options.model:
        image_shape = (*(options.image_size or (224, 224)), options.channels or 3)
        return inspect_model(options.model, image_shape, **shown)
    try:
        return inspect_config(parsed(options.config, overrides), **shown)
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2
