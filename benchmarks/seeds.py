"""Trains a configuration with several seeds, each from the command line in an empty directory.

    python benchmarks/seeds.py --config configs/quickstart.py --seeds 3

Prints accuracy (last epoch), wall time from the command to the summary, and the share of the
training time spent waiting for data, and keeps them in benchmarks/results/<config>.json with
machine and versions. The first run also prepares the data set; a last start has nothing to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train(config: Path, seed: int, workdir: Path, data_dir: Path) -> tuple[float, dict]:
    """Returns the seconds that the command took and the summary that it left."""
    command = [
        sys.executable,
        "train.py",
        f"--config={config}",
        f"--config.seed={seed}",
        f"--config.data.data_dir={data_dir}",
        f"--workdir={workdir}",
    ]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start, json.loads((workdir / "summary.json").read_text())


def processor() -> str:
    """Returns the name of the processor as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(options.seeds):
            workdir = Path(directory, str(seed))
            wall, summary = train(options.config, seed, workdir, Path(directory, "data"))
            seconds = summary["seconds"]
            runs.append(
                {
                    "seed": seed,
                    "test_accuracy": summary["test/accuracy"],
                    "wall_seconds": round(wall, 1),
                    "waiting_for_data": round(seconds["waiting for data"] / seconds["training"], 4),
                    "seconds": {part: round(value, 2) for part, value in seconds.items()},
                }
            )
        again, _ = train(options.config, seed, workdir, Path(directory, "data"))

    accuracies = [run["test_accuracy"] for run in runs]
    result = {
        "command": f"python benchmarks/seeds.py --config {options.config} --seeds {options.seeds}",
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "versions": summary["versions"],
        "mean_test_accuracy": round(statistics.mean(accuracies), 5),
        "deviation": round(statistics.stdev(accuracies), 5) if len(runs) > 1 else None,
        "largest_wall_seconds": max(run["wall_seconds"] for run in runs),
        "seconds_of_a_start_with_nothing_to_do": round(again, 1),
        "runs": runs,
    }
    path = ROOT / "benchmarks" / "results" / f"{options.config.stem}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
