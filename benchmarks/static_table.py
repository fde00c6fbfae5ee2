"""What compilers say of our ResNet-50 training step and of a plain one, without any accelerator.

    python -m benchmarks.static_table

Compiles the step of `configs/synthetic.py` and that of `benchmarks/plain_linen_resnet.py` for each
topology, 256 images a GPU and 128 a TPU chip, each in a process of its own. A crash or a compile
longer than the limit is a row too. Keeps the rows in benchmarks/results/static_table.json as they
come, and makes docs/static_table.md of that file. It needs the extras aot-tpu and aot-gpu.

    python -m benchmarks.static_table --topology h200:1,h200:8    # these rows anew, others stay
    python -m benchmarks.static_table --render                    # the document alone
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import plain_linen_resnet
from cnn_jax.config import parse
from cnn_jax.plan import make_plan
from cnn_jax.runtime import hlo
from cnn_jax.runtime.platform import versions
from cnn_jax.runtime.topologies import Topology, parse_topology
from configs import synthetic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "static_table.json"
DOCUMENT = ROOT / "docs" / "static_table.md"

TOPOLOGIES = ("h200:1", "h200:8", "a100-80gb:1", "v5e:2x2", "v5p:2x2x1", "v4:2x2x1")
NETWORKS = ("ours", "plain")
IMAGES_PER_DEVICE = {"cuda": 256, "tpu": 128}
PARAMETERS = 25_557_032
"""Of ResNet-50 with 1000 classes, https://docs.pytorch.org/vision/stable/models.html"""

Row = dict[str, Any]


def measure(topology_name: str, network: str, dump: str | None) -> Row:
    """Returns the row of one network on one topology; raises whatever the compiler raises."""
    topology = parse_topology(topology_name)
    images = IMAGES_PER_DEVICE[topology.platform]
    devices = topology.devices()
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    jax.jit(lambda: 0, out_shardings=sharding).lower().compile()  # the compiler's own start

    start = time.perf_counter()
    if network == "ours":
        config = synthetic.get_config()
        config.batch_size = images * len(devices)
        config.augment.flip, config.loss.label_smoothing = False, 0.0  # the plain step has neither
        plan = make_plan(parse(config.to_dict(), num_devices=len(devices)), devices=devices)
        lowered, params, options = plan.lower("train"), plan.state.params, plan.compiler.options
    else:
        lowered = plain_linen_resnet.lower_train_step(devices, images * len(devices))
        params, options = plain_linen_resnet.abstract_state().params, {}
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if parameters != PARAMETERS:
        raise ValueError(f"{network}: {parameters:,} parameters; ResNet-50 has {PARAMETERS:,}")
    lowering = time.perf_counter() - start

    start, start_cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile(compiler_options=dict(options))
    seconds = {
        "lowering": lowering,
        "compiling": time.perf_counter() - start,
        "compiling_cpu": time.process_time() - start_cpu,
    }
    text = compiled.as_text() or ""
    if dump:
        path = Path(dump, f"{topology.name}_{network}.hlo.txt".replace(":", "-"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program = hlo.read(text)
    costs = compiled.cost_analysis() or {}
    counted = hlo.flops(program)
    return {
        "parameters": parameters,
        "images_per_device": images,
        "devices": len(devices),
        "options": dict(options),
        "memory": _memory(compiled.memory_analysis()),
        "bytes_per_image": {
            "compiler": _positive(costs.get("bytes accessed"), images),
            "reader": hlo.traffic(program).total / images,
        },
        "flops_per_image": {
            "compiler": _positive(costs.get("flops"), images),
            "reader": (counted.matrix + counted.elementwise) / images,
        },
        "kernels": hlo.launches(program),
        "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', _entry(text)))) or None,
        "collectives": [
            {"kind": each.kind, "count": each.count, "bytes": each.bytes}
            for each in hlo.collectives(program)
        ],
        "seconds": seconds,
    }


def _entry(text: str) -> str:
    """Returns the computation that a program begins with; TPU's compiler says what each costs."""
    return text[text.find("\nENTRY ") :]


def _memory(found: Any) -> dict[str, int]:
    """Returns bytes of one device; the peak is what `cnn_jax compile` reports as such."""
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return parts | {"peak": sum(parts.values()) - 2 * parts["aliased"]}


def _positive(count: float | None, images: int) -> float | None:
    """Returns the compiler's count an image; None where it has none or an impossible one."""
    return count / images if count is not None and count > 0 else None


def run_child(topology: Topology, network: str, options: argparse.Namespace) -> Row:
    """Returns the row that a process of its own measures, with `error` if it fails."""
    row: Row = {"topology": topology.name, "network": network}
    dump = options.dump and str(options.dump.resolve())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "row.json")
        request = [topology.name, network, str(report), dump or ""]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.static_table", "--child", *request],
                cwd=ROOT,
                env={**os.environ, **topology.environment()},
                stderr=subprocess.PIPE,
                text=True,
                timeout=options.time_limit,
            )
        except subprocess.TimeoutExpired:
            return row | {"error": f"stopped after {options.time_limit} s, the time limit"}
        if report.exists():
            return row | json.loads(report.read_text())
        if done.returncode < 0:
            return row | {"error": f"the compiler died of signal {-done.returncode}"}
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        return row | {"error": f"the compiler died: {said[-1][:300]}"}


def child(topology: str, network: str, report: str, dump: str) -> None:
    """Writes the row that was asked for, or the error in its place."""
    jax.config.update("jax_enable_compilation_cache", False)  # the time of a compile is a result
    try:
        row = measure(topology, network, dump or None)
    except Exception as error:  # a compiler's own, of any kind
        row = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    Path(report).write_text(json.dumps(row))


def provenance() -> dict[str, Any]:
    """Returns where a row comes from: versions, machine, commit."""
    found = versions()
    for package in ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("log", "-1", "--format=%h")
    if _git("status", "--porcelain", "cnn_jax", "configs"):
        commit += " and changes"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return {
        "versions": found,
        "machine": f"{os.cpu_count()} cores of {processor}, no accelerator",
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def read_rows() -> list[Row]:
    """Returns the rows measured so far."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def keep(row: Row) -> None:
    """Puts the row into the results, in the place of the older one."""
    rows = {(each["topology"], each["network"]): each for each in read_rows()}
    rows[row["topology"], row["network"]] = row
    order = [(topology, network) for topology in TOPOLOGIES for network in NETWORKS]
    kept = [rows[key] for key in order if key in rows]
    result = {"command": "python -m benchmarks.static_table", "rows": kept}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


Cell = Callable[[Row], float | None]

CELLS: Mapping[str, tuple[Cell, str]] = {
    "peak, GiB": (lambda row: row["memory"]["peak"] / 2**30, ".2f"),
    "MB an image, compiler": (lambda row: _scaled(row["bytes_per_image"]["compiler"], 1e6), ".1f"),
    "MB an image, reader": (lambda row: row["bytes_per_image"]["reader"] / 1e6, ".1f"),
    "GFLOP an image, compiler": (
        lambda row: _scaled(row["flops_per_image"]["compiler"], 1e9),
        ".2f",
    ),
    "GFLOP an image, reader": (lambda row: row["flops_per_image"]["reader"] / 1e9, ".2f"),
    "kernels": (lambda row: row["kernels"], ",.0f"),
    "M cycles": (lambda row: _scaled(row.get("cycles"), 1e6), ".1f"),
    "collectives": (lambda row: sum(each["count"] for each in row["collectives"]), ",.0f"),
    "of MB": (lambda row: sum(each["bytes"] for each in row["collectives"]) / 1e6, ",.1f"),
    "compile, s": (lambda row: row["seconds"]["compiling"], ".0f"),
    "compile, CPU s": (lambda row: row["seconds"]["compiling_cpu"], ".0f"),
}
BY_CHANCE = {"compile, s", "compile, CPU s"}
"""Cells that are not the same each time."""


def _scaled(count: float | None, unit: float) -> float | None:
    return None if count is None else count / unit


def render(rows: Sequence[Row]) -> str:
    """Returns the document of these rows."""
    found = {(row["topology"], row["network"]): row for row in rows}
    header = ["topology", "images a device", "step", *CELLS]
    lines = [_line(header), _line(["---"] * 3 + ["--:"] * len(CELLS))]
    missing, failed, worse = [], [], []
    for topology in TOPOLOGIES:
        pair = [found.get((topology, network)) for network in NETWORKS]
        for network, row in zip(NETWORKS, pair, strict=True):
            if row is None:
                missing.append(f"`{topology}` {network}")
                continue
            if "error" in row:
                failed.append(f"`{topology}` {network}: {row['error']}")
                lines.append(_line([topology, "", network, "failed"] + [""] * (len(CELLS) - 1)))
                continue
            cells = [_shown(cell(row), digits) for cell, digits in CELLS.values()]
            lines.append(_line([topology, str(row["images_per_device"]), network, *cells]))
        ours, plain = pair
        if ours and plain and "error" not in ours and "error" not in plain:
            ratios = {name: _ratio(cell(ours), cell(plain)) for name, (cell, _) in CELLS.items()}
            cells = [_shown(ratio, ".3f") for ratio in ratios.values()]
            lines.append(_line(["", "", "ours / plain", *cells]))
            more = [
                f"{name} {ratio:.4f}"
                for name, ratio in ratios.items()
                if ratio and round(ratio, 4) > 1 and name not in BY_CHANCE
            ]
            worse += [f"- `{topology}`: {', '.join(more)}"] if more else []
    return "\n".join(
        [
            _ABOVE,
            *lines,
            "",
            "Cells where ours is above the plain step, compile times aside, as a ratio:",
            "",
            *(worse or ["- none"]),
            "",
            f"Not run: {', '.join(missing) or 'nothing'}.",
            f"Failed: {'; '.join(failed) or 'nothing'}.",
            "",
            _BELOW,
            *_origins(rows),
            "",
        ]
    )


_ABOVE = """\
# What compilers say of the training step, ours and a plain one

Made by `python -m benchmarks.static_table` from `benchmarks/results/static_table.json`; edit
neither. Nothing here was run on an accelerator: it is what the compiler for each made of the step,
on a machine without one.

- **ours**: the training step of `configs/synthetic.py` (ResNet-50, bfloat16), compiled as
  `train.py` compiles it, without mirrored images and smoothed labels, which the plain step does not
  have. It also reports the norm of the gradient and whether all is finite.
- **plain**: `benchmarks/plain_linen_resnet.py`, flax.linen in the manner of Flax's ImageNet
  example, with XLA's defaults.

Both have 25,557,032 parameters, take uint8 images, and do the same optimiser's work. `topology` is
as in `python -m cnn_jax compile`.
"""

_BELOW = """\
What is behind the numbers is in [performance.md](performance.md).

How to read it:

- Peak is that of one device: arguments + outputs - aliased + temporaries + code, by the compiler's
  memory analysis.
- MB and GFLOP an image, *compiler*: the compiler's cost analysis, which XLA has for TPUs and not
  for GPUs without a card. *Reader*: counted from the optimised HLO by `cnn_jax.runtime.hlo`, the
  same way for all.
- Kernels are launches a step. *M cycles*: millions of them that the compiler for a TPU expects its
  fusions to take, added up (`estimated_cycles` in the optimised HLO). Collectives are counted a
  step, their bytes summed as one device sees them.
- Compile times are of one compile each, while other work on the machine came and went: wall times
  of the two steps cannot be compared, and CPU seconds only roughly.
- A program compiled for a GPU without the card has no autotuning: the card's own compile may
  choose other kernels.

Where the rows come from:
"""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def _ratio(ours: float | None, plain: float | None) -> float | None:
    return ours / plain if ours is not None and plain else None


def _origins(rows: Sequence[Row]) -> list[str]:
    """Returns one line for each set of versions, machine and commit."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        origin = row["origin"]
        packages = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
        key = f"{origin['date']}, commit {origin['commit']}, {origin['machine']}; {packages}"
        lines.setdefault(key, []).append(f"{row['topology']} {row['network']}")
    return [f"- {', '.join(names)}: {key}" for key, names in lines.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default=",".join(TOPOLOGIES), help="some of the table's")
    parser.add_argument("--network", default=",".join(NETWORKS), help="ours, plain or both")
    parser.add_argument("--render", action="store_true", help="make the document only")
    parser.add_argument("--dump", type=Path, help="directory for optimised HLO")
    parser.add_argument("--time-limit", type=int, default=900, help="seconds a compile may take")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if not options.render:
        for name in options.topology.split(","):
            for network in options.network.split(","):
                start = time.perf_counter()
                row = run_child(parse_topology(name), network, options)
                keep({**row, "origin": provenance()})
                outcome = row.get("error", "done")
                print(name, network, f"{time.perf_counter() - start:.0f} s", outcome, flush=True)
    DOCUMENT.write_text(render(read_rows()))


if __name__ == "__main__":
    main()
