"""array_record files as one sequence of records, each with its file and its place there."""

import contextlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.errors import UserError


@dataclass(frozen=True)
class Shard:
    """All records of a file; a TFDS file instruction says the same of a part of one."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


class RecordFiles:
    """The records of some files by number; safe to use from many threads."""

    def __init__(self, shards: Sequence[Any]):
        """Raises UserError where a file is missing, damaged, or holds another number of records."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        for number, shard in enumerate(shards):
            _check(shard, f"shard {number} of {len(shards)}")
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.take for shard in shards))
        self._records = ArrayRecordDataSource(list(shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[str, int]:
        """Returns the file of a record and its number there."""
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        return shard.filename, index - self._ends[number] + shard.take + shard.skip

    def name(self, index: int) -> str:
        """Returns the file of a record and its number there, for a person to find it."""
        return "{}: record {}".format(*self.place(index))

    def __getitem__(self, index: int) -> bytes:
        """Returns a record; raises ValueError where it is damaged."""
        try:
            return self._records[index]
        except Exception as error:  # array_record says it in several ways
            raise ValueError(f"damaged record ({error})") from error

    def many(self, indices: Sequence[int]) -> Sequence[bytes]:
        """Returns records, faster; raises whatever array_record does where one is damaged."""
        return self._records.__getitems__(indices)

    def classes(self, indices: np.ndarray, class_of: Callable[[bytes], int]) -> np.ndarray:
        """Returns what `class_of` finds in each record, int64 [n], and -1 where one is damaged."""
        numbers = indices.tolist()
        try:
            found = [class_of(record) for record in self.many(numbers)]
        except Exception:  # whichever way it failed, find the record
            found = [self._class(number, class_of) for number in numbers]
        return np.array(found, np.int64)

    def _class(self, number: int, class_of: Callable[[bytes], int]) -> int:
        with contextlib.suppress(Exception):
            return class_of(self[number])
        return -1


def _check(shard: Any, which: str) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    if not Path(shard.filename).is_file():
        raise UserError(f"{shard.filename}, {which}, is missing")
    try:
        reader = ArrayRecordReader(shard.filename)
        found = reader.num_records()
        reader.close()
    except Exception as error:  # it says it in several ways
        raise UserError(f"{shard.filename}, {which}, is damaged: {error}") from error
    if found != shard.examples_in_shard:
        raise UserError(
            f"{shard.filename}, {which}, is damaged: it holds {found} records where there were "
            f"{shard.examples_in_shard}"
        )
