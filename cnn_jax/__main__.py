"""The command line: `python -m cnn_jax COMMAND`, installed as `cnn-jax`."""

import argparse
import contextlib
import errno
import inspect
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from cnn_jax import __version__
from cnn_jax.cli import bench as bench_
from cnn_jax.cli import compile as compile_
from cnn_jax.cli import convert as convert_
from cnn_jax.cli import data as data_
from cnn_jax.cli import evaluate as evaluate_
from cnn_jax.cli import export as export_
from cnn_jax.cli import features as features_
from cnn_jax.cli import inspect as inspect_
from cnn_jax.cli import plot as plot_
from cnn_jax.cli import predict as predict_
from cnn_jax.cli import serve as serve_
from cnn_jax.cli import train as train_
from cnn_jax.cli.config_files import split_overrides
from cnn_jax.errors import UsageError, UserError, nearest
from cnn_jax.runtime import distributed, programs
from cnn_jax.runtime.compiler import start_cache
from cnn_jax.runtime.platform import Interrupted

COMMANDS = (
    train_,
    evaluate_,
    predict_,
    features_,
    export_,
    serve_,
    plot_,
    inspect_,
    convert_,
    compile_,
    data_,
    bench_,
)
"""In the order of the help: each has `add`, for its flags, and `run`."""

EPILOG = """\
examples:
  %(prog)s train --config configs/quickstart.py
  %(prog)s evaluate --workdir runs/quickstart
  %(prog)s predict --workdir runs/quickstart image.png
  %(prog)s serve --workdir runs/quickstart
  %(prog)s inspect --model resnet50
  %(prog)s compile --config configs/synthetic.py --topology h200:8

'%(prog)s COMMAND --help' explains a command.
"""


LESS_MEMORY = (
    "Smaller batches need less: --batch-size, or in training --config.batch_size, and for the same "
    "batch in parts --config.accumulate_steps; --config.remat=block keeps less of a step"
)

NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
"""Of an OSError: what cannot be written is no mistake of this program's."""


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Ends the process with the exit code of `main`.

    Where who read its output has left (`... | head -1`), that is 141, as a shell says of a tool.
    """
    if sys.stdout is None:  # closed by who started this: nobody wants to read it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names that this terminal cannot show
    sys.excepthook = _without_abandoned_arrays(sys.excepthook)
    sys.unraisablehook = _without_abandoned_arrays(sys.unraisablehook)
    try:
        code = main(arguments)
        sys.stdout.flush()
    except Exception as error:
        code = 1
        if isinstance(error, BrokenPipeError) and any(map(_is_unread, (1, 2))):
            code = 128 + signal.SIGPIPE
        elif isinstance(error, OSError) and error.errno in NO_PLACE:
            print(f"{error.filename or 'output'}: {error.strerror}", file=sys.stderr, flush=True)
        else:
            sys.excepthook(*sys.exc_info())
    distributed.leave(code)
    if code:  # a compiler in another thread would hold up Python's own exit for minutes
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_unread(descriptor: int) -> bool:
    """Whether nobody can read any more what is written there."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


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
        heard = isinstance(error, Interrupted)  # in a callback of the collector; it is kept
        if not closed and not heard and not inspect.iscoroutine(origin):
            hook(*details)

    return filtered


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command that `arguments` name, by default `sys.argv[1:]`."""
    flags, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(flags)
    if options.command is None:
        unknown = [*unknown, *(f"--config.{key}" for key, _ in overrides)]
    if unknown:
        options.parser.error(f"unrecognized arguments: {_with_hints(unknown, options.parser)}")
    if options.command is None:
        parser.print_help()
        return 0
    programs.start(start_cache(_note), _note)
    try:
        return options.run(options, overrides)
    except UserError as error:
        print(f"{distributed.who()}{error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, UsageError) else 1
        distributed.leave(code, str(error))
        return code
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", reason):
            raise
        text = f"the device has not the memory: {reason.rstrip('.')}. {LESS_MEMORY}"
        print(f"{distributed.who()}{text}", file=sys.stderr, flush=True)
        distributed.leave(1, text)
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
    for command in COMMANDS:
        command.add(commands)
    return parser


def _with_hints(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    known = re.findall(r"--[\w-]+", parser.format_help())

    def hint(argument: str) -> str:
        if argument.startswith("--config."):
            return " (must be --config.KEY=VALUE)"
        return nearest(argument.partition("=")[0], known)

    return ", ".join(argument + hint(argument) for argument in unknown)


if __name__ == "__main__":
    run()
