"""A compiled step as pictures: its memory over time, and its kernels against the roofline."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.runtime import hlo
from cnn_jax.runtime.roofline import Rates

LABELLED = 8  # kernels that move most
LEAST_BYTES = 1000  # of a kernel that is drawn
OF_TRACING = re.compile(
    r"(jit|jvp|transpose|vmap|checkpoint|rematted_computation)\b.*"
    r"|cond|branch_\d+_fun|while|body|closed_call|\w+\.stages"
)
"""Parts of the path of an operation that say how it was traced, and not where it stands."""
COLOURS = {
    "arguments": "#4477aa",
    "constants": "#bbbbbb",
    "activations": "#66ccee",
    "temporaries": "#ccbb44",
    "outputs": "#228833",
}


def plot(
    path: Path,
    title: str,
    program: hlo.Program,
    kernels: Sequence[hlo.Kernel],
    rates: Rates | None,
) -> None:
    """Draws memory by kind of buffer over the schedule, and bytes against FLOPs of each kernel."""
    from matplotlib.figure import Figure  # where used: it is slow to import

    figure = Figure(figsize=(13, 10), layout="constrained")
    memory, roofline = figure.subplots(2, 1)
    figure.suptitle(title)
    _memory(memory, program)
    _roofline(roofline, kernels, rates)
    figure.savefig(path, dpi=120)


def _memory(axes: Any, program: hlo.Program) -> None:
    points = hlo.liveness(program).points
    peak = max(range(len(points)), key=lambda number: points[number].total)
    height = points[peak].total / 2**20
    seen = {kind: max(point.live.get(kind, 0) for point in points) for kind in COLOURS}
    kinds = [kind for kind, most in seen.items() if most > 0.001 * points[peak].total]
    axes.stackplot(
        range(len(points)),
        [[point.live.get(kind, 0) / 2**20 for point in points] for kind in kinds],
        labels=kinds,
        colors=[COLOURS[kind] for kind in kinds],
    )
    axes.plot(peak, height, "v", color="black", markersize=5)
    axes.set(
        xlabel="instruction of the schedule",
        ylabel="MiB on one device",
        title=f"Memory over the step: at most {height:,.0f} MiB, at {layer(points[peak].op_name)}",
        xlim=(0, len(points) - 1),
        ylim=(0, 1.08 * height),
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _roofline(axes: Any, kernels: Sequence[hlo.Kernel], rates: Rates | None) -> None:
    drawn = [each for each in kernels if each.traffic.total >= LEAST_BYTES and each.flops.total]
    moved = [each.traffic.total for each in drawn]
    done = [each.flops.total for each in drawn]
    axes.loglog(moved, done, ".", color=COLOURS["arguments"], alpha=0.6, label="kernels")
    if rates and drawn:
        ends = [min(moved), max(moved)]
        for dtype, rate in rates.flops_per_second.items():
            ridge = rate / rates.memory_bytes_per_second
            line = [ridge * end for end in ends]
            axes.loglog(ends, line, "--", linewidth=1, label=f"{dtype}: {ridge:,.0f} FLOPs a byte")
    largest = sorted(drawn, key=lambda each: -each.traffic.total * each.times)[:LABELLED]
    numbers: dict[tuple[float, float], list[str]] = {}  # of kernels that share a place
    for number, each in enumerate(largest, start=1):
        numbers.setdefault((each.traffic.total, each.flops.total), []).append(str(number))
        name = layer(each.op_name) or each.kind
        axes.plot([], [], " ", label=f"{number}  {each.traffic.total / 1e6:,.0f} MB  {name}")
    offsets = itertools.chain([(5, -3), (0, 5)], itertools.repeat((0, -12)))
    for (place, shared), offset in zip(numbers.items(), offsets, strict=False):
        axes.annotate(
            ",".join(shared), place, xytext=offset, textcoords="offset points", fontsize=8
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.set(
        xlabel="bytes of a launch",
        ylabel="floating-point operations of a launch",
        title="Kernels"
        + (": below a dashed line memory bounds them, above it arithmetic" * bool(rates)),
    )
    axes.grid(alpha=0.3)


def layer(op_name: str) -> str:
    """Returns what a person needs of JAX's path of an operation: layer, operation, direction."""
    parts = [part for part in op_name.split("/") if not OF_TRACING.fullmatch(part)]
    direction = ", gradient" if "transpose(" in op_name else ""
    return "/".join(parts[-4:]) + direction
