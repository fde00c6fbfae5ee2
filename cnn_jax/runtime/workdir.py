"""The directory of one run: one run at a time, one configuration for its life."""

import contextlib
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cnn_jax.errors import UserError
from cnn_jax.runtime.distributed import is_first
from cnn_jax.storage import is_remote, reason, write_atomically

CONFIG = "config.json"
SKIPPED = "skipped.json"
OWNER = "owner.json"


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[Callable[[], None]]:
    """Makes the directory and holds it for this process, the first of its run.

    Object storage has no locks that end with their process: there the newest claim holds. The
    function that this gives claims it at the first call, and afterwards raises UserError where
    another process has claimed it since.

    Raises UserError where it cannot be written, or another process holds it.
    """
    if not is_first():
        yield lambda: None
        return
    if is_remote(directory):
        yield _Claim(directory)
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
        yield lambda: None
    finally:
        lock.release()


class _Claim:
    """A claim on a directory on object storage."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mine = {"host": platform.node(), "process": os.getpid(), "start": uuid.uuid4().hex}
        self._claimed = False

    def __call__(self) -> None:
        path = self._directory / OWNER
        if not self._claimed:
            write_atomically(path, json.dumps(self._mine) + "\n")
            self._claimed = True
            return
        try:
            owner = json.loads(path.read_text())
        except Exception as error:  # whichever way a client fails
            raise OSError(f"{path} cannot be read: {reason(error)}") from error
        if owner != self._mine:
            raise UserError(
                f"{self._directory}: process {owner['process']} of {owner['host']} has begun to "
                "train there after this one, which ends and leaves the directory to it"
            )


def has_checkpoint(directory: Path) -> bool:
    """Returns whether a run in the directory has come to its first checkpoint.

    Raises UserError where that cannot be seen.
    """
    try:
        return any((directory / "checkpoints").glob("[0-9]*/manifest.json"))
    except Exception as error:
        raise UserError(f"--workdir {directory}: cannot be read: {reason(error)}") from error


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
        cure = "choose another --workdir"
        if has_checkpoint(directory):
            cure = "delete it: the checkpoints beside it hold the same values"
        raise UserError(f"{path} is damaged; {cure}")
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
