"""Steps that hang, in the data, on the device and with the interpreter held; data that die."""

import pytest
from driver import ROOT, assert_same_run, saved_steps

TIMEOUT = "--step-timeout=10"
STREAMED = "--config.data.residency=host"
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "code", "inside"),
    [
        ("data", 75, "hang_in_the_data"),
        ("device", 75, "hang_on_the_device"),
        ("interpreter", 1, "hang_with_the_interpreter"),
    ],
)
def test_a_hung_step_ends_with_the_stacks_of_all_threads(trainer, tmp_path, where, code, inside):
    program = ("tests/commands/hanging.py", where)
    found, output = trainer.run(
        tmp_path / "run", TIMEOUT, STREAMED, program=program, environment=ENVIRONMENT
    )
    assert found == code, output
    assert "(most recent call first)" in output
    assert f" in {inside}\n" in output
    if code == 75:
        assert "no step has ended for 10 s" in output
        assert "The same command goes on from the newest checkpoint" in output


@pytest.mark.slow
def test_a_thread_of_the_data_that_dies_is_told_and_a_restart_is_exact(
    trainer, tmp_path, reference
):
    program = ("tests/commands/hanging.py", "memory")
    workdir = tmp_path / "run"
    code, output = trainer.run(workdir, STREAMED, program=program, environment=ENVIRONMENT)
    assert code == 1, output
    *_, last = output.splitlines()
    assert "a thread that makes batches died at batch 12 of the data: MemoryError: no room" in last
    assert "Traceback" not in output
    assert 0 < max(saved_steps(workdir)) <= 12
    code, output = trainer.run(workdir, STREAMED)
    assert code == 0, output
    assert_same_run(workdir, reference)
