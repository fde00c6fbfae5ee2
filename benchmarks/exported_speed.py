"""The exported files against the run's own compiled prediction: time of one batch.

    python benchmarks/exported_speed.py runs/quickstart

All answer the same 64 images, 20 times in a turn, and the probabilities are compared. What is timed
of a turn comes behind calls that are not: onnxruntime's threads spin for a while behind its last
one, and another's would stand beside them. The target is at most 1.05 times the time for StableHLO;
ONNX in onnxruntime stands beside it where its converter is installed. The result is kept in
benchmarks/results/exported_speed.json.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from seeds import processor

from cnn_jax.commands.export import export
from cnn_jax.runtime.platform import versions
from cnn_jax.trained import open_run

TURN, UNTIMED = 20, 5
"""Calls of a turn, and those before them."""

RESULT = Path(__file__).parent / "results" / "exported_speed.json"


def milliseconds(predict: Callable[..., Any], images: np.ndarray) -> float:
    start = time.perf_counter()
    jax.block_until_ready(predict(images))
    return 1e3 * (time.perf_counter() - start)


def load(path: Path) -> Callable[..., Any]:
    """Returns the function in an exported file, as docs/using.md loads it."""
    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read("model.json"))
        exported = jax.export.deserialize(bytearray(file.read("model.stablehlo")))
    options = about["compiler_options"].get(jax.default_backend(), {})
    return jax.jit(exported.call, compiler_options=options)


def load_onnx(path: Path) -> Callable[..., Any]:
    """Returns the function in an ONNX file, as docs/using.md loads it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()

    run = open_run(options.workdir)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.zip"
        about = export(options.workdir, path)
        ways = {"exported": load(path)}
        if importlib.util.find_spec("jax2onnx"):
            export(options.workdir, Path(folder) / "model.onnx", form="onnx")
            ways["onnx"] = load_onnx(Path(folder) / "model.onnx")
    own_logits, softmax = run.compile_logits(options.batch_size), jax.jit(jax.nn.softmax)
    ways = {"run": lambda images: softmax(own_logits(images)), **ways}
    shape = (options.batch_size, *run.dataset.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(ways["run"](images))
    differences = {
        name: float(np.abs(np.asarray(way(images)) - expected).max()) for name, way in ways.items()
    }
    times = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, way in ways.items():
            calls = [milliseconds(way, images) for _ in range(UNTIMED + TURN)]
            times[name] += calls[UNTIMED:]
    medians = {name: statistics.median(each) for name, each in times.items()}
    found = {
        "model": about["model"],
        "images": list(shape),
        "milliseconds": medians,
        "ratio": {name: median / medians["run"] for name, median in medians.items()},
        "largest_difference": differences,
        "device": f"{jax.default_backend()}, {processor()}",
        "versions": versions(),
    }
    text = json.dumps(found, indent=2)
    print(text)
    options.result.write_text(text + "\n")


if __name__ == "__main__":
    main()
