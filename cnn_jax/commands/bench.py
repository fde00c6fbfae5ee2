"""Measurement: a training step or a prediction beside the same one written in linen or PyTorch."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.benchmarking.machine import clocks, describe_machine
from cnn_jax.benchmarking.sides import Side, open_sides
from cnn_jax.benchmarking.windows import Times, compare, objections, take_turns
from cnn_jax.benchmarking.workload import OURS, Workload, architecture
from cnn_jax.errors import UserError
from cnn_jax.models.geometry import layers, total
from cnn_jax.runtime.accelerators import ACCELERATORS
from cnn_jax.runtime.files import refuse_existing, write_json_file
from cnn_jax.runtime.report import duration

NOT_STEADY = 3
"""The exit code of a measurement that was taken but may not be kept."""

PASSES = {True: 3, False: 1}
"""Forward passes that the operations of a step are worth, by whether it trains."""


def bench(
    workload: Workload,
    peers: Sequence[str],
    *,
    windows: int = 5,
    steps: int | None = None,
    json_file: Path | None = None,
    command: str = "",
) -> int:
    """Measures the workload beside the peers, which take turns, and prints a table.

    Each side starts from the same weights, and before anything is timed five steps must give the
    same on all. Returns 0; or `NOT_STEADY` where the times scatter too much or the machine had
    other work, and then nothing is written to `json_file`.

    Raises UserError where a peer does not have the network, cannot run or computes something else.
    """
    if json_file is not None:
        refuse_existing(json_file)
    if peers:
        architecture(workload)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_sides(peers, workload, Path(folder)) as sides,
    ):
        counts = {side.name: side.facts["parameters"] for side in sides}
        if workload.training and len(set(counts.values())) > 1:
            raise UserError(f"the networks have other numbers of parameters: {counts}")
        print(_heading(workload, sides), flush=True)
        results = compare(sides, workload.precision)
        before = clocks()
        times, load = take_turns(sides, windows=windows, steps=steps)
        after = clocks()
        rates = sides[0].rates()
        report = {
            "command": command,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": describe_machine(),
            "device": sides[0].facts["device"],
            "workload": _as_json(workload),
            "sides": {
                side.name: _row(side, times[side.name], workload, rates, results[side.name])
                for side in sides
            },
            "ratios": {
                side.name: times[side.name].median / times[OURS].median for side in sides[1:]
            },
            "rates": rates,
            "load_by_others": load,
            "clocks": {"before": before, "after": after},
            "versions": {k: v for side in sides for k, v in side.facts["versions"].items()},
            "objections": objections(times, load),
        }
    print(table(report))
    if report["objections"]:
        reasons = "\n  ".join(report["objections"])
        print(f"not a measurement, and not recorded:\n  {reasons}")
        return NOT_STEADY
    if json_file is not None:
        write_json_file(json_file, json.dumps(report, indent=2) + "\n")
        print(f"written to {json_file}")
    return 0


def _heading(workload: Workload, sides: Sequence[Side]) -> str:
    facts = sides[0].facts
    shape = " x ".join(map(str, workload.image_shape))
    arguments = ", ".join(f"{key}={value}" for key, value in workload.arguments.items())
    packages = {k: v for side in sides for k, v in side.facts["versions"].items()}
    named = ", ".join(f"{k} {packages[k]}" for k in ("jax", "flax", "torch") if k in packages)
    lines = {
        "network": f"{workload.model}({arguments}): {facts['parameters']:,} parameters"
        + ("" if workload.training else ", BatchNorm folded"),
        "batch": f"{workload.batch_size} images of {shape}, {workload.precision}, "
        + ("one training step" if workload.training else "one prediction"),
        "machine": f"{describe_machine()}; {facts['device']}; {named}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _row(
    side: Side,
    times: Times,
    workload: Workload,
    rates: Mapping[str, float],
    results: Sequence[Any],
) -> dict[str, Any]:
    """Returns what is known of one side, for JSON; what only a compiled program shows may lack."""
    facts, seconds = side.facts, times.median
    model = workload.make_model()
    multiply_adds = total(layers(model, workload.image_shape)).multiply_adds
    flops = None
    if multiply_adds is not None:
        flops = 2.0 * multiply_adds * PASSES[workload.training] * workload.batch_size
    row: dict[str, Any] = {
        "seconds": list(times.seconds),
        "median": seconds,
        "spread": times.spread,
        "images_per_second": workload.batch_size / seconds,
        "compile_seconds": facts["compile_seconds"],
        "flops_per_second": flops and flops / seconds,
        "flags": facts["flags"],
        "losses": list(results) if workload.training else [],
    }
    if "bytes" in facts:
        row |= {
            "options": facts["options"],
            "bytes_per_image": facts["bytes"] / workload.batch_size,
            "bytes_per_second": facts["bytes"] / seconds,
            "launches": facts["launches"],
            "share_of_bound": side.bound_seconds(rates) / seconds,
        }
        if published := _published(facts["device_kind"], workload.precision):
            row["share_of_published_bound"] = side.bound_seconds(published) / seconds
    return row


def _published(device_kind: str, precision: str) -> dict[str, float]:
    """Returns the rates that the device's vendor publishes; nothing for one without."""
    for each in ACCELERATORS.values():
        if each.kind == device_kind:
            rates = {"float32": each.float32_rate, "bfloat16": each.bfloat16_rate}
            if each.memory_bandwidth and (rate := rates[precision]):
                return {"copy": each.memory_bandwidth, "product": rate}
    return {}


def _as_json(workload: Workload) -> dict[str, Any]:
    return {
        "model": workload.model,
        "arguments": dict(workload.arguments),
        "image_shape": list(workload.image_shape),
        "batch_size": workload.batch_size,
        "precision": workload.precision,
        "training": workload.training,
    }


HEADER = (
    "",
    "images/s",
    "ms a step",
    "scatter",
    "compile",
    "MB an image",
    "GB/s",
    "GFLOP/s",
    "of the bound",
)


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as a person reads it."""
    rates = report["rates"]
    rows: list[tuple[str, ...]] = [HEADER]
    for name, row in report["sides"].items():
        compiling = sum(row["compile_seconds"].values())
        moved, done = row.get("bytes_per_second"), row["flops_per_second"]
        shares = [row.get(key) for key in ("share_of_bound", "share_of_published_bound")]
        rows.append(
            (
                name,
                f"{row['images_per_second']:,.4g}",
                f"{1e3 * row['median']:,.4g}",
                f"{row['spread']:.1%}",
                duration(compiling) if compiling else "",
                f"{row['bytes_per_image'] / 1e6:,.1f}" if moved else "",
                f"{moved / 1e9:,.1f} ({moved / rates['copy']:.0%})" if moved else "",
                f"{done / 1e9:,.1f} ({done / rates['product']:.0%})" if done else "",
                " / ".join(f"{share:.0%}" for share in shares if share),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += [
        f"{OURS} takes 1 / {ratio:.2f} of the time of {name}"
        for name, ratio in report["ratios"].items()
    ]
    load = report["load_by_others"]
    lines += [
        f"here a copy moves {rates['copy'] / 1e9:,.1f} GB/s and a matrix product does "
        f"{rates['product'] / 1e9:,.1f} GFLOP/s; other processes took "
        + ("an unknown share" if load is None else f"{load:.1%}")
        + " of the machine's time"
    ]
    return "\n".join(lines)
