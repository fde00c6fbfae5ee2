"""Files that are whole or absent."""

import os
from pathlib import Path

from cnn_jax.errors import UserError


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes a file that exists whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json_file(path: Path, text: str) -> None:
    """Writes the file that `--json` names; UserError where it is there or it cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--json {path}: is already there; name a file that is not") from error
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error}") from error
