"""What the second start of each command that compiles costs of the first one's compiling.

    python benchmarks/warm_start.py

For each configuration, command and repeat there is an empty cache: the command compiles into it and
starts again. `compiling` is the time from the first program that is asked for until the last is
there, tracing included: for `train` that of its summary, for the others the sum of their programs,
of which `serve` has one for each size of a batch and one for the evidence, and is told to stop
when it is ready. Two processes of one device each have caches of their own, as on two machines.
`whole` is the time of the process. The target is a warm start of
at most 10 % of the cold one's compiling. The result is kept in benchmarks/results/warm_start.json.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from seeds import processor
from two_processes import places

from cnn_jax.runtime.platform import versions

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "warm_start.json"

SHORT = ("--config.num_epochs=1", "--config.checkpoint.keep=1")
CONFIGS: Mapping[str, Sequence[str]] = {
    "quickstart": (
        "--config=configs/quickstart.py",
        "--config.data.train_split=train[:640]",
        "--config.data.test_split=test[:1024]",
    ),
    "resnet50": (
        "--config=configs/synthetic.py",
        "--config.precision=float32",
        "--config.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.data.train_split=train[:16]",
        "--config.data.test_split=test[:8]",
    ),
}
IMAGES = {"quickstart": (28, 28), "resnet50": (224, 224, 3)}

TIMED = """
import os, signal, sys, time
from cnn_jax.__main__ import main
from cnn_jax.exported import ExportedFile
from cnn_jax.runtime import programs
from cnn_jax.serving import server
from cnn_jax.trained import Trained


def timed(compile):
    def measured(*arguments, **options):
        start = time.perf_counter()
        program = compile(*arguments, **options)
        print(f"compiling {time.perf_counter() - start}", file=sys.stderr)
        return program

    return measured


def say(text):
    if text.startswith("ready"):
        os.kill(os.getpid(), signal.SIGTERM)


foreign_module = programs.foreign_module
programs.foreign_module = lambda: foreign_module() and ""  # this code changes no program
Trained.compile = timed(Trained.compile)
ExportedFile.compile_probabilities = timed(ExportedFile.compile_probabilities)
server._say = say
sys.exit(main(sys.argv[1:]))
"""
"""`python -m cnn_jax`, which says how long it takes to compile; `serve` ends when it is ready."""


def launch(arguments: Sequence[str], cache: Path) -> subprocess.Popen:
    environment = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    """Returns what a process that must succeed has said."""
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(said)
    return said


def run(arguments: Sequence[str], cache: Path) -> tuple[str, float]:
    """Returns what a process that must succeed has said, and its seconds."""
    begin = time.perf_counter()
    said = end(launch(arguments, cache))
    return said, time.perf_counter() - begin


def train(
    workdir: Path, flags: Sequence[str], cache: Path, *, num_processes: int = 1
) -> dict[str, float]:
    begin = time.perf_counter()
    arguments = ["train.py", *flags, *SHORT, f"--workdir={workdir}"]
    processes = [
        launch([*arguments, *place], cache / str(index))
        for index, place in enumerate(places(num_processes))
    ]
    for process in processes:
        end(process)
    whole = time.perf_counter() - begin
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "compiling": summary["seconds"]["compiling"],
        "whole": whole,
        "without tracing": summary["programs"]["without tracing"],
    }


def use(command: Sequence[str], cache: Path) -> dict[str, float]:
    said, whole = run(["-c", TIMED, *command], cache)
    compiling = map(float, re.findall(r"^compiling ([\d.]+)$", said, re.MULTILINE))
    return {"compiling": sum(compiling), "whole": whole}


def measure(config: str, folder: Path, data_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Returns, by command, the seconds of a cold start and of a warm one."""
    flags = [*CONFIGS[config], f"--config.data.data_dir={data_dir}"]
    image = folder / "image.png"
    pixels = np.random.default_rng(0).integers(256, size=IMAGES[config], dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    trained, exported = f"--workdir={folder / 'cold'}", folder / "model.zip"
    starts = {"cold": {}, "warm": {}}
    for start, found in starts.items():
        found["train"] = train(folder / start, flags, folder / "cache of train")
        workdir, cache = folder / f"two {start}", folder / "cache of two"
        found["train, two processes"] = train(workdir, flags, cache, num_processes=2)
    run(["-m", "cnn_jax", "export", trained, f"--to={exported}"], folder / "cache of export")
    for start, found in starts.items():
        commands = {
            "evaluate": ["evaluate", trained],
            "predict": ["predict", trained, "--batch-size=16", str(image)],
            "features": ["features", trained, f"--to={folder / start}.npz", str(image)],
            "serve": ["serve", trained, "--port=0"],
            "serve --model": ["serve", f"--model={exported}", "--port=0"],
        }
        for name, command in commands.items():
            found[name] = use(command, folder / f"cache of {name}")
    return starts


def medians(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in times), 3) for name in times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()

    all_times = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as data_dir:
        for repeat in range(options.repeats):
            for name in options.config:
                with tempfile.TemporaryDirectory() as folder:
                    starts = measure(name, Path(folder), Path(data_dir))
                for start, commands in starts.items():
                    for command, times in commands.items():
                        all_times[name, command][start].append(times)
                        print(repeat, name, command, start, times, flush=True)

    rows = [
        {
            "config": name,
            "command": command,
            **{start: medians(each) for start, each in times.items()},
            "warm of cold, %": round(
                100 * medians(times["warm"])["compiling"] / medians(times["cold"])["compiling"],
                1,
            ),
            "every warm start, s": [round(each["compiling"], 3) for each in times["warm"]],
            "every cold start, s": [round(each["compiling"], 3) for each in times["cold"]],
        }
        for (name, command), times in all_times.items()
    ]
    result = {
        "command": f"python benchmarks/warm_start.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores of {processor()}, {platform.system()}",
        "versions": versions(),
        "repeats": options.repeats,
        "rows": rows,
        "target": "warm of cold: at most 10 %",
    }
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
