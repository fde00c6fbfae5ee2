"""What times of windows say, when they may be kept, and when sides agree."""

import math
import os

import numpy as np
import pytest

from cnn_jax.benchmarking import machine, windows
from cnn_jax.benchmarking.machine import Activity
from cnn_jax.benchmarking.windows import Times
from cnn_jax.errors import UserError


class FakeSide:
    """A side whose steps take and give what it is told."""

    def __init__(self, name, results=(), seconds=1.0, platform="cpu", log=None):
        self.name, self.process = name, os.getpid()
        self.facts = {"platform": platform}
        self._results, self._seconds, self._log = results, seconds, log

    def results(self, count):
        return list(self._results)[:count]

    def window(self, count):
        if self._log is not None:
            self._log.append((self.name, count))
        return self._seconds


def test_median_and_quartiles_are_numpys():
    seconds = np.random.default_rng(0).uniform(1, 2, 9)
    times = Times(seconds.tolist())
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    assert times.median == pytest.approx(middle)
    assert times.spread == pytest.approx((high - low) / middle)


def test_times_are_refused_by_their_scatter_or_the_load():
    steady, scattered = Times([1.0, 1.01, 1.02, 1.03, 1.04]), Times([1.0, 1.1, 1.2, 1.3, 1.4])
    assert windows.objections({"ours": steady}, 0.05) == []
    assert windows.objections({"ours": steady}, None) == []
    (scatter,) = windows.objections({"ours": steady, "torch": scattered}, 0.0)
    assert "torch have an interquartile range of 16.7%" in scatter
    (load,) = windows.objections({"ours": steady}, 0.3)
    assert "other processes took 30% of the machine" in load


@pytest.mark.parametrize(
    ("platform", "seconds", "steps"), [("cpu", 2.0, 3), ("gpu", 0.1, 50), ("cpu", 0.004, 250)]
)
def test_sides_take_turns_in_windows_that_are_long_enough(platform, seconds, steps):
    log = []
    sides = [FakeSide(name, (), seconds, platform, log) for name in ("ours", "linen")]
    times, _ = windows.take_turns(sides, windows=5, steps=None)
    assert log[2:] == [("ours", steps), ("linen", steps)] * 5
    assert times["linen"].seconds == [seconds] * 5


@pytest.mark.parametrize("wrong", [[7.0, 6.0, 5.0, 4.0, 3.1], [7.0, 6.0, 5.0, 4.0, math.nan]])
def test_a_side_that_computes_something_else_is_refused(wrong):
    right = [7.0, 6.0, 5.0, 4.0, 3.0]
    sides = [FakeSide("ours", right), FakeSide("linen", [*right[:4], 3.001])]
    assert windows.compare(sides, "float32")["linen"][4] == 3.001
    with pytest.raises(UserError, match=r"torch computes something else.*not \[7.0, 6.0"):
        windows.compare([*sides, FakeSide("torch", wrong)], "float32")


def test_the_share_of_others_is_what_neither_we_nor_idleness_took(monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    before = Activity(wall=100.0, busy=50.0, own=5.0)
    assert Activity(110.0, 70.0, 13.0).share_of_others(before) == pytest.approx(12 / 40)
    assert Activity(110.0, 57.0, 13.0).share_of_others(before) == 0
    assert Activity(110.0, None, 13.0).share_of_others(before) is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux tells")
def test_processor_time_is_that_of_the_process():
    own = sum(os.times()[:2])
    assert Activity.now([]).own == pytest.approx(own, abs=0.1)
    assert Activity.now([]).busy >= own
