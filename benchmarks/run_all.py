"""Every measure of speed that this machine can take, and one table of all that were ever kept.

    python -m benchmarks.run_all

Takes the measures below that this machine can take and that are not in benchmarks/results/ yet, one
after the other, each from the command line, and writes the table into docs/performance.md. Stopped,
it goes on with the next one. What scatters or had company is not kept, and is taken again the next
time.

    python -m benchmarks.run_all --list                     # what there is, and how long it takes
    python -m benchmarks.run_all --only cpu_resnet50_step   # these anew
    python -m benchmarks.run_all --render                   # the table alone

On the CPU it needs an otherwise idle machine and the extra `parity`, which brings PyTorch.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.static_table import provenance
from cnn_jax.runtime.platform import HUGE_PAGES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN = "<!-- made by benchmarks/run_all.py -->"
END = "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A command of this package, and what to reach with it.

    Attributes:
      arguments: of `python -m cnn_jax bench`.
      platform: "cpu" or "gpu", where it is to be taken.
      targets: by peer, the least speed as a share of that peer's.
      minutes: it takes about, on 2 cores or on a card.
      environment: what stands before the command, variables of the environment and their values.
    """

    arguments: str
    platform: str
    targets: Mapping[str, float]
    minutes: int
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """Returns the command as it is typed."""
        before = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*before, "python -m cnn_jax bench", self.arguments])


RESNET50 = "--model resnet50 --image 224"
MEASURES = {
    "cpu_resnet50_step": Measure(
        f"step {RESNET50} --batch 16 --precision float32 --peer linen,torch",
        platform="cpu",
        targets={"linen": 2.0, "torch": 0.9},
        minutes=10,
    ),
    "cpu_resnet50_step_huge_pages": Measure(
        f"step {RESNET50} --batch 16 --precision float32 --peer linen,torch",
        platform="cpu",
        targets={"linen": 2.0, "torch": 0.9},
        minutes=10,
        environment={"GLIBC_TUNABLES": f"{HUGE_PAGES}=1"},
    ),
    "cpu_quickstart_step": Measure(
        "step --config configs/quickstart.py --peer linen,torch",
        platform="cpu",
        targets={"torch": 1.0},
        minutes=2,
    ),
    "cpu_fashion_mnist_step": Measure(
        "step --config configs/fashion_mnist.py --peer linen,torch",
        platform="cpu",
        targets={"torch": 1.0},
        minutes=2,
    ),
    "cpu_resnet50_predict_1": Measure(
        f"predict {RESNET50} --batch 1 --precision float32 --peer linen,torch",
        platform="cpu",
        targets={"torch": 1.0},
        minutes=3,
    ),
    "cpu_resnet50_predict_16": Measure(
        f"predict {RESNET50} --batch 16 --precision float32 --peer linen,torch",
        platform="cpu",
        targets={"torch": 1.0},
        minutes=3,
    ),
    "gpu_resnet50_step_256": Measure(
        f"step {RESNET50} --batch 256 --precision bfloat16 --peer linen,torch,torch-compile",
        platform="gpu",
        targets={"torch": 1.15, "torch-compile": 1.15},
        minutes=4,
    ),
    "gpu_resnet50_step_1024": Measure(
        # The fastest peer alone: four sides would need more memory than one card has.
        f"step {RESNET50} --batch 1024 --precision bfloat16 --peer torch-compile",
        platform="gpu",
        targets={"torch-compile": 1.15},
        minutes=5,
    ),
}
"""By the name of the file that keeps the result."""


def platform() -> str:
    """Returns JAX's default platform, asked in a process of its own, which then leaves a card."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def path_of(name: str) -> Path:
    return RESULTS / f"{name}.json"


def take(name: str) -> bool:
    """Takes a measure; returns whether it could be kept."""
    path = path_of(name)
    fresh = path.with_suffix(".json.new")
    fresh.unlink(missing_ok=True)
    measure = MEASURES[name]
    command = [sys.executable, "-m", "cnn_jax", "bench", *measure.arguments.split()]
    print(f"{name}: {measure.command}", flush=True)
    start = time.perf_counter()
    environment = {
        **os.environ,
        **measure.environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([*command, "--json", str(fresh)], cwd=ROOT, env=environment)
    print(f"{name}: exit code {done.returncode}, {time.perf_counter() - start:.0f} s\n", flush=True)
    if done.returncode != 0:
        return False
    result = json.loads(fresh.read_text())
    result["command"] = measure.command
    result["commit"] = provenance()["commit"]
    fresh.write_text(json.dumps(result, indent=2) + "\n")
    fresh.replace(path)
    return True


HEADER = (
    "measure",
    "machine",
    "images/s: ours",
    "beside it",
    "ours as a share of it",
    "to reach",
    "compile, s: ours, it",
    "MB an image",
    "of the bound",
)


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of these results, and what is not among them."""
    rows: list[Sequence[str]] = [HEADER, ["---"] * 3 + ["---"] + ["--:"] * 5]
    for name, result in results.items():
        ours = result["sides"]["ours"]
        for number, (peer, ratio) in enumerate(result["ratios"].items()):
            first = number == 0
            target = MEASURES[name].targets.get(peer)
            device = result["device"].partition(" (")[0].partition(" x ")[2]
            rows.append(
                [
                    f"`{name}`" if first else "",
                    (result["machine"] if device == "cpu" else device) if first else "",
                    _rate(ours) if first else "",
                    f"{peer} {_rate(result['sides'][peer])}",
                    f"{ratio:.2f}",
                    "" if target is None else f"{target:g}",
                    ", ".join(_compiling(each) for each in (ours, result["sides"][peer])),
                    f"{ours['bytes_per_image'] / 1e6:,.0f}" if first else "",
                    f"{ours['share_of_bound']:.0%}" if first else "",
                ]
            )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    origins: dict[str, list[str]] = {}
    for name, result in results.items():
        versions = ", ".join(
            f"{package} {result['versions'][package]}"
            for package in ("jax", "flax", "torch")
            if package in result["versions"]
        )
        origin = f"{result['date'].partition(' ')[0]}, commit {result['commit']}, {versions}"
        origins.setdefault(origin, []).append(f"`{name}`")
    missing = [f"`{name}`" for name in MEASURES if name not in results]
    lines += [
        "",
        *(f"- {', '.join(names)}: {origin}" for origin, names in origins.items()),
        *(f"- `{name}`: `{MEASURES[name].command}`" for name in results),
        f"- not measured yet: {', '.join(missing) or 'nothing'}",
    ]
    return "\n".join(lines)


def _compiling(side: Mapping[str, Any]) -> str:
    seconds = sum(side["compile_seconds"].values())
    return f"{seconds:.1f}" if seconds else "none"


def _rate(side: Mapping[str, Any]) -> str:
    return f"{side['images_per_second']:,.4g} ± {side['spread']:.1%}"


def document(text: str, table: str) -> str:
    """Returns the document with the table in its place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT} must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def write_table() -> None:
    kept = {
        name: json.loads(path_of(name).read_text()) for name in MEASURES if path_of(name).exists()
    }
    DOCUMENT.write_text(document(DOCUMENT.read_text(), render(kept)))


def main() -> int:
    """Returns 0, or 1 where a measure could not be kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="these measures anew, such as cpu_resnet50_step")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--render", action="store_true", help="make the table only")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else []
    for name in only:
        if name not in MEASURES:
            parser.error(f"--only {name}: must be one of {', '.join(MEASURES)}")
    if options.list:
        width = max(map(len, MEASURES))
        for name, measure in MEASURES.items():
            kept = "kept" if path_of(name).exists() else "not yet"
            print(f"{name:<{width}}  {measure.platform}  about {measure.minutes} minutes  {kept}")
        return 0
    refused = []
    if not options.render:
        here = platform()
        for name in only or [name for name in MEASURES if not path_of(name).exists()]:
            if MEASURES[name].platform != here:
                print(f"{name}: needs a {MEASURES[name].platform}; this machine has a {here}")
            elif not take(name):
                refused.append(name)
            else:
                write_table()
    write_table()
    if refused:
        print(f"not kept: {', '.join(refused)}")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
