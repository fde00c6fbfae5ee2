"""The compiler's prediction of a training step's memory against the peak of a process that runs it.

    python -m benchmarks.memory_prediction [--device gpu]

On the CPU, for each case a process of its own compiles the step, makes state and batch, and notes
how far its resident memory rises above that (VmHWM of /proc/self/status, Linux alone): in the first
three steps, and in one more once what they freed is given back. The same for a program without
YNNPACK, a library whose scratch memory is not in XLA's plan. Keeps what it finds in
benchmarks/results/memory_prediction.json, with a paragraph on it.

On a GPU the peak is that of the device's allocator, of which a new process has used nothing, and
the file memory_prediction_gpu.json.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import create_model
from cnn_jax.runtime.compiler import compile_program, compiler_settings
from cnn_jax.runtime.platform import versions
from cnn_jax.training.optim import make_optimizer
from cnn_jax.training.state import init_state
from cnn_jax.training.steps import make_train_step

ROOT = Path(__file__).parents[1]
RESULTS = {
    "cpu": ROOT / "benchmarks" / "results" / "memory_prediction.json",
    "gpu": ROOT / "benchmarks" / "results" / "memory_prediction_gpu.json",
}

CASES = (  # model, images in a step, pixels of a side
    ("resnet_mini", 128, 32),
    ("resnet18", 16, 128),
    ("resnet18", 32, 128),
    ("resnet50", 8, 128),
)
GPU_CASES = (("resnet18", 128, 224), ("resnet50", 32, 224), ("resnet50", 64, 224))
STEPS = 3
LIBRARIES = {"ynnpack": {}, "none": {"xla_cpu_experimental_ynn_fusion_type": ""}}
"""What else computes parts of a step, and the compiler's options for it."""
MIB = 2**20

Row = dict[str, Any]


def memory(name: str) -> int:
    """Returns VmRSS, what this process holds now in bytes, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def settle() -> int:
    """Returns the bytes that this process holds once freed memory is given back; the peak too."""
    time.sleep(0.5)  # a program's memory is freed behind its results
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    return memory("VmRSS")


def compiled_step(name: str, batch_size: int, size: int, options: Mapping[str, Any]) -> Any:
    """Returns a compiled training step, what makes its state, its batch and its key."""
    model = create_model(name, num_classes=1000)
    tx = make_optimizer("sgd", 0.1, momentum=0.9, weight_decay=5e-4)
    step = jax.jit(make_train_step(model, tx), donate_argnums=0)

    def make_state() -> Any:
        return init_state(model, tx, jnp.zeros((1, size, size, 3)), jax.random.key(0))

    key = jax.random.key(1)
    random = np.random.default_rng(0)
    images = random.standard_normal((batch_size, size, size, 3), np.float32)
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.asarray(random.integers(1000, size=batch_size), jnp.int32),
    }
    lowered = step.lower(jax.eval_shape(jax.jit(make_state)), batch, key)
    return compile_program(lowered, options), jax.jit(make_state), batch, key


def measure(name: str, batch_size: int, size: int, library: str) -> Row:
    """Returns prediction and measurement of one training step on the CPU, in bytes."""
    compiled, make_state, batch, key = compiled_step(name, batch_size, size, LIBRARIES[library])
    found = compiled.memory_analysis()
    state = jax.block_until_ready(make_state())

    before = settle()
    for _ in range(STEPS):
        state = jax.block_until_ready(compiled(state, batch, key))[0]
    first_rise = memory("VmHWM") - before
    before_another = settle()
    jax.block_until_ready(compiled(state, batch, key))
    rise = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "library": library,
        "arguments": found.argument_size_in_bytes,
        "predicted_rise": rise,
        "first_rise": first_rise,
        "later_rise": memory("VmHWM") - before_another,
    }


def measure_on_gpu(name: str, batch_size: int, size: int) -> Row:
    """Returns the predicted and the measured peak of a process that takes steps, in bytes."""
    options = compiler_settings().options
    compiled, make_state, batch, key = compiled_step(name, batch_size, size, options)
    found = compiled.memory_analysis()
    state = make_state()
    for _ in range(STEPS):
        state = jax.block_until_ready(compiled(state, batch, key))[0]
    device = jax.local_devices()[0]
    more = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "device": device.device_kind,
        "predicted_peak": found.argument_size_in_bytes + more,
        "peak": device.memory_stats()["peak_bytes_in_use"],
    }


def beyond(rows: Sequence[Row], library: str, rise: str) -> str:
    """Returns the range of measured less predicted memory, and of the ratio of the two peaks."""
    runs = [run for row in rows for run in row["runs"] if run["library"] == library]
    more = [(run[rise] - run["predicted_rise"]) / MIB for run in runs]
    ratios = [
        (run["arguments"] + run[rise]) / (run["arguments"] + run["predicted_rise"]) for run in runs
    ]
    return (
        f"{min(more):.0f} to {max(more):.0f} MiB ({min(ratios):.2f} to {max(ratios):.2f} times "
        "the predicted peak)"
    )


def noise(rows: Sequence[Row]) -> float:
    """Returns the largest difference in MiB between rises of equal processes."""
    found = [0.0]
    for row in rows:
        rises = [run["first_rise"] for run in row["runs"] if run["library"] == "ynnpack"]
        found.append((max(rises) - min(rises)) / MIB)
    return max(found)


def paragraph(rows: Sequence[Row]) -> str:
    """Returns what the rows say."""
    said = [
        f"{name}, {beyond(rows, library, 'first_rise')} in the first {STEPS} steps and "
        f"{beyond(rows, library, 'later_rise')} in a later one"
        for library, name in (("none", "without YNNPACK"), ("ynnpack", "as compiled by default"))
    ]
    return (
        f"A process on the CPU holds more than the compiler predicts for the step, over "
        f"{len(rows)} steps: {'; '.join(said)}. Equal processes differ by up to {noise(rows):.0f} "
        "MiB in the first steps. The first steps also pay for code and threads; the later one does "
        "not count what libraries kept from them. The difference between the two kinds of program "
        "points at scratch memory of YNNPACK, which XLA's plan does not count."
    )


def paragraph_on_gpu(rows: Sequence[Row]) -> str:
    """Returns what the rows of a GPU say."""
    runs = [run for row in rows for run in row["runs"]]
    ratios = [run["peak"] / run["predicted_peak"] for run in runs]
    return (
        f"A process on one {runs[0]['device']} takes {min(ratios):.3f} to {max(ratios):.3f} times "
        f"the peak that the compiler predicts for the step, over {len(rows)} steps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2, help="processes for each case")
    parser.add_argument("--device", choices=RESULTS, default="cpu", help="to run on")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, batch_size, size, library = options.child
        case = name, int(batch_size), int(size)
        on_cpu = options.device == "cpu"
        print(json.dumps(measure(*case, library) if on_cpu else measure_on_gpu(*case)))
        return

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    rows: list[Row] = []
    on_cpu = options.device == "cpu"
    libraries = [*["ynnpack"] * options.runs, "none"] if on_cpu else [""] * options.runs
    say = paragraph if on_cpu else paragraph_on_gpu
    for name, batch_size, size in CASES if on_cpu else GPU_CASES:
        case = [name, str(batch_size), str(size)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu" if on_cpu else "cuda"}
        runs = []
        for library in libraries:
            child = ["benchmarks.memory_prediction", "--device", options.device, "--child", *case]
            done = subprocess.run(
                [sys.executable, "-m", *child, library],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                check=True,
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        rows.append({"model": name, "batch_size": batch_size, "image_size": size, "runs": runs})
        for run in runs:
            shown = [
                f"{kind} {value / MIB:.1f} MiB" if isinstance(value, int) else value
                for kind, value in run.items()
            ]
            print(name, batch_size, size, *shown, flush=True)
        result = {
            "command": "python -m benchmarks.memory_prediction "
            f"--device {options.device} --runs {options.runs}",
            "machine": f"{os.cpu_count()} cores of {processor}, {platform.system()}",
            "versions": versions(),
            "finding": say(rows),
            "rows": rows,
        }
        results = RESULTS[options.device]
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(result, indent=2) + "\n")
    print(say(rows))


if __name__ == "__main__":
    main()
