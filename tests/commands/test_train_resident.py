"""Many steps in a call: cut where something is due, stopped and damaged in the middle.

And images that grow, tested on a part that is held out.
"""

import signal

import pytest
from driver import (
    ROOT,
    TOTAL_STEPS,
    assert_same_run,
    assert_same_weights,
    read_metrics,
    saved_steps,
)
from test_train_not_finite import FIRST, PLACE, POISONED, SECOND

CALLS = (
    "--config.steps_per_call=5",
    "--config.log.every_steps=7",
    "--config.optimizer.learning_rate=0.01",
)
STREAMED = ("--config.data.residency=host", *CALLS[1:])


@pytest.fixture(scope="module")
def called(trainer, tmp_path_factory):
    """The directory of a run that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("called") / "run"
    code, output = trainer.run(workdir, *CALLS)
    assert code == 0, output
    assert "up to 5 steps a call" in output
    return workdir


@pytest.mark.slow
def test_the_rows_are_those_of_streamed_steps(trainer, called, tmp_path):
    code, output = trainer.run(tmp_path / "run", *STREAMED)
    assert code == 0, output
    rows, expected = read_metrics(called), read_metrics(tmp_path / "run")
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, streamed in zip(rows, expected, strict=True):
        assert row == pytest.approx(streamed, rel=1e-3), "another program, so other rounding"
    assert saved_steps(called) == saved_steps(tmp_path / "run")


@pytest.mark.slow
def test_stopped_or_killed_between_calls_it_ends_with_the_same_bits(trainer, called, tmp_path):
    for number, signum in enumerate((signal.SIGTERM, signal.SIGKILL)):
        workdir = tmp_path / str(number)
        child = trainer.start(workdir, *CALLS)
        child.wait_for("step 14/24")
        child.send(signum)
        assert child.end() == 128 + signum
        assert saved_steps(workdir)[-1] < TOTAL_STEPS
        code, output = trainer.run(workdir, *CALLS)
        assert code == 0, output
        assert_same_run(workdir, called)


@pytest.mark.slow
def test_a_bad_step_of_a_call_is_found_and_skipped(trainer, tmp_path):
    options = {"program": POISONED, "environment": {"PYTHONPATH": str(ROOT)}}
    flags = (*CALLS, "--config.faults.on_nan=rollback", "--config.checkpoint.every_steps=0")
    code, output = trainer.run(tmp_path / "run", *flags, **options)
    assert code == 0, output
    for step in (FIRST, SECOND):
        assert f"step {step}: {PLACE}; the step is skipped" in output


@pytest.mark.slow
def test_growing_images_and_a_held_out_part_survive_a_kill(trainer, tmp_path):
    """384 images in batches of 64: 6 steps of each size."""
    flags = (
        "--config.data.holdout=25",
        "--config.data.progressive_sizes=14,20",
        "--config.data.progressive_epochs=1,2",
    )
    code, output = trainer.run(tmp_path / "left alone", *flags)
    assert code == 0, output
    assert "tested on  25 % of train[:512], which is not trained on" in output
    assert "over 128 images" in output
    child = trainer.start(tmp_path / "killed", *flags)
    child.wait_for("step 8/18")
    child.kill()
    code, output = trainer.run(tmp_path / "killed", *flags)
    assert code == 0, output
    assert_same_weights(tmp_path / "killed", tmp_path / "left alone", 18)
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "left alone")
    code, output = trainer.run(tmp_path / "killed", *flags[1:])
    assert code != 0
    assert "data.holdout: 25.0 in the run, 0.0 now" in output
