"""Training in real processes: started, watched, stopped at a chosen moment, and read back."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from preloaded import READ_BY_IMPORTS, Preloaded
from tensorboardX.proto.event_pb2 import Event

ROOT = Path(__file__).parents[2]
TOTAL_STEPS = 24
FLAGS = (
    "--config=configs/default.py",
    "--config.num_epochs=3",
    "--config.batch_size=64",
    "--config.model.width=4",
    "--config.model.stage_sizes=1,",
    "--config.model.stem=medium",
    "--config.model.block=residual",
    "--config.optimizer.learning_rate=0.1",
    "--config.data.train_split=train[:512]",
    "--config.data.test_split=test[:300]",
    "--config.eval.batch_size=8",
    "--config.checkpoint.every_steps=3",
    "--config.log.every_steps=2",
)
"""Three epochs of 8 steps; evaluated in 38 batches, the last one half full; saved every 3 steps."""

QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""For the processes of one run, which all compile what they have not kept from an earlier one.

That two of them end as one does is also seen compiled as in use (test_train_object_storage.py).
"""

HANG = 300
"""Seconds after which a process that should have ended or spoken is taken to hang."""


class Child:
    """A process whose lines, standard error among them, are read as they come."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        preloaded: Preloaded | None = None,
    ) -> None:
        """Starts the command, or a Python file with arguments in a fork of `preloaded`."""
        self.lines: list[str] = []
        read, write = os.pipe()
        self._output = open(read, encoding="utf-8")  # noqa: SIM115
        if preloaded is None:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=write, stderr=write, env=environment
            )
        else:
            self._process = preloaded.start(command, environment, write)
        os.close(write)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def says(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def wait_for(self, seen: str | Callable[[], bool]) -> None:
        """Returns once the text is said or the condition holds; the end of the process fails."""
        holds = (lambda: self.says(seen)) if isinstance(seen, str) else seen
        deadline = time.monotonic() + HANG
        while not holds():
            running = self._process.poll() is None and time.monotonic() < deadline
            assert running or holds(), f"never seen: {seen}\n{self.output}"
            time.sleep(0.001)

    def send(self, signum: int) -> None:
        self._process.send_signal(signum)

    def end(self) -> int:
        """Returns the exit code when the process has ended, as a shell would give it."""
        try:
            code = self._process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGABRT)  # PYTHONFAULTHANDLER says where each thread is
            self._process.wait(HANG)
            self._reader.join(HANG)
            raise AssertionError(f"hung for {HANG} s\n{self.output}") from None
        self._reader.join(HANG)
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """Ends the process as a power cut would."""
        self.send(signal.SIGKILL)
        self.end()

    def _read(self) -> None:
        with self._output as output:
            self.lines.extend(line.rstrip("\n") for line in output)


class Trainer:
    """Starts `python train.py` on the same small task, any number of times."""

    def __init__(self, environment: Mapping[str, str], data_dir: Path) -> None:
        self.flags = [*FLAGS, f"--config.data.data_dir={data_dir}"]
        self.environment = os.environ | environment
        self._children: list[Child] = []
        self._preloaded: dict[Any, Preloaded] = {}

    def start(
        self,
        workdir: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        program: Sequence[str] = ("train.py",),
        place: int | None = 0,
    ) -> Child:
        """Returns a process that trains in `workdir`, started by the command `wrapper` if given.

        It is a fork of what the `place` has preloaded, with hash seeds that it shares with others
        of the place, or, for None and with a wrapper, started from nothing, as in use.
        """
        environment = self.environment | (environment or {})
        command = [*program, *self.flags, f"--workdir={workdir}", *flags]
        if wrapper or place is None:
            child = Child([*wrapper, sys.executable, *command], environment)
        else:
            read = {k: v for k, v in environment.items() if k.startswith(READ_BY_IMPORTS)}
            key = place, *sorted(read.items())
            if key not in self._preloaded:
                self._preloaded[key] = Preloaded(environment, ROOT)
            child = Child(command, environment, self._preloaded[key])
        self._children.append(child)
        return child

    def start_two(
        self,
        workdir: Path,
        *flags: str,
        of_each: Sequence[Mapping[str, Any]] = ({}, {}),
        environment: Mapping[str, str] | None = None,
    ) -> list[Child]:
        """Returns the two processes of a run, compiled `QUICKLY`; `of_each` may give flags and
        options of each.
        """
        place = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
        flags = ("--peer-timeout=30", *flags)
        children = []
        for index, own in enumerate(of_each):
            told = [*place, f"--process-id={index}", *own.get("flags", ())]
            options = {key: value for key, value in own.items() if key != "flags"}
            options["environment"] = {
                **QUICKLY,
                **(environment or {}),
                **own.get("environment", {}),
            }
            children.append(self.start(workdir, *flags, *told, place=index, **options))
        return children

    def run_two(self, workdir: Path, *flags: str, **options: Any) -> tuple[list[int], list[str]]:
        """Returns the exit codes and the outputs of two processes that are left alone."""
        children = self.start_two(workdir, *flags, **options)
        return [child.end() for child in children], [child.output for child in children]

    def run(self, workdir: Path, *flags: str, **options: Any) -> tuple[int, str]:
        """Returns the exit code and the output of a process that is left alone."""
        child = self.start(workdir, *flags, **options)
        return child.end(), child.output

    def end(self) -> None:
        """Kills all processes that are left."""
        for child in self._children:
            child.kill()
        for preloaded in self._preloaded.values():
            preloaded.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def saved_steps(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def read_state(checkpoint: Path) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path in the tree, without the code under test."""
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(checkpoint / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(checkpoint / "state", restore_args=as_numpy)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Returns the rows of a run that no clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def files_of(directory: Path) -> dict[str, bytes]:
    """Returns the content of every file below, by its path."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def assert_same_weights(workdir: Path, reference: Path, step: int = TOTAL_STEPS) -> None:
    """Asserts that two runs have saved the same state at `step`, bit for bit."""
    ours, theirs = (read_state(each / "checkpoints" / str(step)) for each in (workdir, reference))
    assert ours.keys() == theirs.keys()
    parts = {name.split("'")[1] for name in ours} - {"ema"}
    assert parts == {"step", "params", "batch_stats", "opt_state"}
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Asserts that two whole runs have the same weights and have told the same story."""
    assert_same_weights(workdir, reference)
    assert read_metrics(workdir) == read_metrics(reference)


def read_events(workdir: Path) -> dict[tuple[str, int], float]:
    """Returns the TensorBoard events of a run as (tag, step): value, as TensorBoard reads them."""
    scalars: dict[tuple[str, int], float] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, start = path.read_bytes(), 0
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            if start + 16 + length > len(content):
                break
            event = Event.FromString(content[start + 12 : start + 12 + length])
            start += 16 + length
            if event.session_log.status == event.session_log.START:
                scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def assert_events_are_the_rows(workdir: Path) -> None:
    """Asserts that TensorBoard shows the rows of `metrics.jsonl`, each once."""
    rows = read_metrics(workdir)
    expected = {(name, row["step"]): row[name] for row in rows for name in row if name != "step"}
    scalars = {key: x for key, x in read_events(workdir).items() if key[0] != "images_per_second"}
    assert scalars == pytest.approx(expected, rel=1e-6)
