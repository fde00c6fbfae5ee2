"""The directory of one run: one run at a time, one configuration for its life."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cnn_jax.errors import UserError
from cnn_jax.runtime.distributed import is_first
from cnn_jax.runtime.files import write_atomically

CONFIG = "config.json"
SKIPPED = "skipped.json"


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process, the first of its run.

    Raises UserError where it cannot be written, or another process holds it.
    """
    if not is_first():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{directory} is in use by another process that trains there; wait for it or choose "
            "another --workdir"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}. Choose another --workdir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def read_config(directory: Path) -> dict[str, Any] | None:
    """Returns the configuration that the run in `directory` was started with, if there is one."""
    path = directory / CONFIG
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged. Delete it to go on, or choose another --workdir")
    return config


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Keeps the configuration of the run in its directory."""
    if is_first():
        write_atomically(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def read_skipped(directory: Path) -> dict[int, str]:
    """Returns the steps that the run does not train on, each with its reason.

    It spares a restart to find them again, which it would: a file that cannot be read is empty.
    """
    try:
        return {int(step): str(why) for step, why in json.loads(_text(directory / SKIPPED)).items()}
    except (ValueError, AttributeError):
        return {}


def write_skipped(directory: Path, skipped: Mapping[int, str]) -> None:
    """Keeps the steps that the run does not train on in its directory."""
    if is_first():
        write_atomically(directory / SKIPPED, json.dumps(skipped, indent=2) + "\n")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "{}"
