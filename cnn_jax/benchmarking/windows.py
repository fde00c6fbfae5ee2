"""Turns taken in timing, what their times say, and whether they may be kept."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnn_jax.benchmarking.machine import LOADED, Activity
from cnn_jax.benchmarking.sides import Side
from cnn_jax.errors import UserError

STEPS = {"cpu": 3, "gpu": 50, "tpu": 50}
"""The least steps of a window."""

SECONDS = 1.0
"""The least time of a window, in steps of the fastest side."""

CHECKED = 5
"""Steps whose results are compared before anything is timed."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""How far results of two sides may be apart, as a share of the largest: rounding and no more."""

SPREAD = 0.05
"""The largest interquartile range of a time, as a share of its median, that may be kept."""


@dataclasses.dataclass(frozen=True)
class Times:
    """The seconds of a step, one for each window."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Returns the interquartile range as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def compare(sides: Sequence[Side], precision: str) -> dict[str, list[Any]]:
    """Returns the results of the first steps by side.

    Raises UserError where another side's are not those of the first.
    """
    results = {side.name: side.results(CHECKED) for side in sides}
    expected = np.asarray(results[sides[0].name])
    for name, found in results.items():
        error = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
        if not error <= TOLERANCE[precision]:  # nan is no agreement either
            shown = "" if expected.ndim > 1 else f": {found}, not {expected.tolist()}"
            raise UserError(
                f"{name} computes something else: its results of {CHECKED} steps differ by "
                f"{error:.1e} of the largest, more than {TOLERANCE[precision]}{shown}"
            )
    return results


def take_turns(
    sides: Sequence[Side], *, windows: int, steps: int | None
) -> tuple[dict[str, Times], float | None]:
    """Returns each side's times, A B A B, and the share of the machine that others took meanwhile.

    Without `steps`, a window has at least `STEPS` and lasts at least `SECONDS`.
    """
    once = min(side.window(1) for side in sides)
    least = STEPS[sides[0].facts["platform"]]
    steps = steps or max(least, math.ceil(SECONDS / once))
    processes = [side.process for side in sides]
    before = Activity.now(processes)
    seconds: Mapping[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(windows):
        for side in sides:
            seconds[side.name].append(side.window(steps))
    load = Activity.now(processes).share_of_others(before)
    return {name: Times(each) for name, each in seconds.items()}, load


def objections(times: Mapping[str, Times], load: float | None) -> list[str]:
    """Returns why these times should not be kept; nothing where they may."""
    found = [
        f"the times of {name} have an interquartile range of {each.spread:.1%} of their median; "
        f"at most {SPREAD:.0%} is steady"
        for name, each in times.items()
        if each.spread > SPREAD
    ]
    if load is not None and load > LOADED:
        found.append(
            f"other processes took {load:.0%} of the machine's time; at most {LOADED:.0%} is quiet"
        )
    return found
