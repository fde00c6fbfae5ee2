"""Files that are whole or absent."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that exists whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
