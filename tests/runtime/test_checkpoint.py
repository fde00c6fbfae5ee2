"""Checkpoints: whole, verified, the newest and the best; damage of any kind is found."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cnn_jax.errors import UserError
from cnn_jax.runtime.checkpoint import Checkpoints, find_damage
from cnn_jax.training.state import TrainState

RECORD = {"data": {"seed": 0}, "config": {"batch_size": 64}}


def make_state(step, width=3):
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"kernel": jnp.full((2, width), step / 7, jnp.float32)},
        batch_stats={"mean": jnp.arange(width, dtype=jnp.float32)},
        opt_state=({"trace": jnp.full((2, width), -step, jnp.float32)},),
    )


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


class Opened:
    """Checkpoints of a directory, open for the time of a `with`, and the lines they log."""

    def __init__(self, directory, keep=2):
        self.lines: list[str] = []
        self._checkpoints = Checkpoints(directory, keep=keep, log=self.lines.append)

    def __enter__(self):
        return self._checkpoints

    def __exit__(self, *_):
        self._checkpoints.close()


def save(directory, accuracies, **options):
    with Opened(directory, **options) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(make_state(step), record=RECORD, accuracy=accuracy)
        checkpoints.wait()


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def assert_holds(checkpoints, step):
    assert checkpoints.latest_step() == step
    assert checkpoints.record() == RECORD
    restored, expected = checkpoints.restore(abstract(make_state(step))), make_state(step)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_an_empty_directory_holds_nothing(tmp_path):
    with Opened(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() is None


def test_the_newest_comes_back_as_it_was(tmp_path):
    save(tmp_path / "checkpoints", {3: None, 6: 0.5})
    with Opened(tmp_path / "checkpoints") as checkpoints:
        assert_holds(checkpoints, 6)


def test_the_best_stays_beside_the_newest_across_starts(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, {1: 0.1, 2: 0.9, 3: None})
    save(directory, {4: 0.5, 5: None})
    assert steps_in(directory) == [2, 4, 5]
    save(directory, {6: 0.95, 7: None, 8: 0.2})
    assert steps_in(directory) == [6, 7, 8]


def test_of_equals_the_last_is_the_best(tmp_path):
    save(tmp_path / "checkpoints", {1: 0.5, 2: 0.5, 3: 0.1, 4: 0.1, 5: 0.1}, keep=1)
    assert steps_in(tmp_path / "checkpoints") == [2, 5]


@pytest.mark.parametrize(
    ("saved", "again"),
    [
        ({2: None, 3: 0.5}, 0.6),
        ({2: None, 3: 0.5}, None),
        ({3: None}, 0.5),  # the only one is never taken away to be written anew
    ],
)
def test_a_saved_step_is_left_alone(tmp_path, saved, again):
    directory = tmp_path / "checkpoints"
    save(directory, saved, keep=2)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    save(directory, {3: again}, keep=2)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_a_saved_step_gets_the_accuracy_that_it_lacks(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, {2: 0.1, 3: None}, keep=2)
    save(directory, {3: 0.9}, keep=2)
    save(directory, {4: 0.2, 5: 0.2, 6: 0.2}, keep=2)
    assert steps_in(directory) == [3, 5, 6]


def test_another_model_is_one_message(tmp_path):
    save(tmp_path / "checkpoints", {3: None})
    with Opened(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(
            UserError, match="3 holds other arrays than this configuration's"
        ) as error:
            checkpoints.restore(abstract(make_state(3, width=5)))
        assert len(str(error.value)) < 600


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "flipped": flip,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of step 3 and 6, both with an accuracy; not to be written to."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, {3: 0.9, 6: 0.5})
    return directory


def files_of(step_directory):
    files = [path for path in step_directory.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.relative_to(step_directory) for path in files)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_found_and_the_previous_is_used(tmp_path, saved, kind, capfd):
    names = files_of(saved / "6")
    assert len(names) >= 8
    for number, name in enumerate(names):
        directory = shutil.copytree(saved, tmp_path / str(number) / "checkpoints")
        assert find_damage(directory / "6") is None
        DAMAGE[kind](directory / "6" / name)
        opened = Opened(directory)
        with opened as checkpoints:
            if find_damage(saved / "6") is None and checkpoints.latest_step() == 6:
                assert_holds(checkpoints, 6)  # the file holds nothing that a run needs
                assert name.name in ("_CHECKPOINT_METADATA", "commit_success.txt"), name
                continue
            assert_holds(checkpoints, 3)
        (line,) = opened.lines
        assert f"{directory}/6 is skipped" in line
        assert str(name) in line or name.name == "manifest.json"
        assert (tmp_path / str(number) / "damaged" / "6" / "state").is_dir()
    streams = capfd.readouterr()
    assert "Traceback" not in streams.out + streams.err


@pytest.mark.parametrize("kind", ["emptied", "deleted"])
def test_damage_to_an_older_checkpoint_does_not_stop_a_run(tmp_path, saved, kind):
    """A kill may come while orbax deletes an old checkpoint file by file."""
    for number, name in enumerate(files_of(saved / "3")):
        directory = shutil.copytree(saved, tmp_path / str(number) / "checkpoints")
        DAMAGE[kind](directory / "3" / name)
        with Opened(directory) as checkpoints:
            assert_holds(checkpoints, 6)
            checkpoints.save(make_state(9), record=RECORD, accuracy=0.1)
            checkpoints.wait()
            assert_holds(checkpoints, 9)


def test_a_checkpoint_left_half_written_is_no_checkpoint(tmp_path, saved):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    (directory / "6").rename(directory / "6.orbax-checkpoint-tmp-0")
    with Opened(directory) as checkpoints:
        assert_holds(checkpoints, 3)
        checkpoints.save(make_state(6), record=RECORD)
        checkpoints.wait()
        assert_holds(checkpoints, 6)


def test_all_damaged_is_none(tmp_path, saved):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    for step in (3, 6):
        (directory / str(step) / "manifest.json").unlink()
    opened = Opened(directory)
    with opened as checkpoints:
        assert checkpoints.latest_step() is None
    assert len(opened.lines) == 2


def test_a_step_damaged_twice_is_set_aside_twice(tmp_path, saved):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    for _ in range(3):
        (directory / "6" / "manifest.json").unlink()
        save(directory, {6: 0.5})
    assert len(list((tmp_path / "damaged").iterdir())) == 3


def test_averages_are_saved_where_there_are_any_and_nothing_in_their_place_elsewhere(tmp_path):
    """So that a checkpoint from before there were averages is read as one without."""
    plain = make_state(2)
    averaged = plain.replace(ema={"params": plain.params, "batch_stats": plain.batch_stats})
    for state, names in ((plain, set()), (averaged, {"ema"})):
        directory = tmp_path / f"with{len(names)}"
        with Opened(directory) as checkpoints:
            checkpoints.save(state, record=RECORD)
            checkpoints.wait()
            restored = checkpoints.restore(abstract(state))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(directory / "2" / "state").item_metadata.tree
        assert set(tree) == {"step", "params", "batch_stats", "opt_state"} | names
