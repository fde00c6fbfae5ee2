"""The directory of one run: one process at a time, one configuration for its life."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cnn_jax.errors import UserError
from cnn_jax.runtime.files import write_atomically


@contextlib.contextmanager
def claim(
    directory: Path,
    config: Mapping[str, Any],
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    accept_changes: bool,
) -> Iterator[None]:
    """Holds the directory for this process, and keeps `config` in its `config.json`.

    Raises UserError where it cannot be written, another process holds it, or the run was started
    with another configuration and `accept_changes` is not set.
    """
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
        path = directory / "config.json"
        changes = differences(json.loads(path.read_text()), config) if path.exists() else []
        if changes and not accept_changes:
            raise UserError(
                f"{directory} holds a run with another configuration:\n  "
                + "\n  ".join(changes)
                + "\nChoose another --workdir, or go on with the new values: "
                "--accept-config-changes"
            )
        if changes or not path.exists():
            write_atomically(path, json.dumps(config, indent=2) + "\n")
        yield
    finally:
        lock.release()
