"""What data cost a training step: from the device, from the host, and not at all.

    python benchmarks/resident_feeding.py
    python benchmarks/resident_feeding.py --config configs/cifar10.py   # on an accelerator

One run, the ways in turn: `constant`, one batch that stays on the device; `streamed`, batches of
uint8 images in memory through threads; `resident N`, N steps a call on images that lie on the
device. Times are of one step, the median of the rounds, and as a multiple of `constant`, the
median of the rounds' quotients. The aim is at most 1.02 for the way that `auto` takes. On an
accelerator a profile then says for how much of a step the device was busy, and the rest, as a share
of that, is what dispatch costs: the aim is at most 0.03. The images are random; nothing is read.
Kept in benchmarks/results/resident_feeding_PLATFORM.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from seeds import processor

from cnn_jax.cli.config_files import load, split_overrides
from cnn_jax.config import override, parse
from cnn_jax.data.sources import MemorySource
from cnn_jax.feeding import make_feeding
from cnn_jax.plan import Plan, make_plan
from cnn_jax.runtime.compiler import compile_program, start_cache
from cnn_jax.runtime.platform import versions
from cnn_jax.typing import Batch

RESULTS = Path(__file__).parent / "results"


def source_for(plan: Plan) -> MemorySource:
    rng = np.random.default_rng(0)
    shape = (plan.train_examples, *plan.dataset.image_shape)
    images = rng.integers(256, size=shape, dtype=np.uint8)
    labels = rng.integers(plan.dataset.num_classes, size=shape[0], dtype=np.int32)
    return MemorySource(plan.dataset, plan.config.data.train_split, images, labels)


def way(plan: Plan, *, constant: bool = False) -> Callable[[int], float]:
    """Returns a function that takes so many steps and returns the seconds of one."""
    program = compile_program(plan.lower("train"), plan.compiler.options)
    start = make_feeding(plan, source_for(plan))
    state, key, step = plan.make_state(), plan.make_key(), 0
    count = plan.steps_per_call
    with contextlib.closing(start(0)) as feeding:
        kept = feeding.fetch(0, count) if constant else None

    def take(calls: int, fetch: Callable[[], Batch]) -> None:
        nonlocal state, step
        last = None
        for _ in range(calls):
            state, sums = program(state, fetch(), key)
            step += count
            jax.block_until_ready(last)  # as the trainer does: few calls under way
            last = sums
        jax.block_until_ready(state)

    def run(steps: int) -> float:
        with contextlib.closing(start(step)) if kept is None else contextlib.nullcontext() as feed:
            fetch = (lambda: kept) if feed is None else lambda: feed.fetch(step, count)
            take(1, fetch)  # unmeasured: the threads, if any, start
            began = time.perf_counter()
            take(steps // count, fetch)
            return (time.perf_counter() - began) / (steps // count * count)

    return run


def busy_seconds(run: Callable[[int], float], steps: int, count: int) -> float:
    """Returns for how long a step keeps a GPU busy, by a profile of calls of `count` steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = [
            (event.start_ns, event.start_ns + event.duration_ns)
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    busy, end = 0.0, 0.0
    for start, stop in sorted(events):  # streams overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e9 / (steps // count * count + count)  # with the unmeasured call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.py"))
    parser.add_argument("--steps", type=int, default=40, help="in a round of each way")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps-per-call", type=int, nargs="*", help="default: 1, 10 on a GPU")
    parser.add_argument("--output", type=Path)
    flags, texts = split_overrides(sys.argv[1:])
    options = parser.parse_args(flags)
    start_cache(print)
    on_cpu = jax.default_backend() == "cpu"
    calls = options.steps_per_call or ([1] if on_cpu else [1, 5, 10])

    def plan(residency: str, steps_per_call: int = 0) -> Plan:
        values: Any = override(load(options.config), texts)
        values["data"]["residency"] = residency
        values["steps_per_call"] = steps_per_call
        values["num_epochs"] = 10**6  # no end in sight
        return make_plan(parse(values, num_devices=jax.device_count()))

    counts = {"constant": 1, "streamed": 1} | {f"resident {count}": count for count in calls}
    ways = {"constant": way(plan("host"), constant=True), "streamed": way(plan("host"))}
    ways |= {f"resident {count}": way(plan("device", count)) for count in calls}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            times[name].append(run(options.steps))

    result = {
        "command": "python benchmarks/resident_feeding.py --config "
        + " ".join([str(options.config), *(f"--config.{key}={text}" for key, text in texts)]),
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
        "steps": options.steps,
        "rounds": options.rounds,
        "milliseconds_a_step": {
            name: round(1000 * statistics.median(each), 3) for name, each in times.items()
        },
        "times_constant": {
            name: round(
                statistics.median(a / b for a, b in zip(each, times["constant"], strict=True)), 4
            )
            for name, each in times.items()
        },
    }
    if jax.default_backend() == "gpu":
        busy = {
            name: 1000 * busy_seconds(run, options.steps, counts[name])
            for name, run in ways.items()
        }
        result |= {
            "milliseconds_busy": {name: round(each, 3) for name, each in busy.items()},
            "dispatch": {
                name: round(1000 * statistics.median(times[name]) / each - 1, 4)
                for name, each in busy.items()
            },
        }
    path = options.output or RESULTS / f"resident_feeding_{jax.default_backend()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
