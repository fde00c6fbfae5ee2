"""`train`, on the command line."""

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import (
    add_command,
    directory_or_url,
    existing_directory,
    existing_file,
    positive,
)
from cnn_jax.cli.config_files import parsed
from cnn_jax.runtime import distributed

USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       [--workdir DIR] [--compiled DIR] [--step-timeout SECONDS] [--dry-run]
       [--accept-config-changes]
       [--coordinator HOST:PORT --num-processes N --process-id I]
       [--join-timeout SECONDS] [--peer-timeout SECONDS]"""

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

Several processes make one run: each is started with this command, and Slurm,
Open MPI or Cloud TPU tell it its place, or --coordinator, --num-processes and
--process-id do. docs/many_hosts.md has recipes.

configs/default.py explains every KEY. Exit code: 0 when done, 2 for a mistake
in the command or the configuration, 130 and 143 when stopped by Ctrl-C or
SIGTERM (what was trained is saved), 75 for a step that hung or another process
that is gone or never came, 1 for anything else that stopped it. After 75 and
143 the same command goes on.
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
        "--workdir",
        metavar="DIR",
        type=directory_or_url,
        help="where the run writes, gs:// and s3:// too (default: runs/<name of FILE>)",
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
    several = parser.add_argument_group("several processes, where no launcher tells them")
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port of it"
    )
    several.add_argument(
        "--num-processes", metavar="N", type=positive, help="of the run; 1: stay alone"
    )
    several.add_argument("--process-id", metavar="I", type=int, help="of this one, from 0 to N - 1")
    several.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=positive,
        default=distributed.JOIN_TIMEOUT,
        help="end when not all processes have come within so long (default: %(default)s)",
    )
    several.add_argument(
        "--peer-timeout",
        metavar="SECONDS",
        type=positive,
        default=distributed.PEER_TIMEOUT,
        help="end the run when a process gives no sign of life for so long (default: %(default)s)",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    if options.config is None:
        return options.parser.error("the following arguments are required: --config")

    # Here rather than above: help and mistyped flags should not wait for data and checkpoints.
    from cnn_jax.config import ConfigError
    from cnn_jax.runtime.workdir import has_checkpoint

    workdir = options.workdir or Path("runs", options.config.stem)
    place = distributed.find_place(options.coordinator, options.num_processes, options.process_id)
    distributed.join(place, timeout=options.join_timeout, peer_timeout=options.peer_timeout)
    try:
        config = parsed(options.config, overrides, check_weights=not has_checkpoint(workdir))

        from cnn_jax.commands.train import train

        gc.freeze()  # what was imported stays: the collector need not go through it while we trace
        return train(
            config,
            workdir,
            compiled=options.compiled,
            step_timeout=options.step_timeout,
            dry_run=options.dry_run,
            accept_config_changes=options.accept_config_changes,
        )
    except ConfigError as error:
        print(f"{distributed.who()}{options.config}: {error}", file=sys.stderr, flush=True)
        return 2
