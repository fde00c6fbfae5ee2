"""What the stages between files and the device take, and which of them limits."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

READING, DECODING, BATCHING = "reading", "decoding", "batching"
"""Bytes out of files; pixels out of bytes, cropped and resized; and what else makes a batch."""

COPYING = "copying to the device"

STEP = "the step"

HOST = "the host"
"""It hands over steps more slowly than the device takes them."""

WAITS = 0.05
"""The share of the training time that the device waits, above which the data limit."""


class Stages:
    """Adds up what each stage takes, in all threads together."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds the seconds until the block is left; those of `BATCHING` have the others in them."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self._seconds[stage] += seconds

    def clear(self) -> None:
        """Begins anew."""
        with self._lock:
            self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """Returns what each stage has taken by itself."""
        with self._lock:
            found = dict(self._seconds)
        if BATCHING in found:
            inside = sum(found.get(stage, 0.0) for stage in (READING, DECODING))
            found[BATCHING] = max(0.0, found[BATCHING] - inside)
        return found


def slowest(seconds: Mapping[str, float], *, num_threads: int) -> str:
    """Returns the stage that takes longest where `num_threads` share all but the copying."""
    return max(seconds, key=lambda stage: seconds[stage] / (1 if stage == COPYING else num_threads))


def limit(
    seconds: Mapping[str, float], *, waiting: float, training: float, num_threads: int
) -> str:
    """Returns what limits a training: `STEP`, or a stage if the device waited for data.

    `waiting` and `training` are seconds, the first a part of the second. Images that lie on the
    device have no stages; if it waited, then for its next step, so `HOST` limits.
    """
    if waiting <= WAITS * training:
        return STEP
    return slowest(seconds, num_threads=num_threads) if seconds else HOST
