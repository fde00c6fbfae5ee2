"""Batches: who is in which, what is refused, and that each gets its own result."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cnn_jax.serving.batching import Batcher, FullError, batch_sizes, padded

FOR_EVER = 3600.0


class Squares:
    """Computes squares and remembers the batches; while `gate` is closed it does not end."""

    def __init__(self):
        self.batches = []
        self.threads = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.batches.append(list(items))
        self.threads.add(threading.current_thread())
        assert self.gate.wait(60)
        if None in items:
            raise ValueError("no number")
        return [item**2 for item in items]


def with_batcher(use, **options):
    """Runs `use(batcher, squares)` while the batcher runs; returns the squares."""
    squares = Squares()

    async def main(executor):
        settings = {"max_batch": 4, "max_delay": FOR_EVER, "max_places": 8} | options
        batcher = Batcher(squares, executor=executor, **settings)
        running = asyncio.create_task(batcher.run())
        async with asyncio.timeout(60):
            await use(batcher, squares)
        running.cancel()

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(main(executor))
    return squares


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_a_full_batch_waits_for_nothing_and_each_gets_its_own():
    async def use(batcher, squares):
        results = await asyncio.gather(*(batcher.submit([n]) for n in range(8)))
        assert results == [[n**2] for n in range(8)]

    squares = with_batcher(use)
    assert squares.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(squares.threads) == 1


def test_several_items_of_one_request_may_be_in_several_batches():
    async def use(batcher, squares):
        assert await batcher.submit(range(8)) == [n**2 for n in range(8)]

    assert with_batcher(use).batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_batch_that_is_not_full_begins_after_the_delay():
    async def use(batcher, squares):
        assert await batcher.submit([5, 6]) == [25, 36]

    assert with_batcher(use, max_delay=0.01).batches == [[5, 6]]
    assert with_batcher(use, max_delay=0.0).batches == [[5, 6]]


def test_what_comes_during_a_computation_is_one_batch_after_it():
    async def use(batcher, squares):
        squares.gate.clear()
        first = asyncio.create_task(batcher.submit([1]))
        await until(lambda: squares.batches)
        assert 0 < batcher.computing_for < batcher.computing_for
        others = [asyncio.create_task(batcher.submit([n])) for n in (2, 3)]
        await until(lambda: batcher.waiting == 2)
        squares.gate.set()
        assert await asyncio.gather(first, *others) == [[1], [4], [9]]
        await until(lambda: batcher.computing_for == 0)

    assert with_batcher(use, max_delay=0.0).batches == [[1], [2, 3]]


def test_a_hurry_ends_the_delay():
    async def use(batcher, squares):
        waiting = asyncio.create_task(batcher.submit([3]))
        await until(lambda: batcher.waiting)
        batcher.hurry()
        assert await waiting == [9]
        assert await batcher.submit([4]) == [16]

    assert with_batcher(use).batches == [[3], [4]]


def test_places_are_refused_when_taken_and_free_again():
    async def use(batcher, squares):
        with batcher.places(7):
            assert not batcher.full
            with pytest.raises(FullError), batcher.places(2):
                pass
            with batcher.places(1):
                assert batcher.full
                with pytest.raises(FullError), batcher.places(1):
                    pass
        with batcher.places(8):
            pass

    with_batcher(use)


def test_an_error_is_that_of_its_batch_alone():
    async def use(batcher, squares):
        outcomes = await asyncio.gather(
            *(batcher.submit([item]) for item in (1, None, 2, 3, 4, 5, 6, 7)),
            return_exceptions=True,
        )
        assert [str(each) for each in outcomes[:4]] == ["no number"] * 4
        assert outcomes[4:] == [[16], [25], [36], [49]]

    with_batcher(use)


def test_a_client_that_has_gone_changes_nothing_for_the_others():
    async def use(batcher, squares):
        gone = asyncio.create_task(batcher.submit([1]))
        await until(lambda: batcher.waiting)
        gone.cancel()
        assert await batcher.submit([2, 3, 4]) == [4, 9, 16]

    assert with_batcher(use).batches == [[1, 2, 3, 4]]


def test_batches_are_observed():
    seen = []

    async def use(batcher, squares):
        assert batcher.patience == 0
        with batcher.places(6):
            await batcher.submit(range(4))
            assert batcher.patience == pytest.approx(seen[0][1] * 6 / 4)

    with_batcher(use, observe=lambda *each: seen.append(each))
    assert [items for items, _ in seen] == [4]


def test_two_batchers_take_turns_in_one_thread():
    async def use(batcher, squares):
        squares.gate.clear()
        tasks = [asyncio.create_task(batcher.submit([1]))]
        await until(lambda: squares.batches)
        other = Batcher(squares, max_batch=1, max_delay=0, max_places=9, executor=batcher._executor)
        running = asyncio.create_task(other.run())
        tasks += [asyncio.create_task(other.submit([n])) for n in (10, 20)]
        await until(lambda: other.waiting == 1)
        tasks += [asyncio.create_task(batcher.submit([n])) for n in (2, 3)]
        await until(lambda: batcher.waiting == 2)
        squares.gate.set()
        await asyncio.gather(*tasks)
        running.cancel()

    squares = with_batcher(use, max_delay=0.0)
    assert squares.batches == [[1], [10], [2, 3], [20]]
    assert len(squares.threads) == 1


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_sizes_to_compile(largest, sizes):
    assert batch_sizes(largest) == sizes


def test_the_smallest_program_that_holds_them_is_padded_with_zeros():
    given = {}

    def program(size):
        def sums(images):
            given[size] = images
            return images.sum(axis=(1, 2, 3), dtype=np.int64)

        return sums

    images = list(np.random.default_rng(0).integers(1, 256, (3, 4, 5, 1), np.uint8))
    rows = padded({size: program(size) for size in (1, 2, 4, 8)}, images)
    assert rows == [image.sum(dtype=np.int64) for image in images]
    assert given.keys() == {4}
    assert given[4].dtype == np.uint8
    assert not given[4][3].any()
