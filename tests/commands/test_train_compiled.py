"""Programs of `compile --save` in runs: the same numbers without compiling, or a reason why not."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from driver import ROOT, assert_same_run

from cnn_jax.__main__ import main
from cnn_jax.commands import train

LOGGED = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.fixture(scope="module")
def programs(trainer, tmp_path_factory):
    """The directory with the steps of the reference run; not to be written to."""
    directory = tmp_path_factory.mktemp("compiled") / "programs"
    command = [sys.executable, "-m", "cnn_jax", "compile", *trainer.flags, "--topology=cpu:1"]
    result = subprocess.run(
        [*command, "--step=train,evaluation", f"--save={directory}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"saved to {directory}/train.executable" in result.stdout
    return directory


@pytest.fixture
def copied(programs, tmp_path):
    return shutil.copytree(programs, tmp_path / "programs")


def steps_compiled(output):
    return re.findall(r"Finished XLA compilation of jit\((step)\)", output)


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_the_run_is_the_same_and_compiles_no_step(trainer, reference, programs, tmp_path):
    flags = [f"--compiled={programs}"]
    code, output = trainer.run(tmp_path / "run", *flags, environment=LOGGED)
    assert code == 0, output
    for step in ("train", "evaluation"):
        assert f"the {step} step is the one in {programs}: nothing to compile" in output
    assert not steps_compiled(output)
    assert_same_run(tmp_path / "run", reference)


def test_a_run_that_cannot_use_them_compiles(trainer, reference, copied, tmp_path):
    executable = copied / "train.executable"
    contents = bytearray(executable.read_bytes())
    contents[len(contents) // 2] ^= 1
    executable.write_bytes(contents)
    edit(copied / "evaluation.json", jaxlib="0.0.1")
    code, output = trainer.run(tmp_path / "run", f"--compiled={copied}", environment=LOGGED)
    assert code == 0, output
    assert f"{executable} is damaged: its SHA-256 is not that of" in output
    assert re.search(r"^  jaxlib: 0\.0\.1 there, [\d.]+ here$", output, re.MULTILINE)
    assert "nothing to compile" not in output
    assert len(steps_compiled(output)) >= 2
    assert_same_run(tmp_path / "run", reference)


def test_a_step_that_differs_is_compiled_and_the_other_is_not(trainer, programs, tmp_path):
    flags = ["--dry-run", f"--compiled={programs}", "--config.batch_size=128"]
    code, output = trainer.run(tmp_path / "run", *flags)
    assert code == 0, output
    assert (
        f"the train step is compiled, as the one in {programs} is not for this run:\n"
        "  argument batch['epoch']: int32[64/data/fsdp] there, int32[128/data/fsdp] here\n"
    ) in output
    assert "\n  config.batch_size: 64 there, 128 here\n" in output
    assert f"the evaluation step is the one in {programs}: nothing to compile" in output


def test_other_devices_are_told(train_here, programs, tmp_path):
    rate = "--config.optimizer.learning_rate=0.05"
    code, output = train_here(tmp_path / "run", "--dry-run", f"--compiled={programs}", rate)
    assert code == 0, output
    assert "\n  devices: 1 x cpu there, 8 x cpu here\n" in output
    assert "\n  config.optimizer.learning_rate: 0.1 there, 0.05 here\n" in output


def test_what_others_can_write_is_not_used(train_here, copied, tmp_path):
    copied.chmod(0o770)
    code, output = train_here(tmp_path / "run", "--dry-run", f"--compiled={copied}")
    assert code == 0, output
    assert output.count(f"{copied} can be written to by others") == 2
    assert "nothing to compile" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=cpu:1,cpu:2"], "--save: takes one topology and one configuration"),
        (["--topology=cpu:1", "--config.batch_size=64,128"], "--save: takes one topology and one"),
        (["--topology=h200", "--max-batch"], "--save: takes one topology and one configuration"),
        (["--topology=cpu:1"], "train.executable is already there"),
    ],
)
def test_mistakes_in_saving(arguments, message, programs, capsys):
    config = f"--config={ROOT}/configs/quickstart.py"
    with pytest.raises(SystemExit) as exit_:
        main(["compile", config, f"--save={programs}", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistyped_directory_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", f"--config={ROOT}/configs/quickstart.py", f"--compiled={tmp_path / 'no'}"])
    assert exit_.value.code == 2
    assert "argument --compiled: no directory" in capsys.readouterr().err


def test_several_processes_compile_for_themselves(programs, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    plan = SimpleNamespace(conditions=lambda step, lowered: {})
    assert train._saved_program(plan, "train", None, programs) is None
    assert "saved programs are for runs of one process" in capsys.readouterr().out
