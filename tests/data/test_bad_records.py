"""Damaged records: what stands in for them, what is told, and what is never skipped."""

import numpy as np
import pytest

from cnn_jax.data.bad_records import LIMIT, SkipBadRecords
from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.pipeline import eval_batches, train_batches
from cnn_jax.errors import UserError

INFO = DatasetInfo("numbers", "1.0.0", (1, 1, 1), 7, {"train": 30})


class Numbers:
    """Example i is a pixel i of class i % 7; some cannot be read."""

    info, split = INFO, "train"

    def __init__(self, damaged, size=30):
        self.damaged, self.size = set(damaged), size

    def __len__(self):
        return self.size

    def batch(self, indices, epochs=None):
        for index in indices:
            if index in self.damaged:
                raise UserError(f"numbers.bin is damaged: record {index} cannot be read")
        return {
            "image": np.array(indices, np.uint8).reshape(-1, 1, 1, 1),
            "label": np.array(indices, np.int32) % 7,
        }

    def classes(self, indices):
        return indices % 7


def skipping(damaged, **options):
    lines = []
    return SkipBadRecords(Numbers(damaged, **options), lines.append), lines


def test_the_next_good_one_stands_in_whatever_was_asked_before():
    source, lines = skipping({4, 5, 29})
    expected = np.arange(30)
    expected[[4, 5, 29]] = 6, 6, 0
    whole = source.batch(np.arange(30))
    np.testing.assert_array_equal(whole["image"].ravel(), expected)
    np.testing.assert_array_equal(whole["label"], expected % 7)
    for index in reversed(range(30)):
        fresh, _ = skipping({4, 5, 29})
        assert fresh.batch(np.array([index]))["image"].item() == expected[index]
    assert sorted(source.bad) == [4, 5, 29]
    assert [line.split("record ")[-1].split()[0] for line in lines] == ["4", "5", "29"]
    source.batch(np.arange(30))
    assert len(lines) == 3, "each is told once"


def test_what_another_process_has_met_is_told_once_and_handed_on_no_more():
    source, lines = skipping({4, 5, 29})
    source.batch(np.array([4]))
    other = {"4": "known already", "9": "numbers.bin is damaged: record 9 cannot be read"}
    assert source.news().keys() == {"4", "5"}
    source.learn(source.news() | {"9": other["9"]})
    source.learn(other)
    source.remember({"12": "met by an earlier start"})
    assert source.news() == {}
    assert [line.split("record ")[-1].split()[0] for line in lines] == ["4", "5", "9"]
    source.batch(np.array([29]))
    assert source.news().keys() == {"29"}
    assert source.known == {4, 5, 9, 12}


@pytest.mark.parametrize("num_threads", [1, 4])
def test_training_goes_on_the_same_from_any_step(num_threads):
    options = {"batch_size": 8, "seed": 3, "stop_step": 11, "num_threads": num_threads}
    whole = list(train_batches(skipping({2, 17})[0], start_step=0, **options))
    later = list(train_batches(skipping({2, 17})[0], start_step=6, **options))
    for ours, theirs in zip(whole[6:], later, strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    images = np.concatenate([batch["image"].ravel() for batch in whole])
    indices = np.concatenate([batch["index"] for batch in whole])
    assert not {2, 17} & set(images.tolist())
    np.testing.assert_array_equal(images, np.where(np.isin(indices, [2, 17]), indices + 1, indices))


def test_an_evaluation_counts_every_good_one_once_and_no_other():
    batches = list(eval_batches(skipping({0, 3, 29})[0], batch_size=8))
    images = np.concatenate([batch["image"].ravel() for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert images[mask == 1].tolist() == [i for i in range(30) if i not in (0, 3, 29)]


def test_a_file_that_is_gone_is_not_skipped():
    source, _ = skipping(range(10, 10 + LIMIT), size=250)
    assert source.batch(np.array([11]))["image"].item() == 10 + LIMIT
    with pytest.raises(UserError, match=r"100 records one behind the other .* record 10 cannot"):
        source.batch(np.array([10]))
    with pytest.raises(UserError, match="damaged"):
        skipping(range(5), size=5)[0].batch(np.array([0]))


class DiesAt(Numbers):
    """A source whose thread dies at a record."""

    def __init__(self, index, error):
        super().__init__(())
        self.index, self.error = index, error

    def batch(self, indices, epochs=None):
        if self.index in indices:
            raise self.error
        return super().batch(indices, epochs)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "MemoryError: "),
        (OSError(5, "Input/output error"), r"OSError: \[Errno 5\] Input/output error"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_a_thread_that_dies_is_one_message(error, told):
    batches = train_batches(
        DiesAt(7, error), batch_size=5, seed=0, start_step=0, stop_step=6, num_threads=2
    )
    with pytest.raises(UserError, match=f"died at batch [0-5] of the data: {told}"):
        list(batches)
