"""Images a second of a core: one process on one core against two processes on two.

    python -m benchmarks.two_processes

Both train the network of `configs/quickstart.py` with one virtual CPU device a process and 64
images a device; each process is held to a core of its own, so that they differ in the collectives
alone. Rounds take turns, and each rate is the median of the reports of a run but its first.
It needs two quiet cores. Keeps benchmarks/results/two_processes.json.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cnn_jax.runtime.platform import versions
from cnn_jax.storage import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "two_processes.json"
IMAGES_PER_DEVICE = 64


def images_per_second_per_core(processes: int, epochs: int, folder: Path) -> float:
    """Trains in `processes` processes, one a core; returns the median rate, divided by them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        *(sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={folder}"),
        f"--config.batch_size={IMAGES_PER_DEVICE * processes}",
        f"--config.num_epochs={epochs}",
        "--config.schedule.warmup_epochs=0.5",
        "--config.log.every_steps=20",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    place = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}"]
    children = [
        subprocess.Popen(
            ["taskset", "-c", str(index), *command, *place, f"--process-id={index}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for index in range(processes)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"a run of {processes} has failed")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return statistics.median(rates[1:]) / processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(options.rounds):
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                rate = images_per_second_per_core(processes, options.epochs, Path(folder) / "run")
            rates[str(processes)].append(rate)
            print(f"{processes} x 1 core: {rate:,.0f} images/s a core", flush=True)
    share = statistics.median(rates["2"]) / statistics.median(rates["1"])
    print(f"two processes keep {share:.1%} of the rate of one")
    result: dict[str, Any] = {
        "images_per_second_per_core": rates,
        "share": share,
        "load": os.getloadavg(),
        "versions": versions(),
    }
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
