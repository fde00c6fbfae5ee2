"""One prepared data set, one compilation cache and one uninterrupted run for all tests here."""

import json
import os
import shutil
from pathlib import Path

import pytest
from driver import Trainer
from server import Server


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """Starts training processes with one device each; those still alive are killed at the end."""
    folder, base = tmp_path_factory.mktemp("trainer"), tmp_path_factory.getbasetemp()
    of_all = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # what workers share
    environment = {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONFAULTHANDLER": "1",
        "JAX_COMPILATION_CACHE_DIR": str(of_all / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    trainer = Trainer(environment, data_dir=folder / "data")
    yield trainer
    trainer.end()


@pytest.fixture(scope="session")
def start_server(trainer):
    """Starts servers with one device each; those still alive are killed at the end."""
    servers = []

    def start(*flags: object, **options: str) -> Server:
        servers.append(Server(trainer.environment, *map(str, flags), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()


@pytest.fixture(scope="session")
def reference(trainer, tmp_path_factory) -> Path:
    """The directory of a run that nothing has disturbed; not to be written to."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    code, output = trainer.run(workdir, place=None)
    assert code == 0, output
    return workdir


@pytest.fixture(scope="session")
def killed_run(trainer, reference, tmp_path_factory) -> Path:
    """The directory of a run killed in its second epoch; not to be written to."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    child = trainer.start(workdir)
    child.wait_for("step 14/24")
    child.kill()
    return workdir


@pytest.fixture(scope="session")
def in_bfloat16(reference, tmp_path_factory) -> Path:
    """The whole run as one that computes in bfloat16; not to be written to."""
    run = shutil.copytree(reference, tmp_path_factory.mktemp("in_bfloat16") / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"precision": "bfloat16"}))
    return run


@pytest.fixture
def complete(reference, tmp_path) -> Path:
    """A copy of the whole run."""
    return shutil.copytree(reference, tmp_path / "complete")


@pytest.fixture
def killed(killed_run, tmp_path) -> Path:
    """A copy of the killed run."""
    return shutil.copytree(killed_run, tmp_path / "killed")


@pytest.fixture
def train_here(trainer, capsys, monkeypatch):
    """Returns a function that types the same command in this process: (exit code, output)."""
    from driver import ROOT

    from cnn_jax.__main__ import main

    def run(workdir: Path, *flags: str) -> tuple[int, str]:
        monkeypatch.chdir(ROOT)
        code = main(["train", *trainer.flags, f"--workdir={workdir}", *flags])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run
