"""Images a second of a core: two processes of one run against two runs of one process.

    python -m benchmarks.two_processes --network resnet18 --images 512
    python -m benchmarks.two_processes --network quickstart --images 64

All train on the images of `configs/quickstart.py` with one virtual CPU device and one computing
thread a process, and the same images a step of each. Always two processes share two cores, so what
differs is the collectives. They are not held to one core each, as the thread of Gloo, which carries
the collectives, polls a lock while the computing thread has it, and on one core that lasts until
the kernel's next turn, 4 ms. Rounds take turns, and each rate is the median of the reports of a run
but its first two. It needs two quiet cores. Keeps benchmarks/results/two_processes.json.
"""

import argparse
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


def images_per_second_per_core(joined: bool, network: str, images: int, steps: int) -> float:
    """Trains in two processes, of one run or of two; returns the median rate of one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    batch_size = images * 2 if joined else images
    steps_an_epoch = min(steps, TRAIN_IMAGES // batch_size)
    command = [
        *("taskset", "-c", "0,1", sys.executable, "train.py", *CONFIGS[network]),
        f"--config.batch_size={batch_size}",
        f"--config.num_epochs={math.ceil(steps / steps_an_epoch)}",
        f"--config.data.train_split=train[:{batch_size * steps_an_epoch}]",
        f"--config.data.test_split=test[:{batch_size}]",
        f"--config.log.every_steps={max(1, steps_an_epoch // 8)}",
    ]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["NPROC"] = "1"  # XLA takes the number of computing threads from it
    with tempfile.TemporaryDirectory() as name:
        workdirs = [Path(name) / ("0" if joined else str(index)) for index in range(2)]
        place = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"] if joined else []
        children = []
        for index, workdir in enumerate(workdirs):
            own = [f"--workdir={workdir}", *([f"--process-id={index}"] if joined else [])]
            children.append(
                subprocess.Popen(
                    [*command, *place, *own],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                )
            )
        if any(code for code in [child.wait() for child in children]):
            raise SystemExit("a run has failed")
        return statistics.mean(_rate(each) for each in workdirs) / (2 if joined else 1)


def _rate(workdir: Path) -> float:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return statistics.median(rates[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=CONFIGS, default="resnet18")
    parser.add_argument("--images", type=int, default=512, help="a step of each process")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"alone": [], "joined": []}
    for _ in range(options.rounds):
        for way, each in rates.items():
            each.append(
                images_per_second_per_core(
                    way == "joined", options.network, options.images, options.steps
                )
            )
            print(f"{way}: {each[-1]:,.1f} images/s a core", flush=True)
    share = statistics.median(rates["joined"]) / statistics.median(rates["alone"])
    print(f"two processes keep {share:.1%} of the rate of one")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{options.network}, {options.images} images a process"] = {
        "images_per_second_per_core": rates,
        "share": share,
        "steps": options.steps,
        "load": os.getloadavg(),
        "versions": versions(),
    }
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
