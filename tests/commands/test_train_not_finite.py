"""A number that is not finite: found in time, its place named, its step skipped, bits unchanged."""

import json
import shutil

import numpy as np
import pytest
from driver import (
    ROOT,
    TOTAL_STEPS,
    assert_same_run,
    read_metrics,
    read_state,
    saved_steps,
)

from cnn_jax.commands import train as command
from cnn_jax.data.pipeline import batch_indices

pytestmark = pytest.mark.usefixtures("compile_quickly")  # where training is in this process

ROLLBACK = "--config.faults.on_nan=rollback"
PLACE = "what enters the model (the images as augmented) is the first that is not finite"


def step_of(epoch, example):
    """The step that trains on the example in the epoch."""
    for step in range(1, TOTAL_STEPS + 1):
        seen, epochs = batch_indices(512, batch_size=64, seed=0, step=step - 1)
        if ((seen == example) & (epochs == epoch)).any():
            return step
    raise LookupError


FIRST, SECOND = step_of(1, 7), step_of(2, 7)
POISONED = ("tests/commands/poisoned.py", "1,7;2,7")


@pytest.fixture(scope="module")
def rolled_back(trainer, tmp_path_factory):
    """The directory and the output of a run with two poisoned steps that was left alone."""
    workdir = tmp_path_factory.mktemp("rolled_back") / "run"
    environment = {"PYTHONPATH": str(ROOT)}
    flags = (ROLLBACK, "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=30")
    code, output = trainer.run(workdir, *flags, program=POISONED, environment=environment)
    assert code == 0, output
    return workdir, output


def assert_step_changed_nothing_but_its_number(workdir, step):
    before, after = (read_state(workdir / "checkpoints" / str(each)) for each in (step - 1, step))
    assert after.pop("['step']") == before.pop("['step']") + 1
    for name, array in after.items():
        assert array.tobytes() == before[name].tobytes(), name


def test_a_bad_step_changes_nothing_but_its_number(rolled_back):
    workdir, output = rolled_back
    skipped = json.loads((workdir / "skipped.json").read_text())
    assert {int(step) for step in skipped} == {FIRST, SECOND}
    assert json.loads((workdir / "summary.json").read_text())["skipped_steps"] == [FIRST, SECOND]
    for step in (FIRST, SECOND):
        assert f"step {step}: {PLACE}; the step is skipped" in output
        assert_step_changed_nothing_but_its_number(workdir, step)
        assert step not in [row["step"] for row in read_metrics(workdir) if "train/loss" in row]


def test_the_learning_rate_does_not_move_on_in_a_skipped_step(rolled_back):
    rates = [row["learning_rate"] for row in read_metrics(rolled_back[0]) if "train/loss" in row]
    updates = np.arange(TOTAL_STEPS - 2)
    warmup, rest = updates / 8, (updates - 8) / 16
    expected = 0.1 * np.where(updates < 8, warmup, (1 + np.cos(np.pi * rest)) / 2)
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_killed_after_it_skipped_it_ends_with_the_same_bits(trainer, tmp_path, rolled_back):
    workdir = tmp_path / "run"
    environment = {"PYTHONPATH": str(ROOT)}
    flags = (ROLLBACK, "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=30")
    options = {"program": POISONED, "environment": environment}
    child = trainer.start(workdir, *flags, **options)
    child.wait_for("the step is skipped")
    child.kill()
    for name in ("with", "without"):
        copy = shutil.copytree(workdir, tmp_path / name)
        if name == "without":
            (copy / "skipped.json").unlink()
        code, output = trainer.run(copy, *flags, **options)
        assert code == 0, output
        assert_same_run(copy, rolled_back[0])
        skipped = json.loads((copy / "summary.json").read_text())["skipped_steps"]
        assert skipped == [FIRST, SECOND]


@pytest.mark.slow
def test_streamed_to_two_processes_all_name_the_same_places(trainer, tmp_path):
    """An image in one step, and in a later one the gradient of a layer alone."""
    poison = ("tests/commands/poisoned.py", "1,7;gradient:2,7")
    options = {"program": poison, "environment": {"PYTHONPATH": str(ROOT)}}
    workdir = tmp_path / "run"
    codes, outputs = trainer.run_two(
        workdir,
        *(ROLLBACK, "--config.faults.max_skipped=1", "--config.data.residency=host"),
        *("--config.checkpoint.every_steps=1", "--config.checkpoint.keep=30"),
        of_each=[options, options],
    )
    assert codes == [1, 1], outputs
    place = "the gradient at the output of stage1_block1/conv1/norm (BatchNorm)"
    for output in outputs:
        assert (
            f"training has diverged: step {SECOND}: {place} is the first that is not finite, "
            "after 1 steps that were skipped"
        ) in output
        assert "Traceback" not in output
    skipped = json.loads((workdir / "skipped.json").read_text())
    assert skipped == {str(FIRST): f"step {FIRST}: {PLACE}"}
    assert_step_changed_nothing_but_its_number(workdir, FIRST)
    assert max(saved_steps(workdir)) < SECOND


@pytest.fixture
def poisoned_here(train_here, monkeypatch):
    """Types the command in this process, on 8 devices, with poison of its own."""
    from poisoned import poisoning

    from cnn_jax import plan

    def run(workdir, poison, *flags):
        make_augment, normalize = poisoning(poison)
        monkeypatch.setattr(plan, "make_augment", make_augment)
        monkeypatch.setattr(plan, "normalize", normalize)
        return train_here(workdir, *flags)

    return run


def test_it_stops_in_time_and_names_the_place(poisoned_here, tmp_path, monkeypatch):
    reached = []
    rewind = command._Training._rewind

    def watch(training, error):
        reached.append(training.step)
        rewind(training, error)

    monkeypatch.setattr(command._Training, "_rewind", watch)
    flags = ("--config.log.every_steps=1000", "--config.checkpoint.every_steps=0")
    code, output = poisoned_here(
        tmp_path / "run", [(1, 7)], *flags, "--config.faults.nan_check_every=4"
    )
    assert code == 1
    assert f"training has diverged: step {FIRST}: {PLACE}. " in output
    assert "The newest checkpoint, step 8, is good" in output
    assert reached[0] - FIRST < 4
    assert saved_steps(tmp_path / "run") == [8]
    state = read_state(tmp_path / "run" / "checkpoints" / "8")
    assert all(np.isfinite(array).all() for array in state.values())
    assert "Traceback" not in output


@pytest.mark.parametrize("every", [3, 8])
def test_however_often_it_looks_it_waits_for_no_step_under_way(
    train_here, tmp_path, monkeypatch, every
):
    """One wait a step, for the one two before it, and what is read has ended."""
    waits, reads, looking = [], [], []
    look, refuse, wait = (
        command._Training._look_back,
        command._refuse_not_finite,
        command.jax.block_until_ready,
    )

    def watched_look(training):
        looking.append(training.window)
        look(training)
        looking.clear()

    def watched_refuse(window):
        if looking:
            under_way = [id(sums) for _, sums in looking[0][-2:]]
            assert not {id(sums) for _, sums in window} & set(under_way)
            reads.append(len(window))
        refuse(window)

    def watched_wait(values):
        if looking:
            assert values is looking[0][-3][1]
            waits.append(values)
        return wait(values)

    monkeypatch.setattr(command._Training, "_look_back", watched_look)
    monkeypatch.setattr(command, "_refuse_not_finite", watched_refuse)
    monkeypatch.setattr(command.jax, "block_until_ready", watched_wait)
    flags = ("--config.log.every_steps=1000", "--config.checkpoint.every_steps=0")
    flags = (*flags, "--config.num_epochs=2", f"--config.faults.nan_check_every={every}")
    code, output = train_here(tmp_path / "run", *flags)
    assert code == 0, output
    assert len(waits) == 2 * (8 - 2), "the first two of each epoch follow a report"
    assert len(reads) == {3: 16, 8: 2}[every]


def test_too_many_bad_steps_stop_it(poisoned_here, tmp_path):
    flags = (ROLLBACK, "--config.faults.max_skipped=1", "--config.num_epochs=3")
    code, output = poisoned_here(tmp_path / "run", [(0, 7), (1, 7)], *flags)
    assert code == 1
    assert f"step {step_of(0, 7)}: {PLACE}; the step is skipped" in output
    assert f"training has diverged: step {FIRST}: {PLACE}, after 1 steps that were" in output


def test_a_machine_that_does_not_compute_the_same_twice_is_told(train_here, killed, monkeypatch):
    """A bit that flips once: the loss of one step, read once, is not a number."""
    step = max(saved_steps(killed)) + 1
    refuse, once = command._refuse_not_finite, [step]

    def flip(window):
        if once and any(step in steps for steps, _ in window):
            once.clear()
            raise command.NotFiniteError(f"at step {step} the loss is nan")
        refuse(window)

    monkeypatch.setattr(command, "_refuse_not_finite", flip)
    code, output = train_here(killed)
    assert code == 1
    assert f"at step {step} the loss is nan, but computed again every number is finite" in output


def test_without_poison_nothing_is_skipped(reference):
    assert not (reference / "skipped.json").exists()
    assert json.loads((reference / "summary.json").read_text())["skipped_steps"] == []
