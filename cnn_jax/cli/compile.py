"""`compile`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, existing_file, names, new_file, positive
from cnn_jax.cli.config_files import load
from cnn_jax.errors import UserError

USAGE = """\
%(prog)s --config FILE --topology NAME[,NAME...] [--config.KEY=VALUE[,VALUE...] ...]
       [--step STEP[,STEP...]] [--max-batch] [--json FILE] [--dump DIR] [--plot DIR]
       [--save DIR] [--time-limit SECONDS] [--memory-limit GIB]
       %(prog)s --compare BEFORE.py AFTER.py --topology NAME[,NAME...] [...]
       %(prog)s --compare BEFORE.json AFTER.json"""

DESCRIPTION = """\
Compiles the steps that a run would take, for machines that need not be there, and
says whether they fit, what they cost and what bounds them. It needs no data, no
weights and no accelerator. Every combination of topologies and listed values is a
row. A compile that crashes or hangs is one failed row."""

EPILOG = """\
examples:
  %(prog)s --config configs/synthetic.py --topology v5e:2x2,h200:8
  %(prog)s --config configs/synthetic.py --topology h200 --config.batch_size=256,512 --json a.json
  %(prog)s --config configs/synthetic.py --topology a100-40gb:8 --max-batch
  %(prog)s --config configs/quickstart.py --topology cpu:1 --save programs
  python train.py --config configs/quickstart.py --compiled programs
  %(prog)s --compare a.json b.json
  %(prog)s --compare configs/quickstart.py configs/fashion_mnist.py --topology h200 --step train

Topologies: TPU slices such as v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1 (they take
pip install "cnn_jax[aot-tpu]"), GPUs such as h200:8, a100-40gb:8, l4
(pip install "cnn_jax[aot-gpu]"), and cpu:8.
Exit code: 0 when all was compiled, also what does not fit; 2 for a mistake in the
command or the configuration; 1 if a compile failed or a compiler is not installed.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "compile",
        run,
        help="compile a run's steps for a TPU or GPU, with or without having one",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=existing_file, help="the run whose steps are compiled"
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="override a key of FILE; several values: a sweep"
    )
    parser.add_argument(
        "--topology", metavar="NAME", type=names, help="what to compile for, such as v5e:2x2,h200"
    )
    parser.add_argument(
        "--step",
        metavar="STEP",
        type=names,
        help="train, evaluation, prediction (default: all three)",
    )
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="find the largest batch whose training step fits",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=new_file, help="write the report to FILE, for --compare"
    )
    parser.add_argument(
        "--dump", metavar="DIR", type=Path, help="write StableHLO and optimised HLO there"
    )
    parser.add_argument(
        "--plot",
        metavar="DIR",
        type=Path,
        help="draw memory over the step, and its kernels, there",
    )
    parser.add_argument(
        "--save",
        metavar="DIR",
        type=Path,
        help="write the programs there, for `train --compiled DIR`",
    )
    parser.add_argument(
        "--time-limit",
        metavar="SECONDS",
        type=positive,
        default=1800,
        help="for one compile (default: 1800)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="GIB",
        type=positive,
        help="of this machine's memory, for one compile (default: none)",
    )
    parser.add_argument(
        "--compare",
        metavar="FILE",
        nargs=2,
        type=existing_file,
        help="print what differs between two reports, or between two configurations, which are "
        "compiled",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    from cnn_jax.commands import compile as command

    files = _files(options, overrides)
    if options.compare and not files:
        before, after = options.compare
        reports = command.read_report(before), command.read_report(after)
        print(command.compare(*reports, (str(before), str(after))))
        return 0
    for flag, given in (("config", files), ("topology", options.topology)):
        if not given:
            return options.parser.error(f"the following arguments are required: --{flag}")

    from cnn_jax.config import ConfigError, override, parse, sweep
    from cnn_jax.plan import STEPS
    from cnn_jax.runtime.executables import saved_files
    from cnn_jax.runtime.platform import Interrupted, StopSignals
    from cnn_jax.runtime.topologies import require_compilers

    steps = options.step or STEPS
    for step in steps:
        if step not in STEPS:
            return options.parser.error(f"--step {step}: must be one of {', '.join(STEPS)}")
    try:
        topologies = [command.parse_topology(text) for text in options.topology]
    except UserError as error:
        return options.parser.error(str(error))
    for topology in topologies:
        if options.max_batch and topology.accelerator.memory is None:
            return options.parser.error(f"--max-batch: the memory of {topology.name} is not known")
    variants = []
    for file in files:
        try:
            values = load(file)
            of_file = [
                command.Variant(override(values, texts), name, str(file) if options.compare else "")
                for name, texts in sweep(values, overrides).items()
            ]
            for variant in of_file:
                for topology in topologies:
                    parse(variant.values, num_devices=topology.num_devices)
        except ConfigError as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 2
        variants += of_file
    if options.save:
        if options.max_batch or len(variants) * len(topologies) > 1:
            return options.parser.error("--save: takes one topology and one configuration")
        if topologies[0].platform == "cuda":
            return options.parser.error(
                f"--save: a program for {topologies[0].name} would fail there: cuDNN chooses how "
                "to compute convolutions by trying it on the GPU. Train on one without --compiled: "
                "the second start of a run finds what the first has compiled"
            )
        for step in command.programs(variants[0].values, steps):
            for path in filter(Path.exists, saved_files(options.save, step)):
                return options.parser.error(f"--save: {path} is already there")
    require_compilers(topologies)
    try:
        with StopSignals():
            return command.compile_steps(
                variants,
                topologies,
                command.Options(
                    steps=steps,
                    dump=options.dump,
                    plot=options.plot,
                    save=options.save,
                    time_limit=options.time_limit,
                    memory_limit=options.memory_limit and options.memory_limit * 2**30,
                ),
                json_file=options.json,
                max_batch=options.max_batch,
                compared=(str(files[0]), str(files[1])) if options.compare else None,
            )
    except Interrupted as interrupted:
        print("interrupted", file=sys.stderr)
        return 128 + interrupted.signum


def _files(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> list[Path]:
    """Returns the configurations to compile; none where two reports are compared."""
    if not options.compare:
        return [options.config] if options.config else []
    configurations = [path for path in options.compare if path.suffix == ".py"]
    if options.config:
        options.parser.error("--compare: names both configurations itself, without --config")
    if len(configurations) == 1:
        options.parser.error("--compare: takes two reports or two configurations, not one of each")
    if not configurations and (options.topology or overrides):
        options.parser.error("--compare: takes two reports and nothing else")
    if configurations and options.max_batch:
        options.parser.error("--compare: not with --max-batch")
    if configurations and options.compare[0] == options.compare[1]:
        options.parser.error("--compare: takes two configurations, not one twice")
    return configurations
