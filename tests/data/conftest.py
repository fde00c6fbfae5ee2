import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnn_jax.data.sources import open_source


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory) -> Path:
    """A data_dir in which fashion_mnist_10k is prepared; not to be written to."""
    data_dir = tmp_path_factory.mktemp("prepared")
    open_source("fashion_mnist_10k", "test[:1]", data_dir=str(data_dir))
    return data_dir


@pytest.fixture
def own_prepared_dir(prepared_dir, tmp_path) -> Path:
    """A copy of `prepared_dir` to do damage to."""
    return Path(shutil.copytree(prepared_dir, tmp_path / "own"))


@pytest.fixture
def start_python():
    """Starts `python -c code arguments...`, which can import what this process can."""
    started = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
