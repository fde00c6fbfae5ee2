"""The data's way from files to the device: each stage alone, and all together."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.benchmarking.machine import describe_machine
from cnn_jax.config import Config
from cnn_jax.data.pipeline import train_batch, train_batches
from cnn_jax.data.stages import COPYING, Stages, slowest
from cnn_jax.plan import open_part
from cnn_jax.runtime.files import refuse_existing, write_json_file
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, to_devices

TOGETHER = "together"

ENOUGH = 2**30
"""Steps, more than anybody waits for."""


def bench_data(config: Config, *, seconds: float, json_file: Path | None = None) -> int:
    """Measures how fast the training examples of `config` come, and names the stage that limits.

    Alone, a stage is timed in one thread while nothing else runs; together, the batches are made as
    in training. Copying, the rest and all together take `seconds` each. Returns 0.

    Raises UserError where the data cannot be had or are damaged.
    """
    if json_file is not None:
        refuse_existing(json_file)
    data, size, stages = config.data, config.batch_size, Stages()
    source = open_part(config, config.data.parts()["train"], log=print, stages=stages)
    sharding = batch_sharding(make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp))
    steps = itertools.count()

    def make() -> dict[str, np.ndarray]:
        return train_batch(source, next(steps), batch_size=size, seed=config.seed, stages=stages)

    def copy(batch: dict[str, np.ndarray]) -> None:
        jax.block_until_ready(to_devices(batch, sharding))

    batch = make()
    copy(batch)
    stages.clear()  # of what only the first time costs
    made, _ = _repeat(make, seconds)
    alone = {stage: each / (made * size) for stage, each in stages.seconds().items()}
    copied, taken = _repeat(lambda: copy(batch), seconds)
    alone[COPYING] = taken / (copied * size)
    with contextlib.closing(
        train_batches(
            source,
            batch_size=size,
            seed=config.seed,
            start_step=next(steps),
            stop_step=ENOUGH,
            num_threads=data.num_threads,
            prefetch=data.prefetch,
        )
    ) as batches:
        copy(next(batches))
        fed, taken = _repeat(lambda: copy(next(batches)), seconds)
    report = {
        "data": data.name,
        "examples": len(source),
        "image_shape": list(source.info.image_shape),
        "batch_size": size,
        "num_threads": data.num_threads,
        "examples_per_second": {stage: 1 / max(each, 1e-12) for stage, each in alone.items()}
        | {TOGETHER: fed * size / taken},
        "limited_by": slowest(alone, num_threads=data.num_threads),
        "machine": describe_machine(),
        "versions": versions(),
    }
    print(table(report))
    if json_file is not None:
        write_json_file(json_file, json.dumps(report, indent=2) + "\n")
        print(f"written to {json_file}")
    return 0


def _repeat(run: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """Returns how often it ran until the seconds were over, at least once, and the time taken."""
    count, start = 0, time.perf_counter()
    while True:
        run()
        count += 1
        taken = time.perf_counter() - start
        if taken >= seconds:
            return count, taken


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as a person reads it."""
    threads = report["num_threads"]
    shape = " x ".join(map(str, report["image_shape"]))
    lines = [
        f"{report['data']}: {report['examples']:,} examples of {shape}, in batches of "
        f"{report['batch_size']}; {report['machine']}",
        f"{'':<22}  examples/s",
    ]
    for stage, rate in report["examples_per_second"].items():
        how = "alone, one thread"
        if stage == TOGETHER:
            how = f"{threads} threads make batches, one copies them"
        lines.append(f"{stage:<22}{rate:>12,.0f}  {how}")
    return "\n".join([*lines, f"{report['limited_by']} limits"])
