"""Files and directories of weights: the same bits back, whole or not at all, damage found."""

import collections
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.runtime import weight_files
from cnn_jax.runtime.checkpoint import Checkpoints
from cnn_jax.runtime.weight_files import (
    read_directory,
    read_tensors,
    sha256,
    write_directory,
    write_tensors,
)
from cnn_jax.training.state import TrainState

FIXTURES = Path(__file__).with_name("torch_files")
DTYPES = (
    *(np.float64, np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8, np.bool_),
    np.complex64,
)
VARIABLES = {
    "params": {
        "conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "half": {"scale": np.arange(3).astype(jnp.bfloat16), "bias": np.ones(3, np.float16)},
        "double": {"scale": np.arange(3) / 3},
    },
    "batch_stats": {"mean": np.full(3, 1 / 3, np.float32)},
}
RECORD = {"model": {"name": "resnet_mini", "arguments": {"stage_sizes": [1, 2]}}, "source": {}}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


class TestFiles:
    def test_safetensors_come_back_as_they_were(self, tmp_path):
        tensors = {np.dtype(dtype).name: np.ones((2, 3), dtype) for dtype in DTYPES}
        turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
        tensors |= {"turned": turned, "empty": np.zeros((0, 3)), "scalar": np.array(7)}
        write_tensors(tmp_path / "w.safetensors", tensors)
        assert_same(read_tensors(tmp_path / "w.safetensors"), tensors)

    def test_files_of_other_programs_are_read(self, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file, save_file

        tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor(3)}
        save_file(tensors, tmp_path / "a.safetensors")
        found = read_tensors(tmp_path / "a.safetensors")
        write_tensors(tmp_path / "b.safetensors", found)
        again = load_file(tmp_path / "b.safetensors")
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin"])
    def test_files_of_torch_are_known_by_their_name(self, suffix, tmp_path):
        path = shutil.copy(FIXTURES / "zip.pth", tmp_path / f"w{suffix}")
        assert "whole" in read_tensors(path)

    def test_an_existing_file_is_left_alone(self, tmp_path):
        path = tmp_path / "w.safetensors"
        path.write_text("mine")
        with pytest.raises(UserError, match="exists already and is left as it is"):
            write_tensors(path, {})
        assert path.read_text() == "mine"

    def test_what_cannot_be_written_is_one_message(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
            write_tensors(tmp_path / "none" / "w.safetensors", {})

    @pytest.mark.parametrize("cut", [0, 5, 40, -1])
    def test_a_damaged_file_is_one_message(self, cut, tmp_path):
        path = tmp_path / "w.safetensors"
        write_tensors(path, {"a": np.ones(3)})
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match="is damaged, cut short or no safetensors file"):
            read_tensors(path)

    def test_the_nearest_file_is_named(self, tmp_path):
        (tmp_path / "resnet50.pth").touch()
        (tmp_path / "resnet5.txt").touch()
        with pytest.raises(UserError, match=r"no file '.*resnet5.pth' \(did you .*resnet50.pth'"):
            read_tensors(tmp_path / "resnet5.pth")
        with pytest.raises(UserError, match=r"ends in \.safetensors, \.pth"):
            read_tensors(tmp_path / "resnet5.txt")

    def test_sha256(self, tmp_path):
        (tmp_path / "w").write_bytes(b"abc")
        assert sha256(tmp_path / "w").startswith("ba7816bf8f01cfea")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory of weights; not to be written to."""
    directory = tmp_path_factory.mktemp("written") / "weights"
    write_directory(directory, VARIABLES, record=RECORD)
    return directory


class TestDirectories:
    def test_variables_and_record_come_back_as_they_were(self, written):
        variables, record = read_directory(written)
        assert_same(variables, VARIABLES)
        assert record == RECORD

    def test_a_model_without_statistics(self, tmp_path):
        variables = {"params": VARIABLES["params"]}
        write_directory(tmp_path / "weights", variables, record=RECORD)
        assert_same(read_directory(tmp_path / "weights")[0], variables)

    def test_an_existing_directory_is_left_alone(self, written):
        before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
        with pytest.raises(UserError, match="exists already and is left as it is"):
            write_directory(written, VARIABLES, record={})
        assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before

    def test_nothing_is_left_of_a_directory_that_was_not_finished(self, tmp_path, monkeypatch):
        def fail(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(weight_files, "write_manifest", fail)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            write_directory(tmp_path / "weights", VARIABLES, record=RECORD)
        assert list(tmp_path.iterdir()) == []

    def test_damage_is_found_in_any_file(self, written, tmp_path):
        files = [path for path in written.rglob("*") if path.is_file() and path.stat().st_size]
        assert len(files) >= 5
        for number, path in enumerate(files):
            copy = shutil.copytree(written, tmp_path / str(number))
            damage(copy / path.relative_to(written))
            if path.parent == written and path.name != "manifest.json":
                continue  # orbax's own note on the directory, which nobody reads
            with pytest.raises(UserError, match="cannot be used: "):
                read_directory(copy)

    def test_what_holds_no_weights_is_one_message(self, tmp_path):
        with pytest.raises(UserError, match="holds no good checkpoint; it must be"):
            read_directory(tmp_path)

    def test_the_newest_good_checkpoint_of_a_run_is_read(self, tmp_path, capfd):
        run = tmp_path / "run"
        checkpoints = Checkpoints(run / "checkpoints", keep=3, log=print)
        momentum = collections.namedtuple("Momentum", "trace")
        for step in (3, 6, 12):
            state = TrainState(
                step=jnp.asarray(step),
                params={"kernel": jnp.full((2, 3), step, jnp.float32)},
                batch_stats={"mean": jnp.arange(3.0)},
                opt_state=(momentum({"kernel": jnp.zeros((2, 3))}),),
            )
            checkpoints.save(state, record={"config": {"seed": step}})
        checkpoints.wait()
        checkpoints.close()
        variables, record = read_directory(run)
        assert record == {"config": {"seed": 12}}
        assert_same(
            variables,
            {
                "params": {"kernel": np.full((2, 3), 12, np.float32)},
                "batch_stats": {"mean": np.arange(3, dtype=np.float32)},
            },
        )
        assert read_directory(run / "checkpoints" / "3")[1] == {"config": {"seed": 3}}
        (run / "checkpoints" / "12" / "manifest.json").unlink()
        assert read_directory(run)[1] == {"config": {"seed": 6}}
        assert "Traceback" not in capfd.readouterr().err
