"""Files that grow, and files that a flag names."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.storage import is_remote, write_atomically

UPLOAD_PERIOD = 30
"""Seconds for which a file on object storage may lag behind, where nothing asks for it."""


class GrowingFile:
    """A file that is added to; what is written is on its way to the disk when `write` returns.

    An object cannot grow. There it is written again, whole, by `sync` and every `UPLOAD_PERIOD`.
    """

    def __init__(
        self, path: Path, begin: bytes = b"", *, confirm: Callable[[], None] = lambda: None
    ) -> None:
        """Opens the file, which holds `begin` from now on, whatever it held.

        `confirm` is called before an object is written, and raises where it is no longer this
        process's.
        """
        self._path = path
        self._confirm = confirm
        self._contents = bytearray(begin)
        self._synced = time.monotonic()
        self._file = None
        if is_remote(path):
            self._late = path.exists() or bool(begin)
            return
        if (path.read_bytes() if path.exists() else b"") != begin:
            write_atomically(path, begin)
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            self._file.flush()
            return
        self._contents += data
        self._late = True
        if time.monotonic() - self._synced > UPLOAD_PERIOD:
            self.sync()

    def sync(self) -> None:
        """Returns when all that was written survives the end of this machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        elif self._late:
            self._confirm()
            write_atomically(self._path, bytes(self._contents))
            self._synced, self._late = time.monotonic(), False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self.sync()


def refuse_existing(path: Path) -> None:
    """Raises UserError where there is something at `path`."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already and is left as it is. Choose another name")


def write_json_file(path: Path, text: str) -> None:
    """Writes the file that `--json` names; UserError where it is there or it cannot be written."""
    refuse_existing(path)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from error
