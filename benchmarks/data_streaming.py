"""How fast images get from files to batches, against the bare work and against torch's DataLoader.

    python benchmarks/data_streaming.py

JPEGs of 500 x 375, quality 90, become random resized crops of 224; small records of 28 x 28 come
from memory. Every way does the same work in turn, several times; the median is printed, and all of
it with versions goes to benchmarks/results/data_streaming.json. A way of one thread is held to one
core, so that nothing beside it helps. torchvision, where it is installed, has as many worker
processes as this package has threads, but for none where that is one.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from cnn_jax.data.datasets import DATASETS
from cnn_jax.data.images import random_box
from cnn_jax.data.pipeline import train_batches
from cnn_jax.data.sources import Crops, MemorySource, Source, open_source

SIZE = 224
RESULTS = Path(__file__).parent / "results" / "data_streaming.json"


def write_images(root: Path, count: int) -> None:
    """Writes pictures with the detail of a photograph, about 90 kB each, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((375, 500, 3), np.float32)
        for scale in (4, 16, 64, 250):
            coarse = rng.normal(0, 25, (max(2, 375 // scale), max(2, 500 // scale), 3))
            pixels += cv2.resize(coarse.astype(np.float32), (500, 375))
        pixels = np.uint8(np.clip(pixels + 128, 0, 255))
        data = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
        (folder / f"{number}.jpg").write_bytes(data)


def bare(files: list[bytes], decoder: str) -> None:
    """Decodes, crops and resizes every file, with nothing around it.

    In full, as this package does here: no crop of 375 rows is twice its target.
    """
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    for index, data in enumerate(files):
        box = random_box(375, 500, seed=0, epoch=0, index=index, min_area=0.08)
        if decoder == "pillow":
            with Image.open(io.BytesIO(data)) as image:
                place = (box.left, box.top, box.left + box.width, box.top + box.height)
                part = image.convert("RGB").crop(place)
                out[:] = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            continue
        if decoder == "simplejpeg":
            pixels = simplejpeg.decode_jpeg(data)
        else:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        cv2.resize(part, (SIZE, SIZE), dst=out, interpolation=cv2.INTER_LINEAR)


def streamed(source: Source, *, batch_size: int, steps: int, threads: int) -> None:
    """Runs through the batches as a training does."""
    batches = train_batches(
        source, batch_size=batch_size, seed=0, start_step=0, stop_step=steps, num_threads=threads
    )
    with contextlib.closing(batches):
        for _ in batches:
            pass


def torch_loader(root: Path, *, batch_size: int, workers: int) -> Callable[[], None]:
    """Returns a pass through the usual pipeline of torchvision, its workers kept.

    Raises ImportError where torch or torchvision is missing.
    """
    import torch

    # PyPI's torchvision is compiled for CUDA's torch. Beside the CPU's it looks for two operators
    # that could not be loaded then, and that nothing here calls.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    images = datasets.ImageFolder(
        root / "train",
        transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.PILToTensor()]),
    )
    loader = torch.utils.data.DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


class Way(NamedTuple):
    """What is timed, the images it makes, and how many cores it has."""

    run: Callable[[], None]
    images: int
    cores: int = 1


@contextlib.contextmanager
def held_to(cores: int) -> Iterator[None]:
    """Keeps this thread, and those that it starts, on so many of its cores; Linux alone can."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(ways: dict[str, Way], repeats: int) -> dict[str, float]:
    """Returns the median images a second of each way, all taken in turn after one warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            with held_to(way.cores):
                start = time.perf_counter()
                way.run()
            if repeat:
                rates[name].append(way.images / (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    count, size = options.images // options.batch_size * options.batch_size, options.batch_size
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_images(root, count)
        source = open_source("folder", "train", source_dir=directory, crops=Crops(SIZE))
        files = [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]
        steps = count // size
        ways = {
            f"bare, {decoder}": Way(lambda decoder=decoder: bare(files, decoder), count)
            for decoder in ("simplejpeg", "opencv", "pillow")
        }
        for threads in (1, 2):
            ways[f"streamed, {threads} thread{'s' * (threads > 1)}"] = Way(
                lambda threads=threads: streamed(
                    source, batch_size=size, steps=steps, threads=threads
                ),
                count,
                cores=threads,
            )
        with contextlib.suppress(ImportError):
            for workers, cores in ((0, 1), (2, 2)):
                run = torch_loader(root, batch_size=size, workers=workers)
                ways[f"torch, {workers} workers"] = Way(run, count, cores)
        rates = measure(ways, options.repeats)

    info = DATASETS["fashion_mnist"]
    small = MemorySource(
        info, "train", np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32)
    )
    small_steps = 60_000 * 10 // 256
    records = {
        "28 x 28 from memory, 1 thread": Way(
            lambda: streamed(small, batch_size=256, steps=small_steps, threads=1),
            small_steps * 256,
        )
    }
    rates |= measure(records, options.repeats)
    ratios = {
        "one thread against bare": rates["streamed, 1 thread"] / rates["bare, simplejpeg"],
        "two threads against one": rates["streamed, 2 threads"] / rates["streamed, 1 thread"],
    }
    if "torch, 2 workers" in rates:
        ratios |= {
            "one thread against torch": rates["streamed, 1 thread"] / rates["torch, 0 workers"],
            "two against torch": rates["streamed, 2 threads"] / rates["torch, 2 workers"],
        }
    for name, rate in rates.items():
        print(f"{name:<34}{rate:>12,.0f} images/s")
    for name, ratio in ratios.items():
        print(f"{name:<34}{ratio:>12.2f}")
    result = {
        "images_per_second": rates,
        "ratios": ratios,
        "images": count,
        "machine": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version()}
        | {
            package: importlib.metadata.version(package)
            for package in ("opencv-python-headless", "simplejpeg", "pillow", "numpy")
            + (("torch", "torchvision") if "torch, 2 workers" in rates else ())
        },
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
