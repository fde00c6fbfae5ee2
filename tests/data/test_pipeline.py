"""Batches: every example once an epoch, whatever the batch, the processes, threads or restarts."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.pipeline import (
    batch_indices,
    epoch_order,
    eval_batches,
    steps_at_epoch_end,
    train_batches,
)
from cnn_jax.data.sources import MemorySource, open_source
from cnn_jax.errors import UserError


def small_source(num_examples: int) -> MemorySource:
    """Images of one pixel; the label is the example's number."""
    info = DatasetInfo("small", "1", (1, 1, 1), num_examples, {"train": num_examples})
    labels = np.arange(num_examples, dtype=np.int32)
    return MemorySource(info, "train", (labels % 251).astype(np.uint8).reshape(-1, 1, 1, 1), labels)


def assert_same_batches(left, right):
    for one, other in itertools.zip_longest(left, right):
        np.testing.assert_equal(one, other)


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]),
        (0, 1, [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]),
        (7, 0, [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]),
    ],
)
def test_epoch_order_is_pinned(seed, epoch, expected):
    """A change here would make every interrupted run resume with other examples."""
    assert epoch_order(10, seed, epoch).tolist() == expected


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 2**31))
def test_epoch_order_sorts_raw_philox(num_examples, seed, epoch):
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    assert epoch_order(num_examples, seed, epoch).tolist() == sorted(
        range(num_examples), key=raw.tolist().__getitem__
    )


def test_epoch_order_cannot_be_spoiled():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 1


class Asked(MemorySource):
    """Notes the numbers of the examples that it is asked for."""

    def batch(self, indices, epochs=None):
        self.__dict__.setdefault("numbers", []).extend(indices.tolist())
        return super().batch(indices, epochs)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_process_asks_for_its_piece_of_each_batch_and_no_other_example(processes):
    small, size = small_source(50), 8 // processes
    whole = [batch_indices(50, batch_size=8, seed=3, step=step)[0].tolist() for step in range(2, 9)]
    of_all = []
    for index in range(processes):
        place = {"process_index": index, "process_count": processes, "num_threads": 1}
        trained, tested = (Asked(small.info, "train", small.images, small.labels) for _ in "ab")
        list(train_batches(trained, batch_size=8, seed=3, start_step=2, stop_step=9, **place))
        list(eval_batches(tested, batch_size=8, **place))
        piece = slice(size * index, size * (index + 1))
        assert vars(trained)["numbers"] == list(itertools.chain(*(each[piece] for each in whole)))
        of_all += set(vars(tested)["numbers"])
    padding = of_all.count(49) - 1  # the last example stands in for those that are not there
    assert sorted(of_all) == sorted([*range(50), *[49] * padding])


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 5), st.integers(1, 4))
def test_epochs_follow_one_another_without_loss(num_examples, batch_size, seed, epochs):
    wanted = [
        (example, epoch)
        for epoch in range(epochs)
        for example in epoch_order(num_examples, seed, epoch).tolist()
    ]
    steps = -(-len(wanted) // batch_size)
    seen = []
    for step in range(steps):
        index, epoch = batch_indices(num_examples, batch_size=batch_size, seed=seed, step=step)
        assert index.dtype == epoch.dtype == np.int32
        seen += zip(index.tolist(), epoch.tolist(), strict=True)
    assert seen[: len(wanted)] == wanted
    for epoch in range(epochs):
        assert sorted(i for i, e in seen[: len(wanted)] if e == epoch) == list(range(num_examples))


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 10))
def test_steps_at_epoch_end(num_examples, batch_size, epochs):
    steps = steps_at_epoch_end(epochs, num_examples=num_examples, batch_size=batch_size)
    assert steps * batch_size <= epochs * num_examples < (steps + 1) * batch_size


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 3, 4]), st.integers(0, 1000))
def test_processes_together_are_one_process(num_examples, per_process, processes, start):
    source = small_source(num_examples)
    arguments = {
        "batch_size": per_process * processes,
        "seed": 1,
        "start_step": start,
        "stop_step": start + 3,
    }
    parts = [
        train_batches(source, **arguments, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    whole = list(train_batches(source, **arguments))
    assert len(whole) == 3
    for batch, *pieces in zip(whole, *parts, strict=True):
        for key in ("image", "label", "index", "epoch"):
            assert {piece[key].shape[0] for piece in pieces} == {per_process}
            np.testing.assert_array_equal(
                np.concatenate([piece[key] for piece in pieces]), batch[key]
            )


def test_train_batch_holds_the_examples_it_names():
    source = small_source(300)
    batches = train_batches(source, batch_size=64, seed=5, start_step=3, stop_step=9)
    for step, batch in enumerate(batches, start=3):
        index, epoch = batch_indices(300, batch_size=64, seed=5, step=step)
        np.testing.assert_equal(batch, {**source.batch(index), "index": index, "epoch": epoch})
        np.testing.assert_array_equal(batch["label"], index)


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
def test_threads_change_nothing(num_threads):
    arguments = {"batch_size": 32, "seed": 2, "start_step": 0, "stop_step": 40}
    source = small_source(100)
    assert_same_batches(
        train_batches(source, **arguments, num_threads=0),
        train_batches(source, **arguments, num_threads=num_threads, prefetch=3),
    )


@pytest.mark.parametrize("resume", [0, 1, 17, 39, 40])
def test_resuming_gives_the_same_batches(resume):
    source = small_source(100)
    whole = train_batches(source, batch_size=32, seed=2, start_step=0, stop_step=40)
    rest = train_batches(source, batch_size=32, seed=2, start_step=resume, stop_step=40)
    assert_same_batches(itertools.islice(whole, resume, None), rest)


def test_far_steps_cost_nothing():
    batches = train_batches(
        small_source(100), batch_size=128, seed=0, start_step=10**7, stop_step=10**12
    )
    assert next(batches)["epoch"].tolist() == [12_800_000] * 100 + [12_800_001] * 28
    batches.close()


@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=20, deadline=None)
def test_evaluation_sees_every_example_once(num_examples, per_process, processes):
    source = small_source(num_examples)
    seen = []
    counts = set()
    for process in range(processes):
        batches = list(
            eval_batches(
                source,
                batch_size=per_process * processes,
                process_index=process,
                process_count=processes,
            )
        )
        counts.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (per_process, 1, 1, 1)
            assert batch["mask"].dtype == np.float32
            assert set(batch["mask"].tolist()) <= {0.0, 1.0}
            seen += batch["label"][batch["mask"] == 1].tolist()
    assert len(counts) == 1
    assert sorted(seen) == list(range(num_examples))


def test_evaluation_is_in_order_and_padded_at_the_end():
    batches = list(eval_batches(small_source(10), batch_size=4))
    assert [batch["mask"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert np.concatenate([batch["label"] for batch in batches])[:10].tolist() == list(range(10))


def test_batch_must_divide_by_processes():
    message = "batch_size 10 does not divide by the number of processes, 4"
    with pytest.raises(UserError, match=message):
        eval_batches(small_source(10), batch_size=10, process_count=4)
    with pytest.raises(UserError, match=message):
        train_batches(
            small_source(10), batch_size=10, seed=0, start_step=0, stop_step=1, process_count=4
        )


@pytest.mark.parametrize("num_threads", [0, 2])
def test_damage_arrives_as_a_user_error(own_prepared_dir, num_threads):
    (path,) = own_prepared_dir.rglob("*-train.array_record*")
    data = bytearray(path.read_bytes())
    for place in range(1000, len(data) // 2, 5000):  # the end is looked at when it is opened
        data[place] ^= 1
    path.write_bytes(data)
    source = open_source(
        "fashion_mnist_10k", "train", data_dir=str(own_prepared_dir), memory_limit_mb=0
    )
    batches = train_batches(
        source, batch_size=8, seed=0, start_step=0, stop_step=100, num_threads=num_threads
    )
    with pytest.raises(UserError, match="is damaged: record"):
        next(batches)
    batches.close()


def test_records_and_memory_give_the_same_batches(prepared_dir):
    memory, records = (
        open_source("fashion_mnist_10k", "test", data_dir=str(prepared_dir), memory_limit_mb=limit)
        for limit in (1024, 0)
    )
    arguments = {"batch_size": 128, "seed": 0, "start_step": 10, "stop_step": 20}
    assert_same_batches(train_batches(memory, **arguments), train_batches(records, **arguments))


@pytest.mark.parametrize(("num_threads", "prefetch", "ahead"), [(1, 1, 2), (1, 4, 4), (3, 1, 3)])
def test_so_many_batches_are_ahead_of_the_one_asked_for(num_threads, prefetch, ahead):
    """However long the step takes."""
    source = Asked(**vars(small_source(400)))

    def asked() -> int:
        return len(source.__dict__.get("numbers", ()))

    steps = {"batch_size": 4, "seed": 0, "start_step": 0, "stop_step": 100}
    batches = train_batches(source, **steps, num_threads=num_threads, prefetch=prefetch)
    for taken in range(3):
        deadline = time.monotonic() + 30
        while asked() < 4 * (taken + ahead) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert asked() == 4 * (taken + ahead)
        next(batches)
    batches.close()


def test_close_stops_the_threads():
    def prefetching() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = prefetching()
    batches = train_batches(
        small_source(100), batch_size=8, seed=0, start_step=0, stop_step=10**9, num_threads=2
    )
    next(batches)
    started = [thread for thread in prefetching() if thread not in before]
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()
