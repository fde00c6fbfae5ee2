"""A directory that is not as the run would like it: complete, another's, damaged, full, in use."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from driver import (
    assert_same_run,
    assert_same_weights,
    files_of,
    read_metrics,
    read_state,
    saved_steps,
)


def test_a_complete_run_says_so_and_keeps_its_checkpoints(trainer, complete):
    before = files_of(complete / "checkpoints")
    metrics, summary = (complete / "metrics.jsonl").read_text(), complete / "summary.json"
    written = summary.read_text()
    code, output = trainer.run(complete)
    assert code == 0, output
    assert f"{complete}: this run is complete, at step 24 of 24" in output
    assert files_of(complete / "checkpoints") == before
    assert (complete / "metrics.jsonl").read_text() == metrics
    assert summary.read_text() == written


def test_the_summary_is_made_up_for_after_a_kill_before_it(train_here, complete, reference):
    (complete / "summary.json").unlink()
    (complete / "curves.png").unlink()
    code, output = train_here(complete)
    assert code == 0, output
    assert (complete / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "summary.json" in output
    summary, expected = (
        json.loads((path / "summary.json").read_text()) for path in (complete, reference)
    )
    for key in ("step", "test/accuracy", "test/loss", "best"):
        assert summary[key] == expected[key]


def test_another_configuration_is_refused_with_every_difference(train_here, killed):
    before = files_of(killed)
    code, output = train_here(
        killed, "--config.optimizer.learning_rate=0.2", "--config.model.stem=small"
    )
    assert code == 1
    assert "  optimizer.learning_rate: 0.1 in the run, 0.2 now\n" in output
    assert "  model.stem: 'medium' in the run, 'small' now\n" in output
    assert "seed:" not in output
    assert "--accept-config-changes" in output
    assert files_of(killed) == before


@pytest.mark.slow
def test_accepted_changes_go_on_from_the_same_step(trainer, train_here, killed):
    step = max(saved_steps(killed))
    flags = ("--config.optimizer.learning_rate=0.2", "--config.log.every_steps=1")
    code, output = trainer.run(killed, *flags, "--accept-config-changes")
    assert code == 0, output
    assert f"going on from step {step} of 24" in output
    config = json.loads((killed / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 0.2
    assert config["seed"] == 0
    assert "this run is complete" in train_here(killed, *flags)[1]


@pytest.mark.slow
def test_another_model_is_one_message(trainer, killed):
    before = (killed / "config.json").read_bytes(), saved_steps(killed)
    code, output = trainer.run(killed, "--config.model.width=5", "--accept-config-changes")
    assert code == 1, output
    assert "holds other arrays than this configuration's model and optimizer" in output
    assert "Traceback" not in output, output
    assert ((killed / "config.json").read_bytes(), saved_steps(killed)) == before


OTHER_BATCHES = {
    "--config.seed=1": "seed: 0 in the run, 1 now",
    "--config.batch_size=32": "batch_size: 64 in the run, 32 now",
    "--config.data.train_split=train[:520]": "'train[:512]' in the run, 'train[:520]' now",
}


@pytest.mark.slow
def test_other_batches_are_refused_even_if_changes_are_accepted(trainer, killed, reference):
    before = (killed / "config.json").read_bytes(), saved_steps(killed)
    code, output = trainer.run(killed, *OTHER_BATCHES, "--accept-config-changes")
    assert code == 1
    for line in OTHER_BATCHES.values():
        assert line in output
    assert "Traceback" not in output, output
    assert ((killed / "config.json").read_bytes(), saved_steps(killed)) == before
    code, output = trainer.run(killed)
    assert code == 0, output
    assert_same_run(killed, reference)


@pytest.mark.parametrize("flag", OTHER_BATCHES)
def test_a_complete_run_is_not_complete_for_other_batches(train_here, complete, flag):
    config = (complete / "config.json").read_bytes()
    code, output = train_here(complete, flag, "--accept-config-changes")
    assert code == 1, output
    assert OTHER_BATCHES[flag] in output
    assert (complete / "config.json").read_bytes() == config


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_damaged_checkpoint_is_named_and_skipped(trainer, killed, reference):
    *_, previous, newest = saved_steps(killed)
    path = largest_file(killed / "checkpoints" / str(newest) / "state")
    path.write_bytes(path.read_bytes()[:-1])
    name = path.relative_to(killed / "checkpoints" / str(newest))
    code, output = trainer.run(killed)
    assert code == 0, output
    assert f"checkpoint {killed}/checkpoints/{newest} is skipped: {name} is truncated" in output
    assert f"going on from step {previous} of 24" in output
    assert len(output.splitlines()) < 40, output
    assert_same_run(killed, reference)


@pytest.mark.slow
def test_without_any_good_checkpoint_it_begins_again(trainer, killed, reference):
    steps = saved_steps(killed)
    for step in steps:
        (killed / "checkpoints" / str(step) / "record" / "metadata").write_bytes(b"")
    code, output = trainer.run(killed)
    assert code == 0, output
    for step in steps:
        assert f"checkpoints/{step} is skipped: record/metadata is truncated or altered" in output
    assert "from the beginning" in output
    assert "Traceback" not in output, output
    assert_same_run(killed, reference)


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere/run"])
def test_a_workdir_that_cannot_be_made_is_one_message(train_here, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / name
    code, output = train_here(workdir)
    assert code == 1
    assert f"cannot write to {workdir}: " in output
    assert "--workdir" in output
    assert "Traceback" not in output, output


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a command whose writes fail beyond so many bytes of a file."""


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 1000, 3000])
def test_files_that_cannot_grow_are_one_message(trainer, killed, reference, size):
    before = saved_steps(killed)
    code, output = trainer.run(killed, wrapper=(sys.executable, "-c", LIMITED, str(size)))
    assert code == 1, output
    assert "Traceback" not in output, output
    assert "File too large" in output
    assert str(killed) in output.splitlines()[-1]
    assert max(saved_steps(killed)) >= max(before)
    assert trainer.run(killed)[0] == 0
    assert_same_weights(killed, reference)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(disk):
    """Takes every block, also those that another process asks for meanwhile."""
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before it starts", "while it trains"])
def test_a_full_disk_is_one_message_and_loses_nothing(
    trainer, killed, reference, small_disk, moment
):
    workdir = shutil.copytree(killed, small_disk / "run")
    if moment == "before it starts":
        fill(small_disk)
        child = trainer.start(workdir)
    else:
        child = trainer.start(workdir)
        child.wait_for("step 14/24")
        fill(small_disk)
    assert child.end() == 1, child.output
    assert not child.says("Traceback"), child.output
    assert child.says("No space left on device"), child.output
    (small_disk / "ballast").unlink()
    code, output = trainer.run(workdir)
    assert code == 0, output
    assert "going on from step" in output
    assert_same_run(workdir, reference)


def test_a_second_process_is_refused(trainer, train_here, killed):
    child = trainer.start(killed)
    child.wait_for("going on from step")
    code, output = train_here(killed)
    assert code == 1
    assert f"{killed} is in use by another process" in output
    child.kill()


def test_a_run_that_diverges_stops_and_never_becomes_a_checkpoint(trainer, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config.optimizer.learning_rate=1e12", "--config.schedule.warmup_epochs=2")
    code, output = trainer.run(workdir, *flags)
    assert code == 1, output
    assert re.search(r"training has diverged: step \d+: .* is the first that is not finite", output)
    assert "Traceback" not in output, output
    steps = saved_steps(workdir)
    if steps:
        assert f"The newest checkpoint, step {max(steps)}, is good" in output
    assert all(row["step"] > 0 for row in read_metrics(workdir))
    for step in steps:
        for name, array in read_state(workdir / "checkpoints" / str(step)).items():
            assert abs(array).max() < float("inf"), (step, name)


@pytest.mark.slow
def test_fewer_epochs_than_are_done_is_a_complete_run(trainer, killed):
    flags = ("--config.num_epochs=1", "--accept-config-changes")
    code, output = trainer.run(killed, *flags)
    assert code == 0, output
    (step,) = re.findall(r"going on from step (\d+) of 8", output)
    assert f"at the last step, {step};" in output
    assert read_metrics(killed)[-1]["step"] == int(step)
    assert "this run is complete" in trainer.run(killed, *flags)[1]


def test_a_directory_of_another_program_is_left_alone(trainer, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    code, output = trainer.run(tmp_path)
    assert code == 1
    assert "is not a run of this program" in output
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 1}\n'
