"""How training images come to the step: streamed from the host, or from where they lie already.

Both give the same examples in the same order, a function of (seed, step, process).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np

from cnn_jax.data.bad_records import SkipBadRecords
from cnn_jax.data.pipeline import BatchIterator, batch_indices, train_batches
from cnn_jax.data.sources import ImageSource, MemorySource, Source, read_into_memory
from cnn_jax.data.stages import COPYING, Stages
from cnn_jax.plan import Phase, Plan
from cnn_jax.runtime.sharding import batch_sharding, to_devices
from cnn_jax.typing import Batch


class Feeding(Protocol):
    """Hands out what the training program takes beside the state, on the devices."""

    def fetch(self, step: int, count: int) -> Batch:
        """Returns the batch of the `count` steps that follow `step` steps."""
        ...

    def close(self) -> None:
        """Ends what prepares the next batches."""
        ...


def make_feeding(
    plan: Plan, source: Source, stages: Stages | None = None
) -> Callable[[int], Feeding]:
    """Returns a function that starts feeding from a step on; resident images are placed here.

    `stages` receives what the stages after the source take of what is streamed.
    """
    if not plan.resident:
        return lambda step: Streamed(plan, source, stages or Stages(), step)
    feeding = Resident(plan, source)
    return lambda step: feeding


class Streamed:
    """Batches that threads make ahead, from now on, of one step each, in order."""

    def __init__(self, plan: Plan, source: Source, stages: Stages, start_step: int) -> None:
        self._phases = _batches_of_phases(plan, source, stages, start_step)
        self._batches = next(self._phases)
        self._stages = stages
        self._sharding = batch_sharding(plan.mesh)

    def fetch(self, step: int, count: int) -> Batch:
        del step, count  # the next, and 1
        batch = next(self._batches, None)
        if batch is None:  # the phase has ended
            self._batches.close()
            self._batches = next(self._phases)
            batch = next(self._batches)
        with self._stages.measure(COPYING):
            return to_devices(batch, self._sharding)

    def close(self) -> None:
        self._batches.close()


def _batches_of_phases(
    plan: Plan, source: Source, stages: Stages, start_step: int
) -> Iterator[BatchIterator]:
    """Yields each phase's batches, this process's part of them, in the size of the phase."""
    config = plan.config
    ends = [*(phase.first_step for phase in plan.phases[1:]), plan.total_steps]
    for phase, end in zip(plan.phases, ends, strict=True):
        if start_step >= end and phase is not plan.phases[-1]:  # the last may have no step left
            continue
        yield train_batches(
            _of_size(source, phase),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=max(start_step, phase.first_step),
            stop_step=end,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            stages=stages,
        )


def _of_size(source: Source, phase: Phase) -> Source:
    """Returns the source with its images in the size of the phase, unless the step resizes them."""
    if source.info.has_one_size or source.info.image_shape == phase.image_shape:
        return source
    if isinstance(source, SkipBadRecords):
        return dataclasses.replace(source, source=_of_size(source.source, phase))
    if isinstance(source, ImageSource):
        return source.resized(phase.image_shape[0])
    raise TypeError(f"{type(source).__name__}: only an ImageSource has images of many sizes")


class Resident:
    """All examples on every device; a call is told which of them its steps take."""

    def __init__(self, plan: Plan, source: Source) -> None:
        self._plan = plan
        abstract = plan.arguments(plan.phases[-1].name)["batch"]
        self._shardings = {name: each.sharding for name, each in abstract.items()}
        held = source if isinstance(source, MemorySource) else read_into_memory(source)
        examples = {"images": held.images, "labels": held.labels}
        self._examples = self._place(examples)  # of each process all, so all of it everywhere

    def fetch(self, step: int, count: int) -> Batch:
        plan = self._plan
        size = plan.config.batch_size // jax.process_count()
        part = range(size * jax.process_index(), size * (jax.process_index() + 1))
        order = np.zeros((2, plan.steps_per_call, size), np.int32)
        for number in range(count):
            order[:, number] = batch_indices(
                plan.train_examples,
                batch_size=plan.config.batch_size,
                seed=plan.config.seed,
                step=step + number,
                part=part,
            )
        if plan.steps_per_call == 1:
            return self._examples | self._place({"index": order[0, 0], "epoch": order[1, 0]})
        names = {"index": order[0], "epoch": order[1], "count": np.array(count, np.int32)}
        return self._examples | self._place(names)

    def close(self) -> None:
        """Does nothing: the examples stay."""

    def _place(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(self._shardings[name], values)
            for name, values in arrays.items()
        }
