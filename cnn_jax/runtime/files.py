"""Files that are whole or absent."""

import os
from pathlib import Path


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes a file that exists whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
