"""Stateless batches: which examples a step sees follows from (seed, step, process) alone.

So a run resumes from its step number and nothing else, on any number of processes or threads.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np

from cnn_jax.data.bad_records import SkipBadRecords
from cnn_jax.data.sources import Source
from cnn_jax.data.stages import BATCHING, Stages
from cnn_jax.errors import UserError


class BatchIterator(Protocol):
    """Batches that threads make ahead, from when it is made on; `close()` stops the threads."""

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order, int64 [num_examples], in which `epoch` visits the examples (read-only).

    It sorts raw random numbers because NumPy keeps the raw stream of a bit generator for ever,
    while `Generator.permutation` may change with a version.
    """
    key = np.array([seed, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_examples), kind="stable")
    order.setflags(write=False)
    return order


def steps_at_epoch_end(epochs: int, *, num_examples: int, batch_size: int) -> int:
    """Returns how many steps are done when `epochs` epochs have ended.

    Nothing is dropped: a batch may end one epoch and begin the next, and belongs to the next.
    """
    return epochs * num_examples // batch_size


def batch_indices(
    num_examples: int, *, batch_size: int, seed: int, step: int, part: range | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the example and the epoch, int32 each, of the positions `part` of a step's batch.

    Positions run on across epochs: position p of all is in epoch p // num_examples. `part` is
    counted within the global batch of `batch_size` and is all of it by default.
    """
    part = range(batch_size) if part is None else part
    positions = step * batch_size + np.arange(part.start, part.stop, dtype=np.int64)
    epochs, places = np.divmod(positions, num_examples)
    examples = np.empty_like(places)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        examples[now] = epoch_order(num_examples, seed, int(epoch))[places[now]]
    return examples.astype(np.int32), epochs.astype(np.int32)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
    stages: Stages | None = None,
) -> BatchIterator:
    """Returns an iterator over this process's part of the batches of the steps.

    A batch is `image` uint8 [b h w c], `label`, `index` (the example's number in the source) and
    `epoch`, int32 [b], with b = batch_size / process_count; the parts of all processes, one after
    the other, are the batch of one process. `stages` receives what making them takes.

    Raises:
      UserError: `batch_size` does not divide by `process_count`; while iterating, a damaged record.
    """
    part = _part(batch_size, process_index, process_count)
    stages = stages or Stages()

    def make_batch(step: int) -> dict[str, np.ndarray]:
        return train_batch(source, step, batch_size=batch_size, seed=seed, part=part, stages=stages)

    return _iterate(make_batch, range(start_step, stop_step), num_threads, prefetch)


def train_batch(
    source: Source,
    step: int,
    *,
    batch_size: int,
    seed: int,
    part: range | None = None,
    stages: Stages,
) -> dict[str, np.ndarray]:
    """Returns the positions `part` of a step's batch, by default all, as in `train_batches`."""
    with stages.measure(BATCHING):
        index, epoch = batch_indices(
            len(source), batch_size=batch_size, seed=seed, step=step, part=part
        )
        return {**source.batch(index, epoch), "index": index, "epoch": epoch}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> BatchIterator:
    """Returns an iterator over this process's part of all examples, in order, each exactly once.

    A batch is `image` uint8 [b h w c], `label` int32 [b] and `mask` float32 [b], 1 for an example
    and 0 for the padding or what stands in for a damaged one, with b = batch_size / process_count.
    Every process gets the same number of batches, all of one shape.

    Raises:
      UserError: `batch_size` does not divide by `process_count`; while iterating, a damaged record.
    """
    part = _part(batch_size, process_index, process_count)
    num_examples = len(source)

    def make_batch(batch_number: int) -> dict[str, np.ndarray]:
        index = batch_number * batch_size + np.arange(part.start, part.stop, dtype=np.int64)
        number = np.minimum(index, num_examples - 1)
        batch = source.batch(number)
        counts = index < num_examples
        if isinstance(source, SkipBadRecords):
            counts &= source.is_good(number)
        return {**batch, "mask": counts.astype(np.float32)}

    num_batches = -(-num_examples // batch_size)
    return _iterate(make_batch, range(num_batches), num_threads, prefetch)


def batches_ahead(*, num_threads: int, prefetch: int) -> int:
    """Returns how many batches are made or being made before one is asked for.

    They are two at least, so that one is there while the next is made, and one for each thread.
    """
    return max(prefetch, num_threads, 2)


def _part(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide by the number of processes, {process_count}"
        )
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _iterate(
    make_batch: Callable[[int], dict[str, np.ndarray]],
    numbers: range,
    num_threads: int,
    prefetch: int,
) -> BatchIterator:
    import grain

    def named(number: int) -> dict[str, np.ndarray]:
        try:
            return make_batch(number)
        except UserError:
            raise
        except BaseException as error:  # SystemExit too, which would end the run without a word
            raise UserError(
                f"a thread that makes batches died at batch {number} of the data: "
                f"{type(error).__name__}: {error}. The same command starts again from the newest "
                "checkpoint"
            ) from error

    # One element is one batch: grain spends more on an element than NumPy on a small image.
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(named)
    options = grain.ReadOptions(
        num_threads=num_threads,
        prefetch_buffer_size=batches_ahead(num_threads=num_threads, prefetch=prefetch),
    )
    iterator = iter(batches.to_iter_dataset(options))
    iterator.start_prefetch()
    return iterator
