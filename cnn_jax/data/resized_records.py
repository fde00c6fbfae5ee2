"""Images made smaller once, kept in array_record files: for machines with few cores.

A record is the class, 4 bytes with the least first, and the encoded image. `FACTS` beside the files
says what they hold; it appears when all of them are whole.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.data.found_images import Found
from cnn_jax.data.record_files import RecordFiles, Shard
from cnn_jax.data.sources import ImageSource
from cnn_jax.errors import UserError
from cnn_jax.storage import write_atomically

FACTS = "cnn_jax_records.json"
UNFINISHED = f"{FACTS}.unfinished"
IMAGES_IN_A_FILE = 8192
QUALITY = 95


class RecordImages:
    """The encoded images of a split."""

    def __init__(self, shards: Sequence[Shard]):
        self._records = RecordFiles(shards)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return self._records.name(index)

    def read(self, index: int) -> tuple[bytes, int]:
        record = self._records[index]
        return record[4:], _class_of(record)

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        return self._records.classes(numbers, _class_of)


def _class_of(record: bytes) -> int:
    return int.from_bytes(record[:4], "little")


def find_records(directory: Path) -> Found:
    """Returns the images in `directory`, which `write_records` wrote.

    Raises UserError where there are none, not all, or a file is missing or damaged.
    """
    if not (directory / FACTS).exists():
        unfinished = (directory / UNFINISHED).exists()
        raise UserError(
            f"{directory} holds no {FACTS}"
            + (": the same `data prepare` again finishes what it began there" if unfinished else "")
        )
    facts = _read(directory / FACTS)
    return Found(
        tuple(facts["class_names"]),
        {
            split: RecordImages(
                [Shard(str(_file(directory, split, n)), size) for n, size in enumerate(sizes)]
            )
            for split, sizes in facts["splits"].items()
        },
    )


def _read(path: Path) -> dict[str, Any]:
    """Returns the facts in a file; raises UserError where they are not what was written."""
    try:
        facts = json.loads(path.read_text())
        splits = {split: list(map(int, sizes)) for split, sizes in facts["splits"].items()}
        return {**facts, "splits": splits, "class_names": list(map(str, facts["class_names"]))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): delete its directory and prepare it again"
        ) from error


def write_records(
    sources: Mapping[str, ImageSource],
    directory: Path,
    *,
    shorter_side: int,
    num_threads: int,
    advance: Callable[[int], None],
    images_in_a_file: int = IMAGES_IN_A_FILE,
) -> None:
    """Writes the images of each split, their shorter side at most `shorter_side` pixels.

    Killed and called again it goes on after the last whole file. `advance` is told how many images
    have been done.

    Raises:
      UserError: an image is damaged, or `directory` holds what another call has begun.
      OSError: a file cannot be written.
    """
    infos = [source.info for source in sources.values()]
    parts = {
        split: [
            range(start, min(start + images_in_a_file, len(source)))
            for start in range(0, len(source), images_in_a_file)
        ]
        for split, source in sources.items()
    }
    facts: dict[str, Any] = {
        "of": infos[0].name,
        "class_names": list(infos[0].class_names) or list(map(str, range(infos[0].num_classes))),
        "shorter_side": shorter_side,
        "splits": {split: [len(part) for part in ranges] for split, ranges in parts.items()},
        "first": {split: source.name(0) for split, source in sources.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / FACTS).exists():
        _refuse_other(facts, directory / FACTS)
        return
    unfinished = directory / UNFINISHED
    if any(not path.name.startswith(UNFINISHED) for path in directory.iterdir()):
        if not unfinished.exists():
            raise UserError(f"{directory} is not empty: name one that is, or does not exist")
        _refuse_other(facts, unfinished)
    write_atomically(unfinished, json.dumps(facts, indent=1))
    with ThreadPoolExecutor(num_threads) as pool:
        for split, source in sources.items():
            for number, part in enumerate(parts[split]):
                file = _file(directory, split, number)
                if not file.exists():
                    _write_file(file, source, part, shorter_side, pool)
                advance(len(part))
    os.replace(unfinished, directory / FACTS)


def _refuse_other(facts: Mapping[str, Any], path: Path) -> None:
    before = _read(path)
    for key, value in facts.items():
        if before.get(key) != value:
            raise UserError(
                f"{path.parent} holds other images ({key} was {str(before.get(key))[:80]} and is "
                f"{str(value)[:80]} now): name another directory"
            )


def _file(directory: Path, split: str, number: int) -> Path:
    return directory / f"{split}-{number:05d}.array_record"


def _write_file(
    file: Path, source: ImageSource, part: range, shorter_side: int, pool: ThreadPoolExecutor
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    from cnn_jax.data.images import shrink

    def record(index: int) -> bytes:
        try:
            data, label = source.read(index)
            return label.to_bytes(4, "little") + shrink(data, shorter_side, quality=QUALITY)
        except (OSError, ValueError) as error:
            raise UserError(f"{source.name(index)}: {error}; data check names all") from error

    unfinished = file.with_suffix(".unfinished")
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # each can be read alone
    try:
        for start in range(part.start, part.stop, 256):
            for each in pool.map(record, range(start, min(start + 256, part.stop))):
                writer.write(each)
    finally:
        writer.close()
    os.replace(unfinished, file)
