"""What a checkpoint costs: how long a save holds the training loop, and how long a restore takes.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --models modern_cnn --saves 30

The states are those of ResNet-18, ModernCNN (ResNet-50) and ResNet-152 with momentum, so that the
time of a restore stands against the size of its files. A save holds the loop while the state is
copied to the host, which any save must do and which is measured by itself, and while it is handed
to the threads that write; the target is at most 50 ms on top of the copy. The processor time of the
loop's own thread tells what it did itself from what it waited for: the copy and the hand-over are
one thread's work, and where another process or thread has the core, they last longer. A restore
reads what was written, after the SHA-256 of every file was checked. The result is kept in
benchmarks/results/checkpoint_cost.json, and a table is printed.
"""

import argparse
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
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from seeds import processor

from cnn_jax import create_model, init_state
from cnn_jax.runtime.checkpoint import Checkpoints, find_damage

RESULT = Path(__file__).parent / "results" / "checkpoint_cost.json"


def seconds(work: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work(*arguments, **options))
    return time.perf_counter() - start


def copied(state: Any) -> Any:
    return jax.tree.map(np.array, state)


def milliseconds(times: list[float]) -> dict[str, float]:
    return {
        "median": round(1000 * statistics.median(times), 1),
        "largest": round(1000 * max(times), 1),
    }


def measure(name: str, saves: int) -> dict[str, Any]:
    """Returns sizes and times of the checkpoints of a model with momentum."""
    model, tx = create_model(name, num_classes=1000), optax.sgd(0.1, momentum=0.9)
    image = jnp.zeros((1, 64, 64, 3))
    abstract = jax.eval_shape(lambda key: init_state(model, tx, image, key), jax.random.key(0))
    rng = np.random.default_rng(0)  # numbers that do not compress, as weights do not

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

    state = jax.tree.map(draw, abstract)
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)

    copies, holds, works, writes, checks, restores = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "checkpoints")
        checkpoints = Checkpoints(directory, keep=2, log=print)
        for _ in range(saves + 1):
            # A new state each time: JAX keeps the copy that it has made of an array.
            state = jax.block_until_ready(update(state))
            copies.append(seconds(copied, state))
            state = jax.block_until_ready(update(state))
            before = time.thread_time()
            holds.append(seconds(checkpoints.save, state, record={}))
            works.append(time.thread_time() - before)
            writes.append(holds[-1] + seconds(checkpoints.wait))
        checkpoints.close()

        step = int(state.step)
        files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        for _ in range(saves):
            checks.append(seconds(find_damage, directory / str(step)))
            checkpoints = Checkpoints(directory, keep=2, log=print)
            restores.append(seconds(checkpoints.restore, abstract))
            checkpoints.close()

    on_top = [hold - copy for hold, copy in zip(holds, copies, strict=True)][1:]
    return {
        "megabytes": {
            "state": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6, 1),
            "files": round(size / 1e6, 1),
        },
        "milliseconds": {
            "copy to the host": milliseconds(copies[1:]),
            "the loop is held": milliseconds(holds[1:]),
            "of which the loop's thread computes": milliseconds(works[1:]),
            "on top of the copy": milliseconds(on_top),
            "until it is on disk": milliseconds(writes[1:]),
            "checking SHA-256": milliseconds(checks),
            "restoring": milliseconds(restores),
        },
        "restored megabytes a second": round(size / 1e6 / statistics.median(restores)),
    }


def table(models: dict[str, dict[str, Any]]) -> str:
    """Returns the medians of each model as a table of Markdown."""
    parts = ("on top of the copy", "until it is on disk", "checking SHA-256", "restoring")
    lines = [f"| model | files, MB | {', ms | '.join(parts)}, ms | MB/s restored |"]
    lines.append("|---" * (len(parts) + 3) + "|")
    for name, found in models.items():
        medians = [f"{found['milliseconds'][part]['median']:.0f}" for part in parts]
        sizes = f"{found['megabytes']['files']:.0f} | {' | '.join(medians)}"
        lines.append(f"| {name} | {sizes} | {found['restored megabytes a second']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet18,modern_cnn,resnet152", help="with commas")
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    models: dict[str, dict[str, Any]] = {}
    for name in options.models.split(","):
        models[name] = measure(name, options.saves)
        print(f"{name}: measured", flush=True)
    result = {
        "command": f"python benchmarks/checkpoint_cost.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "orbax-checkpoint": ocp.__version__},
        "models": models,
        "target": "on top of the copy: at most 50 ms",
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(models))


if __name__ == "__main__":
    main()
