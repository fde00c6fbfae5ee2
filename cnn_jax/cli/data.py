"""`data`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, existing_file, new_picture, positive
from cnn_jax.cli.config_files import parsed

USAGE = """\
%(prog)s prepare NAME [--data-dir DIR]
       %(prog)s prepare --config FILE --resize N --output DIR [--threads N]
       %(prog)s inspect --config FILE [--output FILE.png]
       %(prog)s check --config FILE [--threads N]"""

DESCRIPTION = """\
prepare: makes a data set of TFDS ready by NAME; or writes the images of FILE's
         data set smaller, once, for machines with few cores. Started again
         after a stop, it goes on.
inspect: shows splits, classes and image sizes, and draws some training images
         as they are and as the network sees them.
check:   reads every image and names each that is damaged or odd, and why."""

EPILOG = """\
examples:
  %(prog)s prepare cifar10
  %(prog)s check --config configs/finetune.py --config.data.source_dir=DIR
  %(prog)s prepare --config configs/imagenet_resnet50.py --resize 256 --output DIR

Exit code: 0 when done, 2 for a mistake in the command or the configuration,
1 for anything else, a damaged image that `check` found among it.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "data",
        run,
        help="prepare a data set, look at it, check every image",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("action", choices=("prepare", "inspect", "check"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="a data set of TFDS")
    parser.add_argument("--config", metavar="FILE", type=existing_file, help="of a run on the data")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a key of FILE")
    parser.add_argument("--data-dir", metavar="DIR", help="with NAME: where data sets are kept")
    parser.add_argument(
        "--resize", metavar="N", type=positive, help="pixels of the shorter side, such as 256"
    )
    parser.add_argument("--output", metavar="PATH", type=Path, help="what to write; must not exist")
    parser.add_argument("--threads", metavar="N", type=positive, help="default: 2")


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    _refuse_what_does_not_go_together(options, overrides)

    from cnn_jax.commands import data
    from cnn_jax.config import ConfigError

    if options.name:
        return data.prepare_named(options.name, data_dir=options.data_dir or "")
    threads = options.threads or 2
    try:
        config = parsed(options.config, overrides)
        if options.action == "prepare":
            return data.prepare_resized(
                config, options.output, shorter_side=options.resize, num_threads=threads
            )
        if options.action == "inspect":
            return data.inspect(config, picture=options.output)
        return data.check(config, num_threads=threads)
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2


def _refuse_what_does_not_go_together(
    options: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> None:
    refuse = options.parser.error
    if options.name and (options.action != "prepare" or options.config or overrides):
        refuse(f"NAME {options.name!r}: only with prepare, and without --config")
    if not options.name and options.config is None:
        refuse("the following arguments are required: --config")
    if options.data_dir and not options.name:
        refuse("--data-dir: only with NAME; --config.data.data_dir=DIR sets it for FILE")
    resizes = options.action == "prepare" and not options.name
    if resizes and not (options.resize and options.output):
        refuse("prepare --config: needs --resize and --output")
    if options.resize and not resizes:
        refuse("--resize: only with prepare --config FILE")
    if options.output and (options.action == "check" or options.name):
        refuse("--output: only with inspect, and with prepare --config FILE")
    if options.output and options.action == "inspect":
        try:
            new_picture(str(options.output))
        except argparse.ArgumentTypeError as error:
            refuse(f"argument --output: {error}")
    if options.threads and (options.action == "inspect" or options.name):
        refuse("--threads: only with check, and with prepare --config FILE")
