"""`train`, on the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, existing_directory, existing_file, positive
from cnn_jax.cli.config_files import parsed

USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       [--workdir DIR] [--compiled DIR] [--step-timeout SECONDS] [--dry-run]
       [--accept-config-changes]"""

DESCRIPTION = """\
Trains the network that FILE describes and evaluates it on every test image.
The same command again carries on where the run was stopped, and says so when
the run is complete."""

EPILOG = """\
examples:
  %(prog)s --config configs/quickstart.py
  %(prog)s --config configs/quickstart.py --dry-run
  %(prog)s --config configs/quickstart.py --workdir runs/wide \\
      --config.model.width=64 --config.optimizer.learning_rate=0.05

configs/default.py explains every KEY. Exit code: 0 when done, 2 for a mistake
in the command or the configuration, 130 and 143 when stopped by Ctrl-C or
SIGTERM (what was trained is saved), 75 for a step that hung, 1 for anything
else that stopped it. After 75 and 143 the same command goes on.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "train",
        run,
        prog="python train.py" if Path(sys.argv[0]).name == "train.py" else None,
        help="train a network",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=existing_file,
        help="Python file with get_config(), such as configs/quickstart.py",
    )
    # For the help alone: `split_overrides` takes them out, as only the config knows their names.
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="override a key of FILE; any number of times"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the run writes (default: runs/<name of FILE>)"
    )
    parser.add_argument(
        "--compiled",
        metavar="DIR",
        type=existing_directory,
        help="start without compiling, with the programs of `compile --save DIR` if they fit",
    )
    parser.add_argument(
        "--step-timeout",
        metavar="SECONDS",
        type=positive,
        default=0,
        help="end with exit code 75 and all stacks when no step ends for so long, the longest "
        "save included (default: never)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan and stop"
    )
    parser.add_argument(
        "--accept-config-changes",
        action="store_true",
        help="go on with a run although its configuration was another",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    if options.config is None:
        return options.parser.error("the following arguments are required: --config")

    # Here rather than above: help and mistyped flags should not wait for data and checkpoints.
    from cnn_jax.config import ConfigError

    workdir = options.workdir or os.path.join("runs", options.config.stem)
    resumes = any(Path(workdir, "checkpoints").glob("[0-9]*/manifest.json"))
    try:
        config = parsed(options.config, overrides, check_weights=not resumes)

        from cnn_jax.commands.train import train

        return train(
            config,
            workdir,
            compiled=options.compiled,
            step_timeout=options.step_timeout,
            dry_run=options.dry_run,
            accept_config_changes=options.accept_config_changes,
        )
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2
