"""Single items, computed together: up to a number of them, and after a delay at the latest."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np


class FullError(Exception):
    """There is no place for more items at the moment."""


class Batcher:
    """Computes items in batches, one batch at a time, in the order in which they came.

    A batch begins when `max_batch` items wait, or when the first of them has waited for
    `max_delay` seconds; what comes during a computation is in the next batch.

    Args:
      compute: returns one result for each of some items; `executor` runs it.
      max_batch: items that are computed together.
      max_delay: seconds that an item waits for others.
      max_places: items that may be under way at the same time, being prepared, waiting or computed.
      executor: with one thread; several batchers may share it, and take turns then.
      observe: is told the number of items of each batch and the seconds that it took.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_delay: float,
        max_places: int,
        executor: Executor,
        observe: Callable[[int, float], None] = lambda items, seconds: None,
    ) -> None:
        self._compute, self._executor, self._observe = compute, executor, observe
        self._max_batch, self._max_delay, self._max_places = max_batch, max_delay, max_places
        self._waiting: deque[tuple[float, Any, asyncio.Future[Any]]] = deque()
        self._arrived = asyncio.Event()
        self._taken = 0
        self._seconds = 0.0
        self._began: float | None = None

    @property
    def waiting(self) -> int:
        """The number of items that wait to be computed."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return self._taken >= self._max_places

    @property
    def computing_for(self) -> float:
        """The seconds since the batch that is under way began, or 0."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    @property
    def patience(self) -> float:
        """An estimate of the seconds after which all places are free, from the last batch."""
        return self._seconds * self._taken / self._max_batch

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Holds `count` places while it is entered; take them before preparing items.

        Raises FullError where they are not free.
        """
        if self._taken + count > self._max_places:
            raise FullError
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count

    async def submit(self, items: Sequence[Any]) -> list[Any]:
        """Returns the result of each item; raises what `compute` raised for their batch."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        now = loop.time()
        self._waiting.extend((now, *each) for each in zip(items, futures, strict=True))
        self._arrived.set()
        return await asyncio.gather(*futures)

    def hurry(self) -> None:
        """From now on, lets no item wait for others."""
        self._max_delay = 0.0
        self._arrived.set()

    async def run(self) -> None:
        """Computes what is submitted, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            self._began = time.perf_counter()
            items, waiting = [item for _, item, _ in batch], [future for _, _, future in batch]
            try:
                results = await loop.run_in_executor(self._executor, self._compute, items)
            except Exception as error:
                for future in waiting:
                    if not future.done():
                        future.set_exception(error)
            else:
                self._seconds = self.computing_for
                self._observe(len(batch), self._seconds)
                for future, result in zip(waiting, results, strict=True):
                    if not future.done():
                        future.set_result(result)
            self._began = None

    async def _next_batch(self) -> list[tuple[float, Any, asyncio.Future[Any]]]:
        while not self._waiting:
            await self._arrival()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0][0] + self._max_delay):
                while self._max_delay and len(self._waiting) < self._max_batch:
                    await self._arrival()
        return [self._waiting.popleft() for _ in range(min(self.waiting, self._max_batch))]

    async def _arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Returns the sizes to compile for batches of up to `max_batch`: powers of two, and itself."""
    return (*(2**k for k in range((max_batch - 1).bit_length())), max_batch)


def padded(
    programs: Mapping[int, Callable[[np.ndarray], Any]], images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns the rows of `images`, by the smallest of `programs` by batch size that holds them."""
    size = min(size for size in programs if size >= len(images))
    batch = np.zeros((size, *images[0].shape), images[0].dtype)
    batch[: len(images)] = images
    return list(np.asarray(programs[size](batch))[: len(images)])
