"""Compiling for machines that are not there: does a step fit, what does it cost, what bounds it.

Each compile is a process of its own (`compile_child`), with a limit of time and of memory, so that
a compiler that crashes, hangs or swells is one row of the report.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.config import BatchNormConfig
from cnn_jax.data.datasets import dataset_info, split_range
from cnn_jax.data.holdout import Part
from cnn_jax.errors import UserError
from cnn_jax.plan import is_training, phase_name
from cnn_jax.runtime.report import duration
from cnn_jax.runtime.topologies import Topology, parse_topology
from cnn_jax.storage import write_atomically

GIB = 2**30
POLL_SECONDS = 0.2
CUDA_SHARE = 0.75
"""Of a GPU's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of a sweep: its nested values, and what sets it apart, such as
    "batch_size=512".

    `file` is where it comes from, if there are several.
    """

    values: Mapping[str, Any]
    name: str = ""
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compile.

    Attributes:
      steps: of `plan.STEPS`.
      dump: directory for StableHLO and optimised HLO.
      plot: directory for pictures.
      save: directory for the programs, for one topology and one variant.
      time_limit: seconds a compile may take.
      memory_limit: bytes of this machine's memory that a compile may use.
    """

    steps: Sequence[str]
    dump: Path | None = None
    plot: Path | None = None
    save: Path | None = None
    time_limit: float = 1800.0
    memory_limit: int | None = None


Row = dict[str, Any]


def compile_steps(
    variants: Sequence[Variant],
    topologies: Sequence[Topology],
    options: Options,
    *,
    json_file: Path | None = None,
    max_batch: bool = False,
    compared: tuple[str, str] | None = None,
) -> int:
    """Compiles each step of each variant for each topology, and prints a row for each.

    With `max_batch`, finds the largest batch of the training step that fits instead. Of two
    `compared` files, it also prints what changed from the variants of the first to those of the
    second. Returns 0, or 1 if a compile failed; one that does not fit has not failed.
    """
    for directory in (options.dump, options.plot):
        if directory is not None:
            _make(directory)
    rows: list[Row] = []
    answers: list[str] = []

    def add(row: Row) -> None:
        rows.append(row)
        if json_file is not None:  # after each row, so that an interrupt loses one
            write_atomically(json_file, json.dumps({"rows": rows}, indent=2) + "\n")

    for topology in topologies:
        for variant in variants:
            if max_batch:
                answers.append(largest_batch(variant, topology, options, add))
            else:
                for step in programs(variant.values, options.steps):
                    add(compile_one(variant, topology, step, options))
    _say("", table(rows), *details(rows), *answers)
    if compared is not None:
        before, after = (
            [row | {"file": ""} for row in rows if row["file"] == file] for file in compared
        )
        _say("", compare(before, after, compared))
    if json_file is not None:
        _say(f"written to {json_file}")
    return int(any(_failed(row) for row in rows))


def programs(values: Mapping[str, Any], steps: Sequence[str]) -> list[str]:
    """Returns what is compiled for the steps: of training a program for each size of the images."""
    training = [*map(phase_name, values["data"]["progressive_sizes"]), "train"]
    return [name for step in steps for name in (training if step == "train" else [step])]


def _make(directory: Path) -> None:
    """Makes a directory, before anything is compiled; UserError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{directory}: cannot be written to")


def _failed(row: Row) -> bool:
    return "error" in row and not row.get("too_large")


def compile_one(variant: Variant, topology: Topology, step: str, options: Options) -> Row:
    """Returns the row of one compile, with `error` if it failed."""
    label = "_".join(filter(None, [topology.name, variant.file, variant.name, step]))
    label = re.sub(r"[^\w.=-]+", "-", label)
    row: Row = {"topology": topology.name, "variant": variant.name, "step": step}
    if variant.file:
        row["file"] = variant.file
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        request = {
            "config": variant.values,
            "topology": topology.name,
            "step": step,
            "label": label,
            "report": str(report),
            "parent": os.getpid(),
            "dump": options.dump and str(options.dump),
            "plot": options.plot and str(options.plot),
            "save": options.save and str(options.save),
        }
        start = time.monotonic()
        with Path(folder, "errors").open("w+") as errors:
            failure = _run(request, topology, errors, options, label)
            errors.seek(0)
            said = errors.read()
        if report.exists():
            row |= json.loads(report.read_text())
        else:
            row["error"] = f"{failure or 'the compiler died'}: {_last_words(said)}"
        row["seconds_in_all"] = time.monotonic() - start
    if "error" in row:
        row |= _does_not_fit(row["error"], topology)
        sizes = variant.values
        size = sizes["batch_size"] if is_training(step) else sizes["eval"]["batch_size"]
        row |= {"batch": size, "devices": topology.num_devices}
    return row


def _run(
    request: Mapping[str, Any],
    topology: Topology,
    errors: Any,
    options: Options,
    label: str,
) -> str:
    """Runs the child to its end; returns why it has no report, if that is known."""
    child = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax.commands.compile_child"],
        stdin=subprocess.PIPE,
        stdout=errors,
        stderr=errors,
        text=True,
        env={**os.environ, **topology.environment()},
    )
    with _Waiting(f"compiling {label}") as waiting:
        try:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                child.communicate(json.dumps(request), timeout=POLL_SECONDS)
            while child.poll() is None:
                if waiting.seconds > options.time_limit:
                    return f"stopped after {duration(options.time_limit)}, the time limit"
                used = _memory_of(child.pid)
                if options.memory_limit and used > options.memory_limit:
                    limit = options.memory_limit / GIB
                    return f"stopped at {used / GIB:.1f} GiB; the memory limit is {limit:.1f} GiB"
                waiting.show()
                time.sleep(POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode < 0:
        return f"the compiler died of signal {-child.returncode}"
    return ""


def _memory_of(pid: int) -> int:
    """Returns the bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


class _Waiting:
    """Shows on a terminal what is awaited and for how long; two lines in a log."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._terminal = sys.stdout.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> "_Waiting":
        if not self._terminal:
            _say(self._what)
        return self

    def show(self) -> None:
        if self._terminal:
            print(f"\r{self._what}  {duration(self.seconds)} ", end="", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print(f"\r{self._what}  {duration(self.seconds)} ", flush=True)


def _last_words(text: str) -> str:
    """Returns the line of a dying compiler that says why, or its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if re.search(r"^F\d{4}|Check failed|EXHAUSTED", line)]
    return ([*reasons[:1], *lines[-1:], "it said nothing"])[0][:300]


def _does_not_fit(error: str, topology: Topology) -> Row:
    """Returns what a compiler says that refuses a program because it needs too much memory.

    Some name temporaries alone, so that the peak is at least what they say.
    """
    if "RESOURCE_EXHAUSTED" not in error:
        return {}
    memory: Row = {"peak": None, "capacity": topology.accelerator.memory, "fits": False}
    # "Used 20.5G of 15.75G hbm", or "temporaries (20.5G) exceeds available HBM (15.75G)".
    used, capacity = r"(?:Used |temporaries \()([\d.]+)([KMGT])", r"([\d.]+)([KMGT])(?: hbm|\))"
    found = re.search(rf"{used}(?: of |\) exceeds available HBM \(){capacity}", error)
    if found:
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        memory["peak"], memory["capacity"] = (
            int(float(found[i]) * units[found[i + 1]]) for i in (1, 3)
        )
    return {"memory": memory, "too_large": True}


def largest_batch(
    variant: Variant, topology: Topology, options: Options, add: Callable[[Row], None]
) -> str:
    """Returns a line that says the largest batch whose training step fits.

    Each compile foretells it, since memory grows nearly in proportion to the batch; where that does
    not end soon, the search halves what is between a batch that fits and one that does not. A batch
    is a multiple of 8 for each device, or of 1 where not even 8 fit, of each micro-batch and of
    whole groups of `batch_norm.statistics`, and no larger than the data set.

    Raises UserError where the memory of the device is not known.
    """
    capacity = topology.accelerator.memory
    if capacity is None:
        raise UserError(f"{topology.name}: its memory is not known, so nothing can be too large")
    data = variant.values["data"]
    where = {key: data[key] for key in ("data_dir", "source_dir", "image_size")}
    most = len(split_range(dataset_info(data["name"], **where), data["train_split"])[1])
    most = Part(data["holdout"], held_out=False).size(most)
    statistics = BatchNormConfig(**variant.values["batch_norm"])
    group = statistics.group_size(topology.num_devices, topology.num_devices) or 1
    least = variant.values["accumulate_steps"] * math.lcm(topology.num_devices, group)
    peaks: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        values = {**variant.values, "batch_size": batch}
        name = ",".join(filter(None, [variant.name, f"batch_size={batch}"]))
        row = compile_one(Variant(values, name), topology, "train", options)
        add(row)
        if _failed(row):
            raise _CompileError
        peaks[batch] = row["memory"]["peak"]
        return bool(row["memory"]["fits"])

    def search(unit: int) -> int | None:
        """Returns the largest multiple of the unit that fits; None if not even one does."""
        last = most // unit * unit
        if last < unit or not fits(unit):
            return None
        good, bad = unit, last + unit
        guess = min(2 * unit, last)
        while bad - good > unit:
            if fits(guess):
                good = guess
            else:
                bad = guess
            known = sorted((batch, peak) for batch, peak in peaks.items() if peak)
            (low, at_low), (high, at_high) = known[-2:] if len(known) > 1 else known * 2
            slope = (at_high - at_low) / max(high - low, 1)
            foretold = int(high + (capacity - at_high) / slope) if slope > 0 else 8 * good
            if len(peaks) < 7 and foretold // unit * unit == good:
                foretold = good + unit
            elif not good < foretold < bad:
                foretold = (good + bad) // 2 if bad <= last else 8 * good
            elif len(peaks) > 6:  # it does not grow in proportion: halves, or ever larger steps
                step = good >> max(0, 11 - len(peaks))
                foretold = (good + bad) // 2 if bad <= last else max(foretold, good + step)
            guess = max(good + unit, min(foretold, 8 * good, bad - unit) // unit * unit)
        return good

    where = " ".join(filter(None, [topology.name, variant.name]))
    try:
        found = search(8 * least) or search(least)
    except _CompileError:
        return f"{where}: the search stopped at a compile that failed"
    if found is None:
        return f"{where}: not even a batch of {least:,} fits"
    limit = ", all that the data set has" if found + 8 * least > most else ""
    return f"{where}: the largest batch that fits is {found:,}{limit}"


class _CompileError(Exception):
    """A compile failed for another reason than memory."""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "topology": lambda row: row["topology"],
    "file": lambda row: row.get("file", ""),
    "variant": lambda row: row["variant"],
    "step": lambda row: row["step"],
    "batch": lambda row: f"{row['batch']:,}" if "batch" in row else "",
    "taken": lambda row: ", ".join(f"{key} {value}" for key, value in _choices(row).items()),
    "peak": lambda row: _gib(row.get("memory", {}).get("peak")),
    "of": lambda row: _gib(row.get("memory", {}).get("capacity")),
    "fits": lambda row: _verdict(row),
    "MB/image": lambda row: _of_image(row, "bytes_per_image", 1e6),
    "GFLOP/image": lambda row: _of_image(row, "flops_per_image", 1e9),
    "kernels": lambda row: f"{row['kernels']:,}" if "kernels" in row else "",
    "collectives": lambda row: _collectives(row),
    "images/s*": lambda row: _estimated(row, "images_per_second"),
    "a device*": lambda row: _estimated(row, "images_per_second_per_device"),
    "bound*": lambda row: (row.get("estimate") or {}).get("bound", ""),
    "compiled in": lambda row: duration(row["seconds"]["compiling"]) if "seconds" in row else "",
}
LEFT = {"topology", "file", "variant", "step", "taken", "fits", "bound*"}


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned lines; columns without any entry are left out."""
    cells = {name: [show(row) for row in rows] for name, show in COLUMNS.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    widths = {name: max(map(len, [name, *column])) for name, column in shown.items()}

    def line(entries: Mapping[str, str]) -> str:
        parts = (
            text.ljust(widths[name]) if name in LEFT else text.rjust(widths[name])
            for name, text in entries.items()
        )
        return "  ".join(parts).rstrip()

    header = line({name: name for name in shown})
    body = [line({name: shown[name][i] for name in shown}) for i in range(len(rows))]
    return "\n".join([header, "-" * len(header), *body])


def details(rows: Iterable[Row]) -> list[str]:
    """Returns what the table has no room for: failures, memory by kind, float32 activations."""
    lines = [""]
    for row in rows:
        parts = [row["topology"], row.get("file"), row["variant"], row["step"]]
        name = " ".join(filter(None, parts))
        if _failed(row):
            lines.append(f"{name}: {row['error']}")
            continue
        memory = row["memory"]
        parts = ", ".join(
            f"{kind} {_gib(memory[kind])}"
            for kind in ("arguments", "outputs", "aliased", "temporaries", "code")
            if memory.get(kind)
        )
        if parts:
            lines.append(f"{name}: on each device {parts}")
        if row.get("saved"):
            lines.append(f"  saved to {row['saved']}")
        if memory["fits"] and _beyond_cuda_share(row):
            needed = memory["peak"] / memory["capacity"]
            lines.append(
                f"  JAX takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
                f"more; this step needs {needed:.0%}"
            )
        lines += [
            f"  {each['kind']}: {each['count']} of {each['bytes'] / 1e6:,.1f} MB in all, among "
            f"{each['group_size']} devices"
            for each in row.get("collectives", [])
        ]
        lines += [
            f"  float32 activation {each['shape']}, {each['bytes'] / 2**20:,.0f} MiB: "
            f"{each['layer']} at {each['source']}"
            for each in row.get("float32_activations", [])
        ]
    if any(row.get("estimate") for row in rows):
        lines += ["", _ASSUMPTIONS.format(**_assumptions(rows))]
    return lines


_ASSUMPTIONS = """\
* an estimate, not a measurement: kernels one after the other, each bound by its FLOPs at \
{matrix_efficiency:.0%} of the peak,
  its bytes at {memory_efficiency:.0%} of the bandwidth or its messages at {link_efficiency:.0%} \
of the links; a GPU launch costs 2 us."""


def _assumptions(rows: Iterable[Row]) -> Mapping[str, float]:
    return next(row["estimate"]["assumptions"] for row in rows if row.get("estimate"))


def _beyond_cuda_share(row: Row) -> bool:
    is_gpu = parse_topology(row["topology"]).platform == "cuda"
    return is_gpu and row["memory"]["peak"] > CUDA_SHARE * row["memory"]["capacity"]


def _choices(row: Row) -> Mapping[str, Any]:
    """Returns, by the last part of each key, how the step is taken where it is not the default."""
    return {key.rpartition(".")[2]: value for key, value in row.get("choices", {}).items()}


def _gib(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _verdict(row: Row) -> str:
    if _failed(row):
        return "failed"
    memory = row["memory"]
    if memory["fits"] is None:
        return ""
    if memory["peak"] is None:
        return "no"
    spare = memory["capacity"] - memory["peak"]
    return f"yes, {_gib(spare)} free" if memory["fits"] else f"no, by {_gib(-spare)}"


def _of_image(row: Row, kind: str, unit: float) -> str:
    """Returns the compiler's count, where it has one, else that of its HLO."""
    counts = row.get(kind)
    if not counts:
        return ""
    value = (counts["compiler"] or counts["hlo"]) / unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _collectives(row: Row) -> str:
    found = row.get("collectives", [])
    if not found:
        return ""
    return f"{sum(each['count'] for each in found)}, {sum(e['bytes'] for e in found) / 1e6:,.1f} MB"


def _estimated(row: Row, key: str) -> str:
    return f"{row['estimate'][key]:,.0f}" if row.get("estimate") else ""


def compare(before: Sequence[Row], after: Sequence[Row], names: tuple[str, str]) -> str:
    """Returns a line for each count that is another in rows of the same topology and step."""
    lines = [f"{names[0]} -> {names[1]}"]

    def key_of(row: Row) -> tuple[str, ...]:
        return row["topology"], row.get("file", ""), row["variant"], row["step"]

    theirs = {key_of(row): row for row in after}
    for row in before:
        key = key_of(row)
        if key not in theirs:
            lines.append(f"{' '.join(filter(None, key))}: only in {names[0]}")
            continue
        other = theirs.pop(key)
        failures = [
            f"{'before' if each is row else 'now'}: {each['error']}"
            for each in (row, other)
            if _failed(each)
        ]
        if failures:
            lines.append(f"{' '.join(filter(None, key))}: failed {', '.join(failures)}")
            continue
        old, new = _counts(row), _counts(other)
        changed = [
            f"  {name}: {old.get(name, 0):,.4g} -> {new.get(name, 0):,.4g}"
            + (f" ({new.get(name, 0) / old[name] - 1:+.1%})" if old.get(name) else "")
            for name in old | new
            if old.get(name) != new.get(name)
        ]
        lines += [" ".join(filter(None, key)) + (":" if changed else ": the same"), *changed]
    lines += [f"{' '.join(filter(None, key))}: only in {names[1]}" for key in theirs]
    return "\n".join(lines)


def _counts(row: Row) -> dict[str, float]:
    """Returns the numbers of a row by name, those that do not change by chance."""
    counts: dict[str, float] = {}
    for section in ("memory", "flops_per_image", "bytes_per_image"):
        for name, value in row.get(section, {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                counts[f"{section}.{name}"] = value
    counts |= {"batch": row.get("batch", 0), "kernels": row.get("kernels", 0)}
    for each in row.get("collectives", []):
        kind = f"{each['kind']} among {each['group_size']}"
        counts[f"{kind}: count"] = counts.get(f"{kind}: count", 0) + each["count"]
        counts[f"{kind}: bytes"] = counts.get(f"{kind}: bytes", 0) + each["bytes"]
    for name, seconds in (row.get("estimate") or {}).get("seconds", {}).items():
        counts[f"estimated seconds, {name}"] = seconds
    return counts


def read_report(path: Path) -> list[Row]:
    """Returns the rows of a report that `--json` wrote; UserError for another file."""
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            _ = row["topology"], row["variant"], row["step"]
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no report of `compile --json`: {error}") from error


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
