"""kill -9 at any instant, the same command again: the same weights and the same rows."""

import random
import signal
import time

import pytest
from driver import (
    TOTAL_STEPS,
    assert_events_are_the_rows,
    assert_same_run,
    assert_same_weights,
    read_state,
    saved_steps,
)

UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1"}
COMPILING = "Compiling jit(step)"
COMPILED = "Finished XLA compilation of jit(step)"


def test_resumes_after_a_kill_between_steps(trainer, killed, reference):
    last = max(saved_steps(killed))
    assert 9 <= last < TOTAL_STEPS
    code, output = trainer.run(killed)
    assert code == 0, output
    assert f"going on from step {last} of 24" in output
    assert_same_run(killed, reference)
    assert_events_are_the_rows(killed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_kills_at_every_stage(trainer, tmp_path, reference, seed):
    chance = random.Random(seed)
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    moments = {
        COMPILING: 2.0,
        "step 6/24": 0.1,
        lambda: any(checkpoints.glob("*.orbax-checkpoint-tmp*")): 0.0,
        lambda: (checkpoints / "12").exists(): 0.01,
        "step 16/24": 0.1,
        "epoch 3.00": 1.0,
    }
    for moment, delay in moments.items():
        saved = saved_steps(workdir)
        child = trainer.start(workdir, environment=UNCACHED if moment == COMPILING else None)
        if saved:
            child.wait_for(f"going on from step {saved[-1]} of 24")
        child.wait_for(moment)
        time.sleep(chance.uniform(0, delay))
        child.kill()
        assert not child.says("Traceback"), child.output

    code, output = trainer.run(workdir)
    assert code == 0, output
    assert "Traceback" not in output, output
    assert_same_run(workdir, reference)
    assert_events_are_the_rows(workdir)
    assert {"summary.json", "curves.png"} <= {path.name for path in workdir.iterdir()}


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_very_step_and_says_how_to_go_on(
    trainer, tmp_path, reference, signum, code
):
    workdir = tmp_path / "run"
    child = trainer.start(workdir)
    child.wait_for("step 4/24")
    child.send(signum)
    assert child.end() == code, child.output
    step = max(saved_steps(workdir))
    assert child.lines[-1] == (
        f"stopped by {signal.Signals(signum).name}: saved at step {step} of 24; "
        "the same command again goes on from there"
    )
    assert read_state(workdir / "checkpoints" / str(step))["['step']"] == step

    assert trainer.run(workdir)[0] == 0
    assert_same_weights(workdir, reference)


def test_a_signal_while_compiling_ends_it_at_once(trainer, tmp_path):
    workdir = tmp_path / "run"
    child = trainer.start(workdir, environment=UNCACHED)
    child.wait_for(COMPILING)
    child.send(signal.SIGTERM)
    assert child.end() == 143, child.output
    assert child.says("stopped before training began; the same command starts again")
    assert not child.says(COMPILED), "it has waited for the compiler"
    assert not child.says("Traceback"), child.output


@pytest.mark.slow
def test_a_signal_while_the_workdir_is_opened(trainer, killed, reference):
    (killed / ".lock").unlink(missing_ok=True)
    child = trainer.start(killed)
    child.wait_for((killed / ".lock").exists)
    child.send(signal.SIGINT)
    assert child.end() == 130, child.output
    assert not child.says("Traceback"), child.output
    assert child.says("stopped before training began")
    assert trainer.run(killed)[0] == 0
    assert_same_run(killed, reference)
