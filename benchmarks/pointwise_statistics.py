"""A 1x1 convolution that also adds up its outputs for BatchNorm, in one kernel, beside XLA's.

    python -m benchmarks.pointwise_statistics                     # on a GPU: times
    python -m benchmarks.pointwise_statistics --topology h200:1   # without one: bytes and launches

Each 1x1 convolution of stride 1 in a ResNet-50, 256 images in bfloat16, forward: the outputs with
their mean and variance by channel. XLA writes the outputs by cuDNN and reads them again; the
kernel, of Pallas for Triton, adds up what it has in registers. A lever that is not in the package:
see docs/performance.md. What the two compute is compared before it is timed, the kernel in the
quickest of some sizes of blocks. A topology needs jax 0.12 and the extra aot-gpu. What is printed
is kept in benchmarks/results/pointwise_statistics.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton

from cnn_jax.benchmarking.machine import describe_machine
from cnn_jax.runtime import hlo
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.topologies import parse_topology

RESULT = Path(__file__).parent / "results" / "pointwise_statistics.json"

IMAGES = 256
LAYERS = {  # (side of the map, channels in, out): how many of them a ResNet-50 has
    (56, 64, 64): 1,
    (56, 64, 256): 4,
    (56, 256, 64): 2,
    (56, 256, 128): 1,
    (28, 128, 512): 4,
    (28, 512, 128): 3,
    (28, 512, 256): 1,
    (14, 256, 1024): 6,
    (14, 1024, 256): 5,
    (14, 1024, 512): 1,
    (7, 512, 2048): 3,
    (7, 2048, 512): 2,
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of the block of outputs that a program of the kernel makes, and of a step of its product."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


BLOCKS = (
    Blocks(128, 128, 64, 4, 3),
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 32, 4, 4),
    Blocks(128, 64, 64, 4, 4),
    Blocks(64, 128, 64, 4, 4),
    Blocks(64, 256, 64, 8, 4),
    Blocks(128, 256, 64, 8, 3),
    Blocks(256, 128, 64, 8, 3),
    Blocks(256, 64, 64, 8, 4),
)
"""The first is read where nothing can be timed."""

WINDOWS, CALLS = 7, 50

Outputs = tuple[jax.Array, jax.Array, jax.Array]


def of_xla(x: Any, kernel: Any) -> Outputs:
    """Returns outputs [b h w k], and their mean and variance, of images [b h w c] and [c k]."""
    y = lax.conv_general_dilated(
        x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    exact, pixels = y.astype(jnp.float32), (0, 1, 2)
    mean = exact.mean(pixels)
    return y, mean, jnp.square(exact).mean(pixels) - jnp.square(mean)


def of_kernel(
    x: Any, kernel: Any, *, blocks: Blocks = BLOCKS[0], interpret: bool = False
) -> Outputs:
    """Returns what `of_xla` does; pixels of all images must be a multiple of the blocks' rows."""
    rows, (channels, features) = x.reshape(-1, x.shape[3]), kernel.shape
    programs, columns = rows.shape[0] // blocks.rows, min(features, blocks.columns)
    sums = jax.ShapeDtypeStruct((programs, features), jnp.float32)
    a_row = pallas.BlockSpec((1, columns), lambda i, j: (i, j))
    y, of_values, of_squares = pallas.pallas_call(
        functools.partial(_program, depth=min(channels, blocks.depth), interpret=interpret),
        grid=(programs, features // columns),
        in_specs=[
            pallas.BlockSpec((blocks.rows, channels), lambda i, j: (i, 0)),
            pallas.BlockSpec((channels, columns), lambda i, j: (0, j)),
        ],
        out_specs=[pallas.BlockSpec((blocks.rows, columns), lambda i, j: (i, j)), a_row, a_row],
        out_shape=[jax.ShapeDtypeStruct((rows.shape[0], features), x.dtype), sums, sums],
        interpret=interpret,
        compiler_params=triton.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
    )(rows, kernel)
    mean = of_values.sum(0) / rows.shape[0]
    var = of_squares.sum(0) / rows.shape[0] - jnp.square(mean)
    return y.reshape(*x.shape[:3], features), mean, var


def _program(
    x: Any, kernel: Any, y: Any, of_values: Any, of_squares: Any, *, depth: int, interpret: bool
) -> None:
    """Makes one block of outputs, and the sums of what was rounded: BatchNorm sees no other."""
    (rows, channels), columns = x.shape, kernel.shape[1]
    interpreted = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    product = interpreted if interpret else triton.dot

    def add(step: Any, total: Any) -> Any:
        taken = pallas.ds(step * depth, depth)
        return total + product(x[:, taken], kernel[taken, :])

    total = lax.fori_loop(0, channels // depth, add, jnp.zeros((rows, columns), jnp.float32))
    rounded = total.astype(y.dtype)
    y[...] = rounded
    exact = rounded.astype(jnp.float32)
    of_values[...] = exact.sum(0)[None]
    of_squares[...] = jnp.square(exact).sum(0)[None]


FORMS = {"xla": of_xla, "kernel": of_kernel}
COMPILED = jax.jit(of_kernel, static_argnames="blocks")


def shapes(layer: tuple[int, int, int], sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    side, channels, features = layer
    return [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((IMAGES, side, side, channels), (channels, features))
    ]


def read_programs(topology: str) -> list[dict[str, Any]]:
    """Returns what the compiled programs of each layer say, for one device of the topology."""
    card = parse_topology(topology).devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(card)
    rows = []
    for layer, count in LAYERS.items():
        row: dict[str, Any] = {"layer": layer, "count": count}
        for name, form in FORMS.items():
            with _described(card):
                lowered = jax.jit(form).lower(*shapes(layer, sharding))
            program = hlo.read(lowered.compile().as_text() or "")
            row[name] = {
                "megabytes_an_image": hlo.traffic(program).total / IMAGES / 1e6,
                "launches": hlo.launches(program),
            }
        rows.append(row)
    return rows


@contextlib.contextmanager
def _described(card: Any) -> Any:
    """Tells Pallas of the card that is not there."""
    from jax._src.mesh import AbstractDevice, AbstractMesh

    device: Any = AbstractDevice(
        device_kind=card.device_kind, num_cores=card.core_count, platform="cuda"
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield


def time_programs() -> list[dict[str, Any]]:
    """Returns milliseconds of each layer here, medians of windows in turn."""
    rows = []
    for layer, count in LAYERS.items():
        keys = jax.random.split(jax.random.key(0))
        x, kernel = (
            jax.random.normal(key, each.shape, each.dtype)
            for key, each in zip(keys, shapes(layer), strict=True)
        )
        blocks = _quickest(x, kernel)
        programs = {"xla": jax.jit(of_xla), "kernel": functools.partial(COMPILED, blocks=blocks)}
        expected, found = (program(x, kernel) for program in programs.values())
        errors = [
            float(jnp.abs(a - b.astype(jnp.float32)).max() / jnp.abs(b).max())
            for a, b in zip(found, expected, strict=True)
        ]
        if not max(errors) < 0.02:
            raise ValueError(f"{layer}: the kernel computes something else: {errors}")
        seconds: dict[str, list[float]] = {name: [] for name in FORMS}
        for _ in range(WINDOWS):
            for name, program in programs.items():
                seconds[name].append(_seconds(program, x, kernel))
        medians = {
            name: {"milliseconds": 1e3 * statistics.median(s)} for name, s in seconds.items()
        }
        rows.append({"layer": layer, "count": count, **medians, "blocks": vars(blocks)})
    return rows


def _quickest(x: Any, kernel: Any) -> Blocks:
    """Returns the blocks by which the kernel is quickest, of those that the card has room for."""
    seconds = {}
    for blocks in BLOCKS:
        program = functools.partial(COMPILED, blocks=blocks)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(program(x, kernel))
            seconds[blocks] = min(_seconds(program, x, kernel) for _ in range(2))
    return min(seconds, key=seconds.__getitem__)


def _seconds(program: Any, x: Any, kernel: Any) -> float:
    """Returns what one of `CALLS` calls takes."""
    start = time.perf_counter()
    for _ in range(CALLS):
        outputs = program(x, kernel)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", help="read the programs for this GPU, which need not be here")
    topology = parser.parse_args().topology
    if topology:
        os.environ.update(parse_topology(topology).environment())
    rows = read_programs(topology) if topology else time_programs()
    for row in rows:
        side, channels, features = row["layer"]
        figures = "  ".join(
            f"{name}: " + ", ".join(f"{value:.3f} {what}" for what, value in row[name].items())
            for name in FORMS
        )
        print(f"{row['count']} x {side} x {side}, {channels} to {features}:  {figures}")
    totals = {
        name: {what: sum(row["count"] * row[name][what] for row in rows) for what in rows[0][name]}
        for name in FORMS
    }
    print("all of them:", json.dumps(totals))
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[topology or "timed"] = {
        "totals": totals,
        "layers": rows,
        "machine": describe_machine(),
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
