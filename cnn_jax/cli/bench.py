"""`bench`, on the command line."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from cnn_jax.benchmarking.workload import PEERS, Workload
from cnn_jax.cli.arguments import (
    add_command,
    existing_file,
    image_size,
    model_name,
    names,
    new_file,
    positive,
)
from cnn_jax.cli.config_files import load, parsed

PRECISIONS = ("float32", "bfloat16")

USAGE = """\
%(prog)s step|predict --model NAME [--image N] --batch N [--precision P] [...]
       %(prog)s step|predict --config FILE [--config.KEY=VALUE ...] [--batch N] [...]
       and in both [--peer NAME[,NAME]] [--windows N] [--steps N] [--json FILE]
       %(prog)s data --config FILE [--config.KEY=VALUE ...] [--seconds S] [--json FILE]"""

DESCRIPTION = """\
step:    times training steps: forward, backward, BatchNorm in training, SGD with
         momentum, the weights updated, on one device and one batch that stays there.
predict: times predictions, as `export` writes them.
data:    times each stage from the files to the device, alone and together, and
         names the one that limits.

Peers are the same network in plain flax.linen, in PyTorch and in compiled PyTorch,
channels last. All start from the same weights, five steps must give the same on all,
and then they take turns, each in a process of its own."""

EPILOG = """\
examples:
  %(prog)s step --model resnet50 --image 224 --batch 16 --peer linen,torch
  %(prog)s step --config configs/quickstart.py --peer torch --json step.json
  %(prog)s predict --model resnet50 --image 224 --batch 1 --peer torch
  %(prog)s data --config configs/finetune.py --config.data.source_dir=DIR

scatter is the interquartile range of the windows as a share of their median. MB an
image are counted in the compiled program; GB/s and GFLOP/s are followed by their share
of a copy and of a matrix product timed in the same run. The bound is the time that the
program's kernels need at those rates, and at the published ones where there are any.

Exit code: 0 when measured; 3 when the times scatter by more than 5 %% or other processes
took more than 5 %% of the machine: they are printed, and not written to FILE; 2 for a
mistake in the command or the configuration; 1 for anything else, sides that compute
different things among it.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "bench",
        run,
        help="time a step, a prediction or the data's way, beside other libraries",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("action", choices=("step", "predict", "data"))
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--model", metavar="NAME", type=model_name, help="a network by name, with 1000 classes"
    )
    network.add_argument(
        "--config", metavar="FILE", type=existing_file, help="the network, or the data, of a run"
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a key of FILE")
    parser.add_argument(
        "--image",
        metavar="N",
        type=image_size,
        help="with --model: pixels of a side, or HEIGHTxWIDTH (default: 224)",
    )
    parser.add_argument(
        "--batch", metavar="N", type=positive, help="images at once (default: FILE's batch_size)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the computation (default: FILE's; with --model float32)",
    )
    parser.add_argument(
        "--peer", metavar="NAME", type=names, default=[], help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--windows", metavar="N", type=positive, help="turns of each side, at least 5 (default: 5)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=positive,
        help="in a window (default: those of a second, at least 3 on a CPU and 50 elsewhere)",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=positive,
        help="with data: for each stage (default: 5)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=new_file,
        help="write the result to FILE, which must not exist",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    _refuse_what_does_not_go_together(options, overrides)

    from cnn_jax.commands.bench import bench
    from cnn_jax.config import ConfigError, override, parse

    try:
        if options.action == "data":
            from cnn_jax.commands.bench_data import bench_data

            return bench_data(
                parsed(options.config, overrides),
                seconds=options.seconds or 5,
                json_file=options.json,
            )
        training = options.action == "step"
        if options.model:
            height, width = options.image or (224, 224)
            workload = Workload(
                model=options.model,
                arguments={},
                num_classes=1000,
                image_shape=(height, width, 3),
                batch_size=options.batch,
                precision=options.precision or "float32",
                training=training,
            )
        else:
            # Of one device, and without asking which there are: they are for the sides to take.
            config = parse(override(load(options.config), overrides), num_devices=1)
            dataset = config.data.dataset()
            workload = Workload(
                model=config.model.name,
                arguments=config.model.arguments,
                num_classes=dataset.num_classes,
                image_shape=dataset.image_shape,
                batch_size=options.batch or config.batch_size,
                precision=options.precision or config.precision,
                training=training,
            )
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2
    return bench(
        workload,
        options.peer,
        windows=options.windows or 5,
        steps=options.steps,
        json_file=options.json,
        command=shlex.join(["python", "-m", "cnn_jax", *sys.argv[1:]]),
    )


def _refuse_what_does_not_go_together(
    options: argparse.Namespace, overrides: Sequence[tuple[str, str]]
) -> None:
    refuse = options.parser.error
    if options.model and overrides:
        refuse(f"--config.{overrides[0][0]}: only with --config")
    if options.image and not options.model:
        refuse("--image: only with --model; the data set gives it")
    if options.action == "data":
        flags = ("model", "batch", "precision", "peer", "windows", "steps")
        for flag in flags:
            if vars(options)[flag]:
                refuse(f"--{flag}: not with data")
    elif options.seconds:
        refuse("--seconds: only with data")
    elif options.model and not options.batch:
        refuse("--model: needs --batch")
    for peer in options.peer:
        if peer not in PEERS:
            refuse(f"--peer {peer}: must be one of {', '.join(PEERS)}")
    if options.windows and options.windows < 5:
        refuse(f"--windows {options.windows}: must be at least 5, or there are no quartiles")
