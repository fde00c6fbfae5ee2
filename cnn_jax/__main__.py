"""The command line: `python -m cnn_jax COMMAND`, installed as `cnn-jax`.

Flags and config files stop here; a command receives a checked `Config`.
"""

import argparse
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cnn_jax import MODELS, __version__
from cnn_jax.errors import UserError, nearest
from cnn_jax.runtime.compiler import start_cache

EPILOG = """\
examples:
  %(prog)s train --config configs/quickstart.py
  %(prog)s inspect --model resnet50
  %(prog)s compile --config configs/synthetic.py --topology h200:8

'%(prog)s COMMAND --help' explains a command.
"""

TRAIN_USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       [--workdir DIR] [--compiled DIR] [--dry-run] [--accept-config-changes]"""

TRAIN_DESCRIPTION = """\
Trains the network that FILE describes and evaluates it on every test image.
The same command again carries on where the run was stopped, and says so when
the run is complete."""

TRAIN_EPILOG = """\
examples:
  %(prog)s --config configs/quickstart.py
  %(prog)s --config configs/quickstart.py --dry-run
  %(prog)s --config configs/quickstart.py --workdir runs/wide \\
      --config.model.width=64 --config.optimizer.learning_rate=0.05

configs/default.py explains every KEY. Exit code: 0 when done, 2 for a mistake
in the command or the configuration, 130 and 143 when stopped by Ctrl-C or
SIGTERM (what was trained is saved), 1 for anything else that stopped it.
"""

INSPECT_USAGE = """\
%(prog)s --config FILE [--config.KEY=VALUE ...]
       %(prog)s --model NAME [--image-size N] [--channels N]
       and in either case [--depth N] [--json FILE]"""

INSPECT_DESCRIPTION = """\
Shows the layers of a network with their outputs, strides, receptive fields,
parameters, multiply-adds and activations, without running it. It needs no data."""

INSPECT_EPILOG = """\
examples:
  %(prog)s --config configs/quickstart.py
  %(prog)s --config configs/quickstart.py --config.model.width=64
  %(prog)s --model resnet50 --image-size 224x160 --depth 9
  %(prog)s --model resnet50 --json -

Exit code: 0 when done, 2 for a mistake in the command or the configuration,
1 for anything else.
"""


CONVERT_USAGE = """\
%(prog)s FILE --model NAME --to DIR [--num-classes N] [--argument KEY=VALUE ...]
       [--ignore PART ...] [--conv-biases {fold,zero}]
       %(prog)s DIR --to FILE.safetensors [--layout {torchvision,timm}]"""

CONVERT_DESCRIPTION = """\
Converts weights of torchvision or timm (.safetensors, .pth, .pt) to a directory
that a run can start from, and back. A run's directory will do for DIR: its newest
checkpoint is taken. PyTorch is not needed, and nothing in a file is run. Each
tensor is accounted for: one that is missing, unexpected or of another shape is
an error, and nothing is written then."""

CONVERT_EPILOG = """\
examples:
  %(prog)s resnet50.pth --model resnet50 --to weights/resnet50
  %(prog)s googlenet.pth --model googlenet --ignore aux1 --ignore aux2 --to weights/g
  %(prog)s runs/quickstart --to quickstart.safetensors
  python -m cnn_jax train --config FILE --config.init_from=weights/resnet50 \\
      --config.init_ignore=head,

Biases are all that --conv-biases converts: a network with variant="literal" also
has a ReLU before each addition, and remains another function.
Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else.
"""

COMPILE_USAGE = """\
%(prog)s --config FILE --topology NAME[,NAME...] [--config.KEY=VALUE[,VALUE...] ...]
       [--step STEP[,STEP...]] [--max-batch] [--json FILE] [--dump DIR] [--plot DIR]
       [--save DIR] [--time-limit SECONDS] [--memory-limit GIB]
       %(prog)s --compare BEFORE.json AFTER.json"""

COMPILE_DESCRIPTION = """\
Compiles the steps that a run would take, for machines that need not be there, and
says whether they fit, what they cost and what bounds them. It needs no data, no
weights and no accelerator. Every combination of topologies and listed values is a
row. A compile that crashes or hangs is one failed row."""

COMPILE_EPILOG = """\
examples:
  %(prog)s --config configs/synthetic.py --topology v5e:2x2,h200:8
  %(prog)s --config configs/synthetic.py --topology h200 --config.batch_size=256,512 --json a.json
  %(prog)s --config configs/synthetic.py --topology a100-40gb:8 --max-batch
  %(prog)s --config configs/quickstart.py --topology cpu:1 --save programs
  python train.py --config configs/quickstart.py --compiled programs
  %(prog)s --compare a.json b.json

Topologies: TPU slices such as v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1 (they take
pip install "cnn_jax[aot-tpu]"), GPUs such as h200:8, a100-40gb:8, l4
(pip install "cnn_jax[aot-gpu]"), and cpu:8.
Exit code: 0 when all was compiled, also what does not fit; 2 for a mistake in the
command or the configuration; 1 if a compile failed.
"""


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Ends the process with the exit code of `main`."""
    sys.excepthook = _without_abandoned_arrays(sys.excepthook)
    sys.unraisablehook = _without_abandoned_arrays(sys.unraisablehook)
    code = main(arguments)
    if code:  # a compiler in another thread would hold up Python's own exit for minutes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _without_abandoned_arrays(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns the hook of `sys`, silent for the tasks that orbax abandons when a write fails.

    Pages of them would bury the one message that says what is wrong.
    """

    def filtered(*details: Any) -> None:
        if len(details) == 1:  # sys.unraisablehook
            error, origin = details[0].exc_value, details[0].object
        else:  # sys.excepthook
            error, origin = details[1], None
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not closed and not inspect.iscoroutine(origin):
            hook(*details)

    return filtered


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command that `arguments` name, by default `sys.argv[1:]`."""
    flags, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(flags)
    if options.command is None:
        unknown = [*unknown, *(f"--config.{key}" for key, _ in overrides)]
    if unknown:
        options.parser.error(f"unrecognized arguments: {_with_hints(unknown, options.parser)}")
    if options.command is None:
        parser.print_help()
        return 0
    start_cache(_note)
    try:
        return options.run(options, overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    program = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax" if program == "__main__.py" else program,
        description="Convolutional networks in JAX, trained on TPU, GPU or CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"cnn_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    train = commands.add_parser(
        "train",
        prog="python train.py" if program == "train.py" else None,
        help="train a network",
        usage=TRAIN_USAGE,
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.set_defaults(parser=train, run=_train)
    train.add_argument(
        "--config",
        metavar="FILE",
        type=_existing_file,
        help="Python file with get_config(), such as configs/quickstart.py",
    )
    # For the help alone: `_split_overrides` takes them out, as only the config knows their names.
    train.add_argument(
        "--config.KEY", metavar="VALUE", help="override a key of FILE; any number of times"
    )
    train.add_argument(
        "--workdir", metavar="DIR", help="where the run writes (default: runs/<name of FILE>)"
    )
    train.add_argument(
        "--compiled",
        metavar="DIR",
        type=_existing_directory,
        help="start without compiling, with the programs of `compile --save DIR` if they fit",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan and stop"
    )
    train.add_argument(
        "--accept-config-changes",
        action="store_true",
        help="go on with a run although its configuration was another",
    )
    _add_inspect(commands)
    _add_convert(commands)
    _add_compile(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show the layers of a network and what they cost",
        usage=INSPECT_USAGE,
        description=INSPECT_DESCRIPTION,
        epilog=INSPECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=_inspect)
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--config", metavar="FILE", type=_existing_file, help="the network that a run would train"
    )
    network.add_argument(
        "--model", metavar="NAME", type=_model_name, help="a network by name, with 1000 classes"
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a key of FILE")
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=_image_size,
        help="with --model: pixels of a side, or HEIGHTxWIDTH (default: 224)",
    )
    parser.add_argument(
        "--channels", metavar="N", type=_positive, help="with --model: of the image (default: 3)"
    )
    parser.add_argument(
        "--depth",
        metavar="N",
        type=_positive,
        default=1,
        help="one row for each module N names below the network (default: 1; 9 shows every layer)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the rows to FILE, which must not exist; -: to the terminal, without the table",
    )


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="bring weights from PyTorch, or take them there",
        usage=CONVERT_USAGE,
        description=CONVERT_DESCRIPTION,
        epilog=CONVERT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=_convert)
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a file of weights, or a directory"
    )
    parser.add_argument(
        "--to",
        metavar="TARGET",
        type=Path,
        required=True,
        help="a .safetensors file or a directory",
    )
    parser.add_argument(
        "--model", metavar="NAME", type=_model_name, help="what a file is for, such as resnet50"
    )
    parser.add_argument(
        "--num-classes",
        metavar="N",
        type=_positive,
        help="of the model (default: those of the file)",
    )
    parser.add_argument(
        "--argument",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="another argument of the model, such as width=32; any number of times",
    )
    parser.add_argument(
        "--ignore",
        metavar="PART",
        action="append",
        default=[],
        help="leave a part of the model (head) at random, or tensors of the file (aux1) out; any "
        "number of times",
    )
    parser.add_argument(
        "--conv-biases",
        choices=("fold", "zero"),
        help="fold: the file has biases in front of BatchNorm and the model has none, so take them "
        "into the running means; zero: the reverse, so add biases of 0",
    )
    parser.add_argument(
        "--layout",
        choices=("torchvision", "timm"),
        help="whose names a file gets (default: those that the weights came with)",
    )


def _add_compile(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a run's steps for a TPU or GPU, with or without having one",
        usage=COMPILE_USAGE,
        description=COMPILE_DESCRIPTION,
        epilog=COMPILE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=_compile)
    parser.add_argument(
        "--config", metavar="FILE", type=_existing_file, help="the run whose steps are compiled"
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="override a key of FILE; several values: a sweep"
    )
    parser.add_argument(
        "--topology", metavar="NAME", type=_names, help="what to compile for, such as v5e:2x2,h200"
    )
    parser.add_argument(
        "--step",
        metavar="STEP",
        type=_names,
        help="train, evaluation, prediction (default: all three)",
    )
    parser.add_argument(
        "--max-batch",
        action="store_true",
        help="find the largest batch whose training step fits",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=_new_file, help="write the report to FILE, for --compare"
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
        type=_positive,
        default=1800,
        help="for one compile (default: 1800)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="GIB",
        type=_positive,
        help="of this machine's memory, for one compile (default: none)",
    )
    parser.add_argument(
        "--compare",
        metavar="FILE",
        nargs=2,
        type=_existing_file,
        help="print what differs between two reports",
    )


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the arguments without any `--config.KEY=VALUE` or `--config.KEY VALUE`, and those.

    One without a value stays, for argparse to refuse.
    """
    flags: list[str] = []
    overrides: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        key = re.fullmatch(r"--config\.(\w+(?:\.\w+)*)", flag)
        if key and equals:
            overrides.append((key[1], value))
        elif key and remaining and not remaining[0].startswith("--"):
            overrides.append((key[1], remaining.pop(0)))
        else:
            flags.append(argument)
    return flags, overrides


def _with_hints(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    known = re.findall(r"--[\w-]+", parser.format_help())

    def hint(argument: str) -> str:
        if argument.startswith("--config."):
            return " (must be --config.KEY=VALUE)"
        return nearest(argument.partition("=")[0], known)

    return ", ".join(argument + hint(argument) for argument in unknown)


def _existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.py")]
        raise argparse.ArgumentTypeError(f"no file {text!r}{nearest(text, siblings)}")
    return path


def _existing_directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no directory {text!r}")
    return Path(text)


def _model_name(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"unknown model {text!r}{_hint_or_all(text, MODELS)}")
    return text


def _hint_or_all(name: str, known: Mapping[str, Any]) -> str:
    return nearest(name, known) or f"; known: {', '.join(known)}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer >= 1")
    return int(text)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _new_file(text: str) -> Path:
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is already there; name another file")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no directory {Path(text).parent}")
    return Path(text)


def _image_size(text: str) -> tuple[int, int]:
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be pixels >= 1, such as 224 or HEIGHTxWIDTH, such as 224x160"
        )
    return sides[0], sides[-1]


def _train(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    if options.config is None:
        return options.parser.error("the following arguments are required: --config")

    # Here rather than above: help and mistyped flags should not wait for data and checkpoints.
    from cnn_jax.config import ConfigError

    workdir = options.workdir or os.path.join("runs", options.config.stem)
    resumes = any(Path(workdir, "checkpoints").glob("[0-9]*/manifest.json"))
    try:
        config = _parsed(options.config, overrides, check_weights=not resumes)

        from cnn_jax.commands.train import train

        return train(
            config,
            workdir,
            compiled=options.compiled,
            dry_run=options.dry_run,
            accept_config_changes=options.accept_config_changes,
        )
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2


def _inspect(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
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
        return inspect_config(_parsed(options.config, overrides), **shown)
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2


def _convert(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    if overrides:
        options.parser.error(f"--config.{overrides[0][0]}: not an option of convert")
    pairs = [text.partition("=") for text in options.argument]
    for key, equals, _ in pairs:
        if key == "num_classes" or not equals:
            right = "--num-classes N" if equals else "KEY=VALUE"
            options.parser.error(f"--argument {key}: must be {right}")

    from cnn_jax.commands.convert import convert
    from cnn_jax.config import ConfigError, model_arguments

    texts = [(key, value) for key, _, value in pairs]
    try:
        arguments = model_arguments(options.model, texts) if options.model else dict(texts)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.num_classes:
        arguments["num_classes"] = options.num_classes
    return convert(
        options.source,
        options.to,
        model=options.model,
        arguments=arguments,
        ignore=options.ignore,
        conv_biases=options.conv_biases,
        layout=options.layout,
    )


def _compile(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from cnn_jax.commands import compile as command

    if options.compare:
        if options.config or options.topology or overrides:
            return options.parser.error("--compare: takes two reports and nothing else")
        before, after = options.compare
        reports = command.read_report(before), command.read_report(after)
        print(command.compare(*reports, (str(before), str(after))))
        return 0
    for flag in ("config", "topology"):
        if not getattr(options, flag):
            return options.parser.error(f"the following arguments are required: --{flag}")

    from cnn_jax.config import ConfigError, override, parse, sweep
    from cnn_jax.plan import STEPS
    from cnn_jax.runtime.executables import saved_files
    from cnn_jax.runtime.platform import Interrupted, StopSignals

    for step in options.step or STEPS:
        if step not in STEPS:
            return options.parser.error(f"--step {step}: must be one of {', '.join(STEPS)}")
    try:
        topologies = [command.parse_topology(text) for text in options.topology]
    except UserError as error:
        return options.parser.error(str(error))
    for topology in topologies:
        if options.max_batch and topology.accelerator.memory is None:
            return options.parser.error(f"--max-batch: the memory of {topology.name} is not known")
    try:
        values = _load(options.config)
        variants = [
            command.Variant(override(values, texts), name)
            for name, texts in sweep(values, overrides).items()
        ]
        for variant in variants:
            for topology in topologies:
                parse(variant.values, num_devices=topology.num_devices)
    except ConfigError as error:
        print(f"{options.config}: {error}", file=sys.stderr)
        return 2
    if options.save:
        if options.max_batch or len(variants) * len(topologies) > 1:
            return options.parser.error("--save: takes one topology and one configuration")
        for step in options.step or STEPS:
            for path in filter(Path.exists, saved_files(options.save, step)):
                return options.parser.error(f"--save: {path} is already there")
    try:
        with StopSignals():
            return _compile_all(command, variants, topologies, options)
    except Interrupted as interrupted:
        print("interrupted", file=sys.stderr)
        return 128 + interrupted.signum


def _compile_all(command: Any, variants: Any, topologies: Any, options: argparse.Namespace) -> int:
    from cnn_jax.plan import STEPS

    return command.compile_steps(
        variants,
        topologies,
        command.Options(
            steps=options.step or STEPS,
            dump=options.dump,
            plot=options.plot,
            save=options.save,
            time_limit=options.time_limit,
            memory_limit=options.memory_limit and options.memory_limit * 2**30,
        ),
        json_file=options.json,
        max_batch=options.max_batch,
    )


def _parsed(
    path: Path, overrides: Sequence[tuple[str, str]], *, check_weights: bool = False
) -> Any:
    """Returns the checked configuration of the file; raises ConfigError with all mistakes."""
    from cnn_jax.config import override, parse

    values = override(_load(path), overrides)
    return parse(values, num_devices=_num_devices(), check_weights=check_weights)


def _num_devices() -> int:
    import jax

    try:
        return jax.device_count()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device: {error}") from error


def _load(path: Path) -> Mapping[str, Any]:
    """Returns the values that the file's `get_config()` returns.

    Files in a folder `configs` may import each other wherever the command is started. Raises
    ConfigError, with file and line, for whatever the file raises.
    """
    from ml_collections import ConfigDict

    from cnn_jax.config import ConfigError

    folders = [folder.parent for folder in path.resolve().parents if folder.name == "configs"]
    search_before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in (*folders, Path.cwd())]
    # All folders `configs` are one package, also where an installed package has taken the name.
    package = types.ModuleType("configs")
    package.__path__ = [
        str(found) for place in sys.path if (found := Path(place, "configs")).is_dir()
    ]
    sys.modules["configs"] = package
    try:
        names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(path.read_bytes(), path, "exec"), names)
        config = names["get_config"]() if "get_config" in names else None
        values = config.to_dict() if isinstance(config, ConfigDict) else config
    except Exception as error:
        raise ConfigError([_located(error, path)]) from error
    finally:
        sys.path[:] = search_before
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            del sys.modules[name]
    if not isinstance(values, Mapping):
        raise ConfigError([f"{path}: must define get_config() that returns a ConfigDict"])
    return values


def _located(error: Exception, path: Path) -> str:
    """Returns the text of the error behind the place in a config file that it comes from."""
    folder = path.resolve().parent
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent == folder
    ]
    if isinstance(error, SyntaxError):
        places.append((error.filename or str(path), error.lineno))
    text = str(error)
    if error.args and isinstance(error.args[0], KeyError):  # what ConfigDict raises, hint and all
        text = str(error.args[0].args[0])
    place = ":".join(map(str, places[-1])) if places else str(path)
    return f"{place}: {type(error).__name__}: {' '.join(text.split())}"


if __name__ == "__main__":
    run()
