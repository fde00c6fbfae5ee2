"""`inspect`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from cnn_jax.cli.arguments import (
    add_command,
    add_ema,
    existing_file,
    existing_run,
    image_size,
    model_name,
    new_file,
    positive,
)
from cnn_jax.cli.config_files import parsed

USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       %(prog)s --model NAME [--image-size N] [--channels N]
       %(prog)s --workdir RUN [--checkpoint WHICH] [--ema]
               [--pictures DIR [--image FILE [--class NAME] [--method NAME]]]
       and in each case [--depth N] [--json FILE]"""

DESCRIPTION = """\
Shows the layers of a network with their outputs, strides, receptive fields,
parameters, multiply-adds and activations, without running it. It needs no data.
Of a run it draws what was learned: the filters of the first convolution, and for an
image what every stage makes of it, how much of it each sees, and where the evidence
for a class lies (Grad-CAM, Grad-CAM++)."""

EPILOG = """\
examples:
  %(prog)s --config configs/quickstart.py
  %(prog)s --config configs/quickstart.py --config.model.width=64
  %(prog)s --model resnet50 --image-size 224x160 --depth 9
  %(prog)s --model resnet50 --json -
  %(prog)s --workdir runs/quickstart --pictures pictures --image shoe.png --class Sneaker

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
    network.add_argument("--workdir", metavar="RUN", type=existing_run, help="the network of a run")
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
        "--checkpoint", metavar="WHICH", help="with --workdir: last, best or a step (default: last)"
    )
    add_ema(parser)
    parser.add_argument(
        "--pictures", metavar="DIR", help="with --workdir: draw filters.png in this directory"
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="with --pictures: draw stages.png, receptive_fields.png and evidence.png of this "
        "image as well",
    )
    parser.add_argument(
        "--class",
        metavar="NAME",
        dest="class_name",
        help="with --image: whose evidence to draw (default: the predicted class)",
    )
    parser.add_argument(
        "--method",
        choices=("grad_cam", "grad_cam++"),
        help="with --image: how to find the evidence (default: grad_cam)",
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
        type=_new_file_or_terminal,
        help="write the rows to FILE, which must not exist; -: to the terminal, without the table",
    )


def _new_file_or_terminal(text: str) -> str:
    return text if text == "-" else str(new_file(text))


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    of_a_model = {"--image-size": options.image_size, "--channels": options.channels}
    of_a_run = {
        "--checkpoint": options.checkpoint,
        "--ema": options.ema or None,
        "--pictures": options.pictures,
        "--image": options.image,
        "--class": options.class_name,
        "--method": options.method,
    }
    misplaced = [flag for flag, value in of_a_model.items() if value is not None]
    if not options.model and misplaced:
        options.parser.error(f"{misplaced[0]}: only with --model; the data set gives it")
    misplaced = [flag for flag, value in of_a_run.items() if value is not None]
    if not options.workdir and misplaced:
        options.parser.error(f"{misplaced[0]}: only with --workdir")
    if options.image and not options.pictures:
        options.parser.error("--image: only with --pictures, where to draw")
    for flag, value in (("--class", options.class_name), ("--method", options.method)):
        if value and not options.image:
            options.parser.error(f"{flag}: only with --image")
    if not options.config and overrides:
        options.parser.error(f"--config.{overrides[0][0]}: only with --config")

    from cnn_jax.commands.inspect import inspect, inspect_config, inspect_model
    from cnn_jax.config import ConfigError

    shown = {"depth": options.depth, "json_file": options.json}
    if options.model:
        image_shape = (*(options.image_size or (224, 224)), options.channels or 3)
        inspect_model(options.model, image_shape, **shown)
        return 0
    if options.workdir:
        drawn = {"pictures": options.pictures, "image": options.image}
        checkpoint = options.checkpoint or "last"
        inspect(
            options.workdir,
            checkpoint=checkpoint,
            ema=options.ema,
            class_name=options.class_name,
            method=options.method or "grad_cam",
            **drawn,
            **shown,
        )
        return 0
    try:
        inspect_config(parsed(options.config, overrides), **shown)
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2
    return 0
