"""Preparing with real processes: two at once, killed in the middle, no place to write."""

import json
import os
import signal

import numpy as np
import pytest
from filelock import FileLock

from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError

PREPARE = """
import json, sys
from cnn_jax.data.sources import fingerprint, open_source
source = open_source("fashion_mnist_10k", "train", data_dir=sys.argv[1])
import jax._src.xla_bridge
assert not jax._src.xla_bridge.backends_are_initialized()
assert "tensorflow" not in sys.modules
print(json.dumps(fingerprint(source, batch_size=128, seed=1)))
"""

# Kills itself before it hands image 5,000 of the split to TFDS.
DIE_IN_THE_MIDDLE = (
    """
import itertools, os, signal, sys
from cnn_jax.data.builders import fashion_mnist

def dying(self, images, labels):
    yield from itertools.islice(generate(self, images, labels), int(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)

generate = fashion_mnist.FashionMnist10k._generate_examples
fashion_mnist.FashionMnist10k._generate_examples = dying
"""
    + PREPARE
)

FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from cnn_jax.errors import UserError
from cnn_jax.data.sources import open_source
try:
    open_source("fashion_mnist_10k", "train", data_dir=sys.argv[1], log=lambda line: None)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_prepare_one_data_set(tmp_path, prepared_dir, start_python):
    directory = tmp_path / "cnn_jax_fashion_mnist_10k"
    directory.mkdir()
    with FileLock(directory / ".1.0.0.lock"):
        processes = [start_python(PREPARE, tmp_path) for _ in range(2)]
        announced = [process.stdout.readline() for process in processes]
        assert os.listdir(directory) == [".1.0.0.lock"]
    results = [process.communicate() for process in processes]

    assert announced == [f"preparing cnn_jax_fashion_mnist_10k in {directory}/1.0.0\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]
    # Nothing of TFDS's own chatter: one fingerprint on stdout, nothing on stderr.
    assert results[0] == results[1]
    assert results[0][1] == ""
    expected = open_source("fashion_mnist_10k", "train", data_dir=str(prepared_dir))
    assert json.loads(results[0][0])["num_examples"] == len(expected)
    assert sorted(os.listdir(directory)) == [".1.0.0.lock", "1.0.0"]


def test_prepared_data_set_needs_no_lock_and_says_nothing(prepared_dir):
    lines = []
    with FileLock(prepared_dir / "cnn_jax_fashion_mnist_10k" / ".1.0.0.lock"):
        open_source("fashion_mnist_10k", "test", data_dir=str(prepared_dir), log=lines.append)
    assert lines == []


@pytest.mark.parametrize("examples_before_death", [0, 5000])
def test_killed_process_leaves_nothing_in_the_way(
    tmp_path, prepared_dir, start_python, examples_before_death
):
    dead = start_python(DIE_IN_THE_MIDDLE, tmp_path, examples_before_death)
    dead.communicate()
    directory = tmp_path / "cnn_jax_fashion_mnist_10k"
    assert dead.returncode == -signal.SIGKILL
    assert [path.name for path in directory.glob("incomplete.*")] != []
    assert not (directory / "1.0.0").exists()

    source = open_source("fashion_mnist_10k", "train", data_dir=str(tmp_path))
    expected = open_source("fashion_mnist_10k", "train", data_dir=str(prepared_dir))
    everything = np.arange(len(expected))
    np.testing.assert_equal(source.batch(everything), expected.batch(everything))
    assert list(directory.glob("incomplete.*")) == []


def test_default_directory_is_that_of_tfds(tmp_path, start_python, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    process = start_python(PREPARE, "")
    process.communicate()
    assert process.returncode == 0
    assert (tmp_path / "tfds" / "cnn_jax_fashion_mnist_10k" / "1.0.0").is_dir()


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.*--config\.data\.data_dir=DIR"):
        open_source("fashion_mnist_10k", "train", data_dir=str(tmp_path / "file"))


def test_full_disk(tmp_path, start_python):
    """A limit on the size of a file stands for a full disk: the same write fails."""
    output, _ = start_python(FULL_DISK, tmp_path).communicate()
    assert "cannot write the data set" in output
    assert "File too large" in output
    assert os.listdir(tmp_path / "cnn_jax_fashion_mnist_10k") == [".1.0.0.lock"]


@pytest.mark.parametrize("damage", ["{", None])
def test_damaged_metadata(own_prepared_dir, damage):
    directory = own_prepared_dir / "cnn_jax_fashion_mnist_10k" / "1.0.0"
    if damage is None:
        (directory / "dataset_info.json").unlink()
    else:
        (directory / "dataset_info.json").write_text(damage)
    with pytest.raises(UserError, match=f"{directory} is damaged"):
        open_source("fashion_mnist_10k", "train", data_dir=str(own_prepared_dir))
