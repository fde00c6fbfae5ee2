"""What the commands' flags have in common: their types, and how a command is added."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax import MODELS
from cnn_jax.errors import UserError, nearest
from cnn_jax.storage import place, reason


def add_command(
    commands: Any, name: str, run: Callable[..., int], **texts: str | None
) -> argparse.ArgumentParser:
    """Adds a command that `run` carries out; returns its parser."""
    parser = commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **texts,
    )
    parser.set_defaults(parser=parser, run=run)
    return parser


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.py")]
        raise argparse.ArgumentTypeError(f"no file {text!r}{nearest(text, siblings)}")
    return path


def existing_directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no directory {text!r}")
    return Path(text)


def existing_run(text: str) -> Path:
    directory = directory_or_url(text)
    try:
        exists = directory.is_dir()
    except Exception as error:  # whichever way a client of object storage fails
        raise argparse.ArgumentTypeError(f"{text}: cannot be read: {reason(error)}") from error
    if not exists:
        raise argparse.ArgumentTypeError(f"no directory {text!r}")
    return directory


def directory_or_url(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no directory")
    try:
        return place(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def new_file(text: str) -> Path:
    path = Path(text)
    if path.exists() or path.is_symlink():
        raise argparse.ArgumentTypeError(f"{text!r} is already there; name another file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: nothing can be written in {path.parent}")
    return path


def new_picture(text: str) -> Path:
    path = new_file(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r}: the name must end in .png")
    return path


def model_name(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"unknown model {text!r}{_hint_or_all(text, MODELS)}")
    return text


def _hint_or_all(name: str, known: Mapping[str, Any]) -> str:
    return nearest(name, known) or f"; known: {', '.join(known)}"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer >= 1")
    return int(text)


def names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def image_size(text: str) -> tuple[int, int]:
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be pixels >= 1, such as 224 or HEIGHTxWIDTH, such as 224x160"
        )
    return sides[0], sides[-1]


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which weights of which run."""
    parser.add_argument(
        "--workdir", metavar="RUN", type=existing_run, required=True, help="of the run"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="last",
        help="last, best (by test accuracy) or a step (default: last)",
    )
    add_ema(parser)


def add_ema(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that takes the moving averages of the weights."""
    parser.add_argument(
        "--ema",
        action="store_true",
        help="take the averaged weights of a run that keeps them (ema.decay above 0)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how images are read."""
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, default=64, help="images at once (default: 64)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=positive, default=2, help="that decode files (default: 2)"
    )


def refuse_overrides(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """Ends a command on a run that was given keys of a configuration."""
    if overrides:
        options.parser.error(f"--config.{overrides[0][0]}: the run has its configuration")
