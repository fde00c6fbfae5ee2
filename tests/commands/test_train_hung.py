"""Steps that hang, in the data, on the device and with the interpreter held."""

import pytest
from driver import ROOT

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
