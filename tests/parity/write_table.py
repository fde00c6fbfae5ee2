"""Measures every case beside PyTorch and rewrites the tables of docs/parity.md.

    python tests/parity/write_table.py

Everything in that file outside of the two marks stays as it is.
"""

import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Iterable

import comparison
import jax
import parity_cases

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- written by tests/parity/write_table.py -->\n", "<!-- end -->\n"
COLUMNS = {
    "outputs": ("eval/", "train/"),
    "statistics": ("statistics/",),
    "gradients": ("gradient/",),
    "five steps": ("trained/",),
}
"""What a column holds the largest error of."""


def largest(found: dict[str, float], prefixes: tuple[str, ...]) -> str:
    errors = [error for name, error in found.items() if name.startswith(prefixes)]
    return f"{max(errors):.0e}" if errors else ""


def row(name: str, case: parity_cases.Case) -> str:
    """The errors of a case in both precisions, and PyTorch's own in float32."""
    import torch_side

    size = sum(leaf.size for leaf in jax.tree.leaves(case.abstract["params"]))
    cells = [name, f"{size:,}"]
    torch_runs = {
        dtype: comparison.comparable(case, dtype, torch_side.run_torch(case, dtype))
        for dtype in comparison.TOLERANCES
    }
    for dtype, expected in torch_runs.items():
        scales = comparison.scales(case, expected)
        found = comparison.errors(comparison.run_flax(case, dtype), expected, scales)
        cells += [largest(found, prefixes) for prefixes in COLUMNS.values()]
    exact = comparison.comparable(case, "float32", torch_runs["float64"])
    own = comparison.errors(torch_runs["float32"], exact, comparison.scales(case, exact))
    return f"| {' | '.join([*cells, largest(own, ('',))])} |\n"


def table(names: Iterable[str], what: str) -> str:
    both = [f"{name}, {dtype}" for dtype in comparison.TOLERANCES for name in COLUMNS]
    head = [what, "parameters", *both, "PyTorch's own float32"]
    lines = [f"| {' | '.join(head)} |\n", f"|---|{'---:|' * (len(head) - 1)}\n"]
    for name in names:
        print(name, file=sys.stderr, flush=True)
        lines.append(row(name, parity_cases.CASES[name]))
    return "".join(lines)


def machine() -> str:
    """Where it was measured, in a sentence."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "numpy")
    )
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"Measured by `python tests/parity/write_table.py` on {os.cpu_count()} cores of "
        f"{(names or [platform.processor() or platform.machine()])[0]}, Python "
        f"{platform.python_version()}, {versions}.\n"
    )


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    parts = [
        machine(),
        table(parity_cases.MODELS, "model"),
        table(parity_cases.BLOCKS, "block"),
    ]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after)


if __name__ == "__main__":
    main()
