"""Latency and requests/s of `serve` for 1, 8 and 64 clients that ask again when they are answered.

    python benchmarks/serving.py runs/quickstart

Two servers in turn, each a process of its own on this machine, as are the clients: the run, asked
for its test images as PNG, and a ResNet-50 with random weights in an exported file, asked for JPEG
of 500 x 375. Every answer must be right. The result is kept in benchmarks/results/serving.json,
and as the table of docs/production.md.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from seeds import ROOT, processor

from cnn_jax import create_model
from cnn_jax.data.sources import open_source
from cnn_jax.exported import DESCRIPTION, PROGRAM
from cnn_jax.models.folding import fold_batch_norms
from cnn_jax.runtime.compiler import unseen_options
from cnn_jax.runtime.platform import versions
from cnn_jax.trained import open_run
from cnn_jax.training.augment import normalize

RESULT = ROOT / "benchmarks" / "results" / "serving.json"
DOCUMENT = ROOT / "docs" / "production.md"
BEGIN, END = "<!-- written by benchmarks/serving.py -->\n", "<!-- end -->\n"
BODIES = 32


def test_images(workdir: str) -> list[bytes]:
    """Returns images of the run's data set as PNG."""
    data = open_run(workdir).config.data
    source = open_source(data.name, f"test[:{BODIES}]", data_dir=data.data_dir)
    images = source.batch(np.arange(BODIES))["image"]
    return [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]


def photographs() -> list[bytes]:
    """Returns JPEG of 500 x 375 that are as smooth as photographs."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (BODIES, 25, 33, 3), np.uint8)
    large = (cv2.resize(each, (500, 375), interpolation=cv2.INTER_CUBIC) for each in small)
    return [cv2.imencode(".jpg", each)[1].tobytes() for each in large]


def write_resnet50(path: Path) -> None:
    """Writes what `export` would, of a network that has learned nothing."""
    mean, std, shape = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224, 3)
    model: Any = create_model("resnet50")
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    abstract = jax.eval_shape(
        lambda image: model.init(jax.random.key(0), image, train=False), image
    )
    rng = np.random.default_rng(0)

    def random(path: Any, leaf: Any) -> np.ndarray:
        if leaf.ndim > 1:  # as wide as keeps the scale of what passes through
            return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    initial = jax.tree_util.tree_map_with_path(random, abstract)
    model, variables = fold_batch_norms(model, initial, image)
    prepare = functools.partial(normalize, mean=mean, std=std, dtype=jnp.float32)

    def probabilities(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(model.apply(variables, prepare(images), train=False))

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)
    exported = jax.export.export(jax.jit(probabilities), platforms=("cpu",))(images)
    lowered = jax.jit(probabilities).lower(jax.ShapeDtypeStruct((1, *shape), jnp.uint8))
    about = {
        "input": {"shape": ["batch", *shape]},
        "class_names": [str(number) for number in range(1000)],
        "compiler_options": {"cpu": dict(unseen_options(lowered))},
        "model": "resnet50",
        "data": "nothing",
        "step": 0,
        "ema": False,
        "preprocessing": {},
    }
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(DESCRIPTION, json.dumps(about))
        file.writestr(PROGRAM, bytes(exported.serialize()))


@contextlib.contextmanager
def server(*flags: str) -> Iterator[str]:
    """Gives the address of a server that is ready."""
    command = [sys.executable, "-m", "cnn_jax", "serve", "--port=0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout or ())
        address = next(lines).split()[-1]
        if not next(lines, "").startswith("ready"):
            sys.exit("the server did not become ready")
        yield address
    finally:
        process.terminate()
        process.wait()


async def batches(session: aiohttp.ClientSession) -> tuple[float, float]:
    """Returns how many images and batches the server has computed."""
    async with session.get("/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
        found = {sample.name: sample.value for family in families for sample in family.samples}
    return found["cnn_jax_batch_images_sum"], found["cnn_jax_batch_images_count"]


async def load(
    address: str, bodies: Sequence[bytes], kind: str, clients: int, seconds: float
) -> dict[str, float]:
    """Returns what so many clients met, after a fifth of the time that is not counted.

    It lasts longer where not every client has had five answers on average by then.
    """
    latencies: list[float] = []
    answers: dict[int, list[Any]] = {}
    begin = last = time.perf_counter() + seconds / 5

    def measuring() -> bool:
        return time.perf_counter() < begin + seconds or len(latencies) < 5 * clients

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(address, connector=connector) as session:

        async def client(number: int) -> None:
            nonlocal last
            turn = number
            while measuring():
                which, start = turn % len(bodies), time.perf_counter()
                async with session.post(
                    "/v1/predict?top=1", data=bodies[which], headers={"Content-Type": kind}
                ) as answer:
                    said = await answer.json()
                    if answer.status != 200:
                        sys.exit(f"status {answer.status}: {said}")
                if begin <= (now := time.perf_counter()) and measuring():
                    last = now
                    latencies.append(now - start)
                answers.setdefault(which, []).append(said["predictions"][0]["classes"][0])
                turn += 1

        images, computed = await batches(session)
        await asyncio.gather(*(client(number) for number in range(clients)))
        images_after, computed_after = await batches(session)
    for same in answers.values():
        shares = [each["probability"] for each in same]
        if len({each["class"] for each in same}) > 1 or np.ptp(shares) > 1e-5:
            sys.exit(f"different answers for one image: {same}")
    p50, p99 = np.percentile(latencies, (50, 99))
    return {
        "clients": clients,
        "requests": len(latencies),
        "requests_per_second": len(latencies) / (last - begin),
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
        "images_per_batch": (images_after - images) / (computed_after - computed),
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result as the document has it."""
    lines = [
        "| network | clients | requests/s | p50 | p99 | images a batch |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in result["networks"].items():
        for row in rows:
            lines.append(
                f"| {name} | {row['clients']} | {row['requests_per_second']:,.1f} "
                f"| {row['p50_ms']:,.1f} ms | {row['p99_ms']:,.1f} ms "
                f"| {row['images_per_batch']:.1f} |"
            )
    found = result["versions"]
    return (
        f"Measured by `{result['command']}` on {result['machine']}, server and clients together, "
        f"Python {found['python']}, jax {found['jax']}, {result['seconds']:g} s each.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()

    networks: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        resnet50 = Path(folder) / "resnet50.zip"
        write_resnet50(resnet50)
        for name, flag, bodies, kind in (
            (Path(options.workdir).name, "--workdir=" + options.workdir, None, "image/png"),
            ("resnet50", f"--model={resnet50}", photographs(), "image/jpeg"),
        ):
            bodies = bodies or test_images(options.workdir)
            networks[name] = []
            with server(flag) as address:
                for clients in map(int, options.clients.split(",")):
                    row = asyncio.run(load(address, bodies, kind, clients, options.seconds))
                    networks[name].append(row)
                    print(json.dumps({"network": name, **row}), flush=True)
    result = {
        "command": f"python benchmarks/serving.py {' '.join(sys.argv[1:])}",
        "machine": f"{os.cpu_count()} cores of {processor()}",
        "device": jax.default_backend(),
        "versions": versions() | {"aiohttp": aiohttp.__version__},
        "seconds": options.seconds,
        "networks": networks,
    }
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    before, rest = options.document.read_text().split(BEGIN)
    after = rest.split(END, 1)[1]
    options.document.write_text(before + BEGIN + "\n" + table(result) + "\n" + END + after)


if __name__ == "__main__":
    main()
