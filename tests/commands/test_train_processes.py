"""Two processes of one run: the same numbers as one, one voice, and an end together."""

import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
from driver import (
    QUICKLY,
    ROOT,
    TOTAL_STEPS,
    assert_same_run,
    assert_same_weights,
    free_port,
    read_metrics,
    read_state,
    saved_steps,
)

from cnn_jax.runtime.platform import RESTART

SOON = "--peer-timeout=10"
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1", "XLA_FLAGS": ""}
LONG_EVALUATION = ["--config.data.test_split=test[:800]", "--config.eval.batch_size=2"]
"""400 batches: what follows the last step of an epoch within a moment comes in the midst of it."""

IN_EVALUATION = "step 8/24"
MARGIN = 45
"""Seconds beside those promised, for a machine that does much else."""


def without_noise(output):
    """Lines that Python wrote: gloo tells on its own of every connection."""
    return [line for line in output.splitlines() if line and not line.startswith("[Gloo]")]


@pytest.fixture(scope="session")
def pair(trainer, reference, tmp_path_factory):
    """The directory of a run of two processes that nothing has disturbed, and their outputs."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    codes, outputs = trainer.run_two(workdir)
    assert codes == [0, 0], outputs
    return workdir, outputs


def assert_near(workdir, reference, *, step=TOTAL_STEPS):
    """Asserts the same weights and rows but for the order in which numbers were added up."""
    ours, theirs = (read_state(each / "checkpoints" / str(step)) for each in (workdir, reference))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        share = (
            5e-3 if "opt_state" in name else 3e-4
        )  # a ReLU that turns changes a gradient at once
        largest = np.abs(theirs[name]).max()
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=share * largest, err_msg=name)
    told, expected = read_metrics(workdir), read_metrics(reference)
    assert [row["step"] for row in told] == [row["step"] for row in expected]
    for row, other in zip(told, expected, strict=True):
        norms = [each.pop("train/grad_norm", 0) for each in (row, other)]
        assert norms[0] == pytest.approx(norms[1], rel=2e-3)
        assert row == pytest.approx(other, rel=5e-6)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_of_them_speaks(trainer, tmp_path, pair, reference):
    workdir, outputs = pair
    two_devices = QUICKLY | {"JAX_NUM_CPU_DEVICES": "2"}
    code, output = trainer.run(tmp_path / "one", environment=two_devices)
    assert code == 0, output
    assert_same_run(workdir, tmp_path / "one")
    assert_near(workdir, reference)
    assert "devices    2 x cpu" in outputs[0]
    assert without_noise(outputs[1]) == []
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"}
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "moment"), [([0], "step 4/24"), ([1], "step 4/24"), ([1, 0], IN_EVALUATION)]
)
def test_a_signal_to_one_process_or_to_all_saves_the_same_step_in_both(
    trainer, tmp_path, pair, asked, moment
):
    workdir = tmp_path / "run"
    flags = LONG_EVALUATION if moment == IN_EVALUATION else ()
    children = trainer.start_two(workdir, *flags)
    children[0].wait_for(moment)
    for each in asked:
        children[each].send(signal.SIGTERM)
    assert [child.end() for child in children] == [143, 143], [c.output for c in children]
    step = max(saved_steps(workdir))
    assert step == 8 if moment == IN_EVALUATION else step < TOTAL_STEPS
    assert moment != IN_EVALUATION or not children[0].says("test loss"), "it came too late"
    assert children[0].lines[-1] == (
        f"stopped by SIGTERM: saved at step {step} of 24; the same command again goes on from there"
    )
    codes, outputs = trainer.run_two(workdir, *flags)
    assert codes == [0, 0], outputs
    assert f"going on from step {step} of 24" in outputs[0]
    assert_same_weights(workdir, pair[0])


def a_report_of(child):
    return lambda: any(re.match(r"step \d", line) for line in list(child.lines))


def is_saving(workdir):
    return lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_in_time_and_a_restart_is_exact(
    trainer, tmp_path, pair, victim
):
    chance = random.Random(victim)
    workdir = tmp_path / "run"
    moments = [  # the last seconds are random
        ("Compiling jit(step)", 1.0, UNCACHED),
        ("step 6/24", 0.1, {}),
        (is_saving(workdir), 0.0, {}),
        ("step 16/24", 0.2, {}),
    ]
    for moment, delay, environment in moments:
        saved = saved_steps(workdir)
        children = trainer.start_two(workdir, SOON, *LONG_EVALUATION, environment=environment)
        other = children[1 - victim]
        if saved:
            children[0].wait_for(f"going on from step {saved[-1]} of 24")
        if callable(moment):  # before its first step it may see what a kill has left half-written
            children[0].wait_for(a_report_of(children[0]))
        children[0].wait_for(moment)
        time.sleep(chance.uniform(0, delay))
        children[victim].kill()
        killed_at = time.monotonic()
        code = other.end()
        assert time.monotonic() - killed_at < 10 + MARGIN, "--peer-timeout is 10"
        if victim:
            assert code == RESTART, other.output
            assert "process 1 of 2 is gone: no sign of life for 10 s" in other.output
        else:  # mostly in JAX's own words, as it aborts: its service has ended with process 0
            aborted = "This most likely indicates that another task died"
            # 139: faulthandler, which is on in tests, then reads frames of threads that go on.
            told = {134: aborted, 139: aborted, RESTART: "process 0 of 2 is gone"}
            assert told[code] in other.output
    in_evaluation = children[0].lines
    assert any(line.startswith("step 16/24") for line in in_evaluation)
    assert not any(line.startswith("epoch 2") for line in in_evaluation), "it came too late"
    codes, outputs = trainer.run_two(workdir, *LONG_EVALUATION)
    assert codes == [0, 0], outputs
    assert_same_weights(workdir, pair[0])
    rows = [row["step"] for row in read_metrics(workdir)]
    assert rows == [row["step"] for row in read_metrics(pair[0])]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_one_and_both_restore_the_previous(
    trainer, tmp_path, pair
):
    workdir = shutil.copytree(pair[0], tmp_path / "run")
    *_, previous, newest = saved_steps(workdir)
    damaged = next((workdir / "checkpoints" / str(newest) / "state" / "d").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    codes, outputs = trainer.run_two(workdir)
    assert codes == [0, 0], outputs
    said = f"checkpoint {workdir}/checkpoints/{newest} is skipped: state/d/{damaged.name} is trunc"
    assert outputs[0].count(said) == 1
    assert f"going on from step {previous} of 24" in outputs[0]
    assert without_noise(outputs[1]) == []
    assert (workdir / "damaged" / str(newest) / "state").is_dir()
    assert_same_run(workdir, pair[0])


def test_processes_whose_compilers_differ_are_refused_by_both(trainer, tmp_path):
    flags = "--xla_cpu_enable_fast_math=true --xla_dump_to=/tmp/nowhere"
    each = [{"environment": {"XLA_FLAGS": told}} for told in ("", flags)]
    codes, outputs = trainer.run_two(tmp_path / "run", of_each=each)
    assert codes == [1, 1], outputs
    for output in outputs:
        assert "XLA_FLAGS: '' in process 0, '--xla_cpu_enable_fast_math=true' in process" in output
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes_is_not_waited_for(trainer, tmp_path):
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=3", "--join-timeout=3"]
    children = [trainer.start(tmp_path / "run", *place, f"--process-id={each}") for each in (0, 2)]
    for index, child in zip((0, 2), children, strict=True):
        assert child.end() == RESTART, child.output
        told = f"process {index} of 3 is at 127.0.0.1:"
        assert child.lines[-1].startswith(told), child.output
        assert "not all 3 have come within 3 s (--join-timeout)" in child.lines[-1]


def test_processes_that_differ_are_refused_by_both(trainer, tmp_path):
    shutil.copytree(ROOT / "cnn_jax", tmp_path / "other" / "cnn_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "other" / "configs")
    shutil.copy(ROOT / "train.py", tmp_path / "other")
    with (tmp_path / "other" / "cnn_jax" / "typing.py").open("a") as file:
        file.write("# another version\n")
    own = {
        "flags": ["--config.optimizer.momentum=0.5"],
        "wrapper": ["env", "-C", str(tmp_path / "other")],
    }
    codes, outputs = trainer.run_two(tmp_path / "run", of_each=[{}, own])
    assert codes == [1, 1], outputs
    for index, output in enumerate(outputs):
        assert f"process {index} of 2: the processes of this run differ" in output
        assert "optimizer.momentum: 0.9 in process 0, 0.5 in process 1" in output
        assert "source of cnn_jax: '" in output
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_processes_and_mesh(trainer, tmp_path, reference):
    workdir = tmp_path / "run"
    fsdp = ["--config.mesh.fsdp=2", "--accept-config-changes"]
    starts = [
        (trainer.start, [], {"JAX_NUM_CPU_DEVICES": "8"}),
        (trainer.start_two, [], {}),
        (trainer.start, [], {}),
        (trainer.start_two, fsdp, {}),
    ]
    step = 0
    for number, (start, flags, environment) in enumerate(starts, start=1):
        started = start(workdir, *flags, environment=environment)
        children = started if isinstance(started, list) else [started]
        if step:
            children[0].wait_for(f"going on from step {step} of 24")
        if number < len(starts):
            children[0].wait_for(a_report_of(children[0]))
            children[-1].send(signal.SIGTERM)
        code = 143 if number < len(starts) else 0
        assert [child.end() for child in children] == [code] * len(children), children[0].output
        assert step < max(saved_steps(workdir))
        step = max(saved_steps(workdir))
    assert_near(workdir, reference)
