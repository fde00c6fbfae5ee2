"""Kills training at random instants and starts it again, until the bits at the end are compared.

    python benchmarks/random_kills.py --kills 200
    python benchmarks/random_kills.py --kills 200 --processes 2

One run of configs/quickstart.py, shortened to `--epochs` and saved every 20 steps, is left alone.
Others are killed, SIGKILL or SIGTERM at random, at an instant that is uniform over the time that a
start takes and `--seconds` of training, and started again with the same command. Every run that
gets to its end must have the weights of the first, bit for bit, and its evaluations (of the rows
from training, SIGTERM adds one, as it saves between two reports); so the
kills of a run all count or none does. Of several processes one is hit, at random, and all must end.
The result is kept in benchmarks/results/random_kills.json, by number of processes.
"""

import argparse
import collections
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from seeds import processor

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "random_kills.json"
PEER_TIMEOUT = 10
"""Seconds after which the other process ends that was not hit; by default it would take 60."""

JOIN_TIMEOUT = 15
"""The same for one that was hit before it joined; by default it would take 300."""

HANG = 600
"""Seconds after which a process that was left alone, or hit, is taken to hang."""

PHASES = {
    "stopped": "stopping",
    "epoch": "evaluating or saving",
    "step": "training",
    "going on": "restoring",
    "compiling": "compiling",
}
"""What a process was doing when it was hit, by the start of the last such line it had printed."""


class Start:
    """One start of the command, as one process or several."""

    def __init__(self, command: list[str], processes: int, log: Path) -> None:
        self._log = log
        self._file = log.open("w")
        flags = [[]]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            flags = [
                [
                    f"--coordinator={address}",
                    f"--num-processes={processes}",
                    f"--process-id={each}",
                    f"--peer-timeout={PEER_TIMEOUT}",
                    f"--join-timeout={JOIN_TIMEOUT}",
                ]
                for each in range(processes)
            ]
        self.processes = [
            subprocess.Popen([*command, *each], cwd=ROOT, stdout=self._file, stderr=self._file)
            for each in flags
        ]

    def end(self) -> list[int]:
        """Returns the exit codes; a process that does not end is killed and fails the benchmark."""
        try:
            return [process.wait(HANG) for process in self.processes]
        except subprocess.TimeoutExpired:
            sys.exit(f"a process hangs:\n{self.output()}")
        finally:
            for process in self.processes:
                process.kill()
            self._file.close()

    def output(self) -> str:
        return self._log.read_text()

    def phase(self) -> str:
        for line in reversed(self.output().splitlines()):
            for start, phase in PHASES.items():
                if line.startswith(start):
                    return phase
        return "opening"


def final_state(workdir: Path) -> dict[str, bytes]:
    """Returns the bytes of every array of the last checkpoint by its path, and of the metrics."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    steps = [int(name) for name in names if name.isdigit()]
    directory = workdir / "checkpoints" / str(max(steps)) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(directory).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(directory, restore_args=arguments)
    arrays = {
        jax.tree_util.keystr(p): leaf.tobytes() for p, leaf in jax.tree.leaves_with_path(state)
    }
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "test/loss" in row]
    told = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
    return {**arrays, "metrics": json.dumps(told).encode()}


def hit(start: Start, chance: random.Random, horizon: float) -> tuple[str, str, bool]:
    """Kills one process at a random instant; returns signal, phase, and if it was in time."""
    signum = chance.choice((signal.SIGKILL, signal.SIGTERM))
    victim = chance.choice(start.processes)
    try:
        victim.wait(chance.uniform(0, horizon))
    except subprocess.TimeoutExpired:
        phase = start.phase()
        victim.send_signal(signum)
        codes = start.end()
        if "Traceback" in start.output():
            sys.exit(f"a traceback after {signum.name}, {phase}, exit {codes}:\n{start.output()}")
        return signum.name, phase, True
    start.end()
    return signum.name, "", False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    begin = time.perf_counter()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"

    counts: collections.Counter[str] = collections.Counter()
    phases: collections.Counter[str] = collections.Counter()
    exact = runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")

        def start(workdir: str) -> Start:
            command = [
                sys.executable,
                "train.py",
                "--config=configs/quickstart.py",
                f"--config.num_epochs={options.epochs}",
                "--config.checkpoint.every_steps=20",
                f"--config.data.data_dir={folder / 'data'}",
                f"--workdir={folder / workdir}",
            ]
            return Start(command, options.processes, folder / "log")

        def finish(workdir: str) -> float:
            """Returns the seconds from the command to its end, which must be good."""
            since = time.perf_counter()
            last = start(workdir)
            if any(last.end()):
                sys.exit(f"{workdir} does not end well:\n{last.output()}")
            return time.perf_counter() - since

        finish("reference")
        reference = final_state(folder / "reference")
        horizon = finish("reference") + options.seconds  # nothing left to do: a start alone

        while sum(counts.values()) < options.kills:
            workdir, kills, ended = f"run{runs}", 0, False
            while not ended and sum(counts.values()) < options.kills:
                signum, phase, in_time = hit(start(workdir), chance, horizon)
                ended = not in_time
                if in_time:
                    print(f"{sum(counts.values()) + 1} killed: {signum}, {phase}", flush=True)
                    counts[signum] += 1
                    phases[phase] += 1
                    kills += 1
            finish(workdir)
            state = final_state(folder / workdir)
            different = [key for key in reference if state.get(key) != reference[key]]
            exact += 0 if different or state.keys() != reference.keys() else kills
            runs += 1
            print(f"{sum(counts.values())} kills, {exact} exact, {runs} runs", flush=True)
            if different:
                print(f"  {workdir} differs in {different[:5]}", flush=True)

    result = {
        "command": f"python benchmarks/random_kills.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "orbax-checkpoint": ocp.__version__,
        },
        "kills": sum(counts.values()),
        "bit_identical": exact,
        "runs": runs,
        "signals": dict(counts),
        "phases": dict(phases),
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[f"{options.processes} processes"] = result
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(exact != sum(counts.values()))


if __name__ == "__main__":
    main()
