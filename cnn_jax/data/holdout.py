"""A held-out part of a split, where a data set has no other split to test on."""

import dataclasses

import numpy as np

KEY = np.array([0x686F6C64, 0x6F757400], np.uint64)  # "holdout": no seed of a run decides it


@dataclasses.dataclass(frozen=True)
class Part:
    """What is held out of a split, `percent` of its examples, or what remains of it.

    Each example has a random number that follows from its own number alone, and those with the
    least are held out: the same in every run, of all classes whatever order the examples are in,
    and among those of any larger percentage.
    """

    percent: float
    held_out: bool

    def size(self, num_examples: int) -> int:
        """Returns how many examples it has, of so many."""
        count = round(num_examples * self.percent / 100)
        return count if self.held_out else num_examples - count

    def numbers(self, num_examples: int) -> np.ndarray:
        """Returns which examples it has, in order, int64."""
        raw = np.random.Philox(key=KEY).random_raw(num_examples)
        order = np.argsort(raw, kind="stable")
        count = num_examples - self.size(num_examples)
        return np.sort(order[: self.size(num_examples)] if self.held_out else order[count:])

    def name(self, split: str) -> str:
        """Returns such as "10 % of train" or "train without 10 %"."""
        percent = f"{self.percent:g} %"
        return f"{percent} of {split}" if self.held_out else f"{split} without {percent}"
