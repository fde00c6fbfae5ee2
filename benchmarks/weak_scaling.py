"""Weak scaling on paper: ResNet-50's training step compiled for more and more devices.

    python -m benchmarks.weak_scaling                          # what is missing, then the document
    python -m benchmarks.weak_scaling --topology v5e:4x4       # these rows anew, others stay
    python -m benchmarks.weak_scaling --render                 # the document alone

128 images a TPU chip and 256 a GPU, bfloat16, on a mesh `data`. Each compile is one of
`python -m cnn_jax compile`, in a process of its own; a failure is a row too. A row is kept in
benchmarks/results/weak_scaling.json as soon as it is there, so that a stopped run goes on with the
next; the largest topologies come first. docs/scaling.md is made of the rows. It needs the extras
aot-tpu and aot-gpu, and minutes for each row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cnn_jax.commands.compile import Options, Variant, compile_one
from cnn_jax.runtime.topologies import Topology, parse_topology
from cnn_jax.storage import write_atomically
from configs import synthetic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "weak_scaling.json"
DOCUMENT = ROOT / "docs" / "scaling.md"

TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("h200:8", "h200:16", "h200:64"),
)
IMAGES_PER_DEVICE = {"tpu": 128, "cuda": 256}
TIME_LIMIT = 3600

NETWORK_BYTES_PER_SECOND = 8 * 50e9
"""Between two hosts with eight GPUs, one direction: eight network cards of 400 Gb/s, as in NVIDIA's
DGX H200 (https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html)."""

Row = dict[str, Any]

HEAD = """\
# Weak scaling, on paper

Made by `python -m benchmarks.weak_scaling`: the training step of `configs/synthetic.py` (ResNet-50,
224 x 224, bfloat16, BatchNorm over the global batch), compiled for each topology with the same
images on each device. **Nothing here was run on these machines**: bytes and kernels are the
compiled program's, times are [the estimate](compiling.md) from published peak rates.

- *sent*: megabytes that one device sends in the collectives of a step, around a ring.
- *links*: milliseconds that they take at the rate of the links, before anything is hidden behind
  computation. Chips of a v5e slice form a mesh whose ends meet in the full 16 x 16 alone: there
  rings use the four links of a chip, in smaller slices two, as a chip in a corner has no more.
  NVLink within a host of eight GPUs, and between hosts eight network cards of 400 Gb/s, which
  eight rings use at once. *step*: milliseconds too.
- *efficiency*: images/s of a device, against the first row of its kind. The estimate knows neither
  the latency of a collective, which grows with the number of devices, nor stragglers, nor the
  reading of data: it is an upper bound.

| devices | hosts | batch | collectives | sent | links | step | images/s | a device | efficiency |
|---|---|---|---|---|---|---|---|---|---|
"""


def measure(topology: Topology) -> Row:
    """Returns the row of one topology, with `error` where its compile failed."""
    images = IMAGES_PER_DEVICE[topology.platform] * topology.num_devices
    values = {**synthetic.get_config().to_dict(), "batch_size": images}
    values["eval"] = {**values["eval"], "batch_size": images}
    options = Options(steps=("train",), time_limit=TIME_LIMIT)
    row = compile_one(Variant(values), topology, "train", options)
    kept = ("topology", "batch", "devices", "memory", "collectives", "estimate", "error")
    kept = (*kept, "seconds", "seconds_in_all", "versions")
    rate = {"link_bytes_per_second": device_rate(topology)}  # of which the estimate is made
    return {name: row[name] for name in kept if name in row} | rate


def line(row: Row, first: Row) -> str:
    """Returns a row of the table; `first` is the smallest of its kind."""
    topology = parse_topology(row["topology"])
    hosts = -(-topology.num_devices // (topology.accelerator.devices_per_host or 1))
    cells = [f"{row['topology']}", str(hosts), f"{row['batch']:,}"]
    if "error" in row:
        return f"| {' | '.join(cells)} | {row['error'][:80]} | | | | | | |\n"
    sent = sum(each["sent_bytes"] for each in row["collectives"])
    step, rate = step_seconds(row), images_per_second_per_device(row)
    cells += [
        f"{sum(each['count'] for each in row['collectives']):,}",
        f"{sent / 1e6:.1f}",
        f"{1e3 * sent / link_rate(topology):.2f}",
        f"{1e3 * step:.1f}",
        f"{rate * topology.num_devices:,.0f}",
        f"{rate:,.0f}",
        f"{rate / images_per_second_per_device(first):.1%}",
    ]
    return f"| {' | '.join(cells)} |\n"


def device_rate(topology: Topology) -> float:
    """Returns the bytes a second of the links that one device can use at once."""
    return topology.links * (topology.accelerator.link_bandwidth or 0.0)


def link_rate(topology: Topology) -> float:
    """Returns the bytes a second that one device can send in a collective of all."""
    rate = device_rate(topology)
    return min(rate, NETWORK_BYTES_PER_SECOND) if spans_hosts(topology) else rate


def spans_hosts(topology: Topology) -> bool:
    return topology.platform == "cuda" and topology.shape[0] > 1


def step_seconds(row: Row) -> float:
    """Returns the estimate of a step, its time on the links corrected for those that count."""
    seconds, rate = row["estimate"]["seconds"], link_rate(parse_topology(row["topology"]))
    return sum(seconds.values()) + seconds["links"] * (row["link_bytes_per_second"] / rate - 1)


def images_per_second_per_device(row: Row) -> float:
    return row["batch"] / step_seconds(row) / row["devices"]


def render(rows: dict[str, Row]) -> None:
    """Makes the document of the rows, in the order of `TOPOLOGIES`."""
    text = HEAD
    firsts: dict[str, Row] = {}
    for name in TOPOLOGIES:
        if name in rows:
            row = rows[name]
            kind = name.partition(":")[0]
            if "error" not in row:
                firsts.setdefault(kind, row)
            text += line(row, firsts.get(kind, row))
    made_by = {
        f"jax {row['versions']['jax']}, Python {row['versions']['python']}"
        for row in rows.values()
        if "versions" in row
    }
    missing = [name for name in TOPOLOGIES if name not in rows]
    text += f"\n{'; '.join(sorted(made_by))}. Not compiled: {', '.join(missing) or 'nothing'}.\n"
    write_atomically(DOCUMENT, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", help="names, with commas; default: those without a row")
    parser.add_argument("--render", action="store_true", help="make the document alone")
    options = parser.parse_args()
    rows: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [name for name in TOPOLOGIES if "estimate" not in rows.get(name, {})]
    largest_first = sorted(missing, key=lambda name: -parse_topology(name).num_devices)
    names = options.topology.split(",") if options.topology else largest_first
    for name in [] if options.render else names:
        row = measure(parse_topology(name))
        seconds = row["seconds_in_all"]
        print(f"{name}: {row.get('error', 'compiled')} in {seconds:.0f} s", flush=True)
        rows[row["topology"]] = row
        write_atomically(RESULTS, json.dumps(rows, indent=1) + "\n")
    render(rows)


if __name__ == "__main__":
    main()
