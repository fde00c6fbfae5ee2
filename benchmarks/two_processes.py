"""Images a second of a core, two cores at work: one process, two of one run, two runs.

    python -m benchmarks.two_processes --network resnet18 --images 32
    python -m benchmarks.two_processes --network quickstart --images 64

One process trains with one device, as `train.py` does by default, or with two; two processes with
one device each are one run, or two that know nothing of each other. A core has the same images a
step each time, one computing thread, and no process is held to one core: the thread of Gloo, which
carries the collectives of two processes, polls a lock while the computing thread has it, and on one
core that lasts until the kernel's next turn, 4 ms. Rounds take turns, and each rate is the median
of the reports of a run but its first two. It needs two quiet cores. Keeps
benchmarks/results/two_processes.json.
"""

import argparse
import dataclasses
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cnn_jax.runtime.platform import versions
from cnn_jax.storage import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "two_processes.json"
CONFIGS = {
    "quickstart": ("--config=configs/quickstart.py", "--config.schedule.warmup_epochs=0.5"),
    "resnet18": (
        "--config=configs/synthetic.py",
        "--config.precision=float32",
        "--config.model.name=resnet18",
        "--config.eval.batch_size=32",
    ),
}
TRAIN_IMAGES = 10_000


@dataclasses.dataclass(frozen=True)
class Way:
    """How two cores train."""

    runs: int
    processes: int
    devices: int

    def images_per_second_per_core(self, network: str, images: int, steps: int) -> float:
        """Trains with so many images a core and step; returns the median rate of a core."""
        batch_size = images * 2 // self.runs
        steps_an_epoch = min(steps, TRAIN_IMAGES // batch_size)
        command = [
            *("taskset", "-c", "0,1", sys.executable, "train.py", *CONFIGS[network]),
            f"--config.batch_size={batch_size}",
            f"--config.num_epochs={math.ceil(steps / steps_an_epoch)}",
            f"--config.data.train_split=train[:{batch_size * steps_an_epoch}]",
            f"--config.data.test_split=test[:{batch_size}]",
            f"--config.log.every_steps={max(1, steps_an_epoch // 8)}",
        ]
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
        # XLA takes the number of computing threads from it.
        environment["NPROC"] = str(2 // (self.runs * self.processes))
        with tempfile.TemporaryDirectory() as name:
            workdirs = [Path(name) / str(index) for index in range(self.runs)]
            children = [
                subprocess.Popen(
                    [*command, f"--workdir={workdir}", *place],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                )
                for workdir in workdirs
                for place in places(self.processes)
            ]
            codes = [child.wait() for child in children]
            if any(codes):
                raise SystemExit(f"a run has failed: {codes}")
            return sum(map(_rate, workdirs)) / 2


WAYS = {
    "one process": Way(runs=1, processes=1, devices=1),
    "one process, two devices": Way(runs=1, processes=1, devices=2),
    "two processes": Way(runs=1, processes=2, devices=1),
    "two runs": Way(runs=2, processes=1, devices=1),
}


def places(processes: int) -> list[list[str]]:
    """Returns what each process of a run is told of the others."""
    if processes == 1:
        return [[]]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    of_all = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}"]
    return [[*of_all, f"--process-id={index}"] for index in range(processes)]


def _rate(workdir: Path) -> float:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return statistics.median(rates[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=CONFIGS, default="resnet18")
    parser.add_argument("--images", type=int, default=32, help="a step of each core")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            rate = way.images_per_second_per_core(options.network, options.images, options.steps)
            rates[name].append(rate)
            print(f"{name}: {rate:,.1f} images/s a core", flush=True)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    joined = medians.pop("two processes")
    shares = {name: joined / rate for name, rate in medians.items()}
    for name, share in shares.items():
        print(f"two processes keep {share:.1%} of the rate of {name}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{options.network}, {options.images} images a core"] = {
        "images_per_second_per_core": rates,
        "shares": shares,
        "steps": options.steps,
        "load": os.getloadavg(),
        "versions": versions(),
    }
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
