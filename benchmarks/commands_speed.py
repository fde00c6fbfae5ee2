"""Commands on a finished run: how soon each speaks, and how near `predict` is to its network.

    python benchmarks/commands_speed.py runs/quickstart

Each command is typed twice, in processes of its own; the second time, with programs compiled and
files read before, counts up to its first output. The target is at most 10 seconds on 2 CPU cores.
Then `predict` reads image files of the size that the run was trained on, and its images a second,
from the first prediction to the last, are put beside those of the bare compiled program on pixels
that are in memory; the target is at least 0.9 of them. The result is kept in
benchmarks/results/commands_speed.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from seeds import ROOT, processor

from cnn_jax.commands.predict import predict
from cnn_jax.runtime.platform import versions
from cnn_jax.trained import Trained, open_run

RESULT = Path(__file__).parent / "results" / "commands_speed.json"
STEPS_IN_FLIGHT = 2


def seconds_to_first_output(arguments: list[str], folder: Path) -> float:
    """Returns how long the command takes until it writes, and lets it end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait():
        sys.exit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return seconds


def write_images(run: Trained, folder: Path, count: int) -> np.ndarray:
    """Writes images of the test split as PNG files, over again if it has fewer; returns them."""
    source = run.open_split(None, log=print)
    pixels = source.batch(np.arange(count) % len(source))["image"]
    for number, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(folder / f"{number:05}.png")
    return pixels


def bare_rate(logits: Callable[..., jax.Array], pixels: np.ndarray, batch_size: int) -> float:
    """Returns images a second of the compiled program alone."""
    start, flying = time.perf_counter(), []
    for first in range(0, len(pixels), batch_size):
        flying.append(logits(pixels[first : first + batch_size]))
        if len(flying) > STEPS_IN_FLIGHT:
            jax.block_until_ready(flying[-1 - STEPS_IN_FLIGHT])
    jax.block_until_ready(flying)
    return len(pixels) / (time.perf_counter() - start)


def predict_rate(workdir: Path, folder: Path, batch_size: int, num_threads: int) -> float:
    """Returns images a second of `predict`, between its first and its last batch."""
    predictions = predict(workdir, [str(folder)], batch_size=batch_size, num_threads=num_threads)
    next(predictions)
    start = time.perf_counter()
    after = sum(1 for _ in predictions) + 1 - batch_size
    return after / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()

    workdir, size = options.workdir.absolute(), options.batch_size
    run = open_run(workdir)
    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), Path(name) / "images"
        images.mkdir()
        pixels = write_images(run, images, size * options.batches)
        image, given = str(images / "00000.png"), ["--workdir", str(workdir)]
        drawn = ["--pictures", "pictures", "--image", image]
        commands = {
            "evaluate": lambda n: ["evaluate", *given],
            "predict": lambda n: ["predict", *given, image],
            "features": lambda n: ["features", *given, "--to", f"features{n}.npz"],
            "export": lambda n: ["export", *given, "--to", f"model{n}.zip"],
            "inspect": lambda n: ["inspect", *given, *drawn],
            "plot": lambda n: ["plot", str(workdir), "--to", f"plot{n}.png"],
        }
        first = {
            name: [seconds_to_first_output(command(n), folder) for n in range(2)][-1]
            for name, command in commands.items()
        }
        logits = run.compile_logits(size)
        bare_rate(logits, pixels[: 2 * size], size)
        rates = {"bare": [], "predict": []}
        for _ in range(options.repeats):
            rates["bare"].append(bare_rate(logits, pixels, size))
            rates["predict"].append(predict_rate(workdir, images, size, options.threads))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    found = {
        "model": run.config.model.name,
        "seconds_to_first_output": first,
        "slowest": max(first, key=lambda name: first[name]),
        "images": [size * options.batches, *run.dataset.image_shape],
        "images_per_second": medians,
        "ratio": medians["predict"] / medians["bare"],
        "device": f"{jax.default_backend()}, {processor()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    text = json.dumps(found, indent=2)
    print(text)
    options.result.write_text(text + "\n")


if __name__ == "__main__":
    main()
