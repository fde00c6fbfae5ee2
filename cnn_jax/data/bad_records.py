"""What stands in for a record that cannot be read."""

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.sources import Source, open_source, read_into_memory
from cnn_jax.errors import UserError

LIMIT = 100
"""Damaged records one behind the other that are a file gone, not records gone bad."""


@dataclasses.dataclass(frozen=True)
class SkipBadRecords:
    """A source without its damaged records: the next good one, by number, stands in for each.

    So what a batch holds still follows from its numbers alone, on any number of threads and after
    any restart. Training sees the stand-in once more in that epoch; an evaluation leaves it out.

    Attributes:
      source: raises UserError for a damaged record.
      log: receives one line for each, naming it.
      bad: why each damaged record that was met cannot be read, by number.
      known: those of `bad` that every process of the run knows.
    """

    source: Source
    log: Callable[[str], None] = print
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    known: set[int] = dataclasses.field(default_factory=set)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def info(self) -> DatasetInfo:
        return self.source.info

    @property
    def split(self) -> str:
        return self.source.split

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns the numbered examples, or what stands in for them.

        Raises UserError where `LIMIT` records one behind the other are damaged.
        """
        try:
            return self.source.batch(indices, epochs)
        except UserError:  # find out which
            examples = [
                self._good_from(int(index), None if epochs is None else epochs[place : place + 1])
                for place, index in enumerate(indices)
            ]
            return {name: np.concatenate([each[name] for each in examples]) for name in examples[0]}

    def classes(self, indices: np.ndarray) -> np.ndarray:
        return self.source.classes(indices)

    def is_good(self, indices: np.ndarray) -> np.ndarray:
        """Returns which of the numbered examples, read before, are their own, bool [n]."""
        return np.array([int(index) not in self.bad for index in indices])

    def news(self) -> dict[str, str]:
        """Returns why records cannot be read that not every process knows, by number, for JSON."""
        with self._lock:
            return {str(n): why for n, why in self.bad.items() if n not in self.known}

    def learn(self, records: Mapping[str, str]) -> None:
        """Takes up what every process knows from now on, and tells what is new here."""
        for number, why in records.items():
            self._note(int(number), why)
        self.remember(records)

    def remember(self, records: Mapping[str, str]) -> None:
        """Takes up what every process knows, and was told before."""
        with self._lock:
            self.bad.update({int(number): why for number, why in records.items()})
            self.known.update(map(int, records))

    def _good_from(self, index: int, epoch: np.ndarray | None) -> dict[str, np.ndarray]:
        for number in range(index, index + min(LIMIT, len(self))):
            try:
                return self.source.batch(np.array([number % len(self)]), epoch)
            except UserError as error:
                self._note(number % len(self), str(error))
        raise UserError(
            f"{LIMIT} records one behind the other are damaged, so none is skipped; the first: "
            f"{self.bad[index]}"
        )

    def _note(self, number: int, why: str) -> None:
        with self._lock:
            if number not in self.bad:
                self.bad[number] = why
                self.log(f"record skipped, the next good one stands in: {why}")


def open_without_bad_records(
    name: str, split: str, *, memory_limit_mb: int, log: Callable[[str], None], **options: Any
) -> SkipBadRecords:
    """Returns what `open_source` does of the same arguments, damaged records skipped."""
    source = SkipBadRecords(open_source(name, split, memory_limit_mb=0, log=log, **options), log)
    size = len(source) * math.prod(source.info.image_shape)
    if source.info.has_one_size and size <= memory_limit_mb * 2**20:
        return dataclasses.replace(source, source=read_into_memory(source))
    return source
