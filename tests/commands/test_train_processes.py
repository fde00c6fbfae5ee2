"""Two processes of one run: the same numbers as one, one voice, and an end together."""

import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
from driver import (
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

SOON = "--peer-timeout=15"
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1"}


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
        share = 0.01 * np.abs(theirs[name]).max()
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=share, err_msg=name)
    told, expected = read_metrics(workdir), read_metrics(reference)
    assert [row["step"] for row in told] == [row["step"] for row in expected]
    for row, other in zip(told, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=2e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_of_them_speaks(trainer, tmp_path, pair, reference):
    workdir, outputs = pair
    code, output = trainer.run(tmp_path / "one", environment={"JAX_NUM_CPU_DEVICES": "2"})
    assert code == 0, output
    assert_same_run(workdir, tmp_path / "one")
    assert_near(workdir, reference)
    assert "devices    2 x cpu" in outputs[0]
    assert without_noise(outputs[1]) == []
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "curves.png", "checkpoints"}
    assert len(list((workdir / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_process_saves_the_same_step_in_both(trainer, tmp_path, pair, asked):
    workdir = tmp_path / "run"
    children = trainer.start_two(workdir)
    children[0].wait_for("step 4/24")
    children[asked].send(signal.SIGTERM)
    assert [child.end() for child in children] == [143, 143], [c.output for c in children]
    step = max(saved_steps(workdir))
    assert step < TOTAL_STEPS
    assert children[0].lines[-1] == (
        f"stopped by SIGTERM: saved at step {step} of 24; the same command again goes on from there"
    )
    codes, outputs = trainer.run_two(workdir)
    assert codes == [0, 0], outputs
    assert f"going on from step {step} of 24" in outputs[0]
    assert_same_weights(workdir, pair[0])


def a_report_of(child):
    return lambda: any(re.match(r"step \d", line) for line in list(child.lines))


def is_saving(workdir):
    return lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_a_restart_is_exact(
    trainer, tmp_path, pair, victim
):
    chance = random.Random(victim)
    workdir = tmp_path / "run"
    moments = [("step 6/24", 0.1), (is_saving(workdir), 0.0), ("test loss", 0.3)]
    for moment, delay in moments:
        saved = saved_steps(workdir)
        children = trainer.start_two(workdir, SOON)
        if saved:
            children[0].wait_for(f"going on from step {saved[-1]} of 24")
        children[0].wait_for(moment)
        time.sleep(chance.uniform(0, delay))
        children[victim].kill()
        other = children[1 - victim]
        code = other.end()
        if victim:
            assert code == RESTART, other.output
            assert "process 1 of 2 is gone: no sign of life for 15 s" in other.output
        else:  # in JAX's own words: its service has ended with process 0
            assert code not in (0, 1, 143), other.output
            assert "This most likely indicates that another task died" in other.output
    codes, outputs = trainer.run_two(workdir)
    assert codes == [0, 0], outputs
    assert_same_run(workdir, pair[0])


@pytest.mark.slow
def test_a_kill_while_the_other_compiles_ends_both(trainer, tmp_path):
    children = trainer.start_two(tmp_path / "run", SOON, environment=UNCACHED)
    children[0].wait_for("Compiling jit(step)")
    children[1].kill()
    assert children[0].end() == RESTART, children[0].output
    assert "process 1 of 2 is gone" in children[0].output


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
    own = {"environment": {"XLA_FLAGS": flags}}
    codes, outputs = trainer.run_two(tmp_path / "run", of_each=[{}, own])
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
