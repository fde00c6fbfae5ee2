"""The command line: what a person types, and what the terminal answers."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

import cnn_jax
from cnn_jax.__main__ import COMMANDS, LESS_MEMORY, main
from cnn_jax.config import Config, ConfigError
from cnn_jax.errors import UserError

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


@pytest.fixture
def trained(monkeypatch):
    """Puts a recorder in the place of the train command; returns the list of its calls."""
    calls: list[tuple[Config, str, dict[str, bool]]] = []

    def train(config, workdir, **flags):
        calls.append((config, workdir, flags))
        return 0

    replace_train(monkeypatch, train)
    return calls


def replace_train(monkeypatch, train) -> None:
    module = types.ModuleType("cnn_jax.commands.train")
    module.train = train  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cnn_jax.commands.train", module)


def write_config(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(
        "from configs import default\n\n\ndef get_config():\n"
        f"    config = default.get_config()\n    {body}\n    return config\n"
    )
    return str(path)


@pytest.fixture
def run_shell():
    def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_train_receives_config_workdir_and_flags(trained):
    assert main(["train", "--config", QUICKSTART]) == 0
    config, workdir, flags = trained[0]
    assert isinstance(config, Config)
    assert workdir == Path("runs", "quickstart")
    assert flags == {
        "compiled": None,
        "step_timeout": 0,
        "dry_run": False,
        "accept_config_changes": False,
    }

    given = ["--workdir", "w", "--compiled", ".", "--step-timeout", "90"]
    given += ["--dry-run", "--accept-config-changes"]
    main(["train", "--config", QUICKSTART, *given])
    _, workdir, flags = trained[1]
    assert workdir == Path("w")
    assert flags == {
        "compiled": Path("."),
        "step_timeout": 90,
        "dry_run": True,
        "accept_config_changes": True,
    }


def test_overrides_with_and_without_an_equals_sign(trained):
    code = main(
        [
            "train",
            "--config.seed=1_7",
            "--config",
            QUICKSTART,
            "--config.mesh.data",
            "-1",
            "--config.optimizer.learning_rate",
            "5e-1",
            "--config.augment.flip=false",
            "--config.data.mean",
            "(0.5,)",
            "--config.data.data_dir=a=b",
            "--config.model.stage_sizes=1,1",
        ]
    )
    assert code == 0
    config = trained[0][0]
    assert config.seed == 17
    assert config.mesh.data == -1
    assert config.optimizer.learning_rate == 0.5
    assert config.augment.flip is False
    assert config.data.mean == (0.5,)
    assert config.data.data_dir == "a=b"
    assert config.model.arguments["stage_sizes"] == (1, 1)


def test_the_last_override_of_a_key_counts(trained):
    main(["train", "--config", QUICKSTART, "--config.seed=1", "--config.seed=2"])
    assert trained[0][0].seed == 2


def test_mistakes_of_file_and_flags_are_reported_together(tmp_path, trained, capsys):
    path = write_config(tmp_path, "config.optimizer.momentm = 0.5; config.seed = -1")
    assert main(["train", "--config", path, "--config.sed=3", "--config.log.every_steps=0"]) == 2
    assert trained == []
    assert capsys.readouterr().err == (
        f"{path}: 4 mistakes in the configuration\n"
        "  optimizer.momentm: unknown key (did you mean 'momentum'?)\n"
        "  sed: unknown key (did you mean 'seed'?)\n"
        "  seed = -1: must be an integer >= 0 and < 2147483648\n"
        "  log.every_steps = 0: must be an integer >= 1\n"
    )


@pytest.mark.parametrize("place", ["beside the file", "in the working directory"])
def test_configs_import_each_other_anywhere(place, tmp_path, trained, monkeypatch):
    name = f"base_{place.split()[0]}"
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / f"{name}.py").write_text("from configs.quickstart import get_config\n")
    if place == "in the working directory":
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "elsewhere"
        folder.mkdir()
    (folder / "mine.py").write_text(f"from configs.{name} import get_config\n")
    search = list(sys.path)
    assert main(["train", "--config", str(folder / "mine.py")]) == 0
    assert trained[0][1] == Path("runs", "mine")
    assert sys.path == search


def test_an_installed_package_called_configs_is_not_in_the_way(tmp_path, trained, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", "--config", str(ROOT / "configs" / "quickstart.py")]) == 0


RAISING = {
    "unknown section": (
        "config.optimzer.name = 1",
        "{path}:6: AttributeError: 'optimzer' Did you mean \"optimizer\"",
    ),
    "syntax": ("config.seed = = 1", "{path}:6: SyntaxError: invalid syntax"),
    "import": ("import nowhere", "{path}:6: ModuleNotFoundError: No module named 'nowhere'"),
}


@pytest.mark.parametrize(("body", "line"), RAISING.values(), ids=RAISING)
def test_what_a_config_file_raises_is_one_line_with_its_place(body, line, tmp_path, capsys):
    path = write_config(tmp_path, body)
    assert main(["train", "--config", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: 1 mistake in the configuration\n  {line.format(path=path)}")


@pytest.mark.parametrize("content", ["", "def get_config():\n    return 3\n"])
def test_a_config_file_without_a_configuration(content, tmp_path, capsys):
    path = tmp_path / "empty.py"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    assert f"  {path}: must define get_config() that returns a ConfigDict\n" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("the disk is full"), 1, "the disk is full\n"),
        (ConfigError(["a: b"]), 2, f"{QUICKSTART}: 1 mistake in the configuration\n  a: b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nMore"),
            1,
            "the device has not the memory: RESOURCE_EXHAUSTED: Out of memory: 9 bytes. "
            f"{LESS_MEMORY}\n",
        ),
    ],
)
def test_errors_of_the_command_become_exit_codes(error, code, text, monkeypatch, capsys):
    def train(*_, **__):
        raise error

    replace_train(monkeypatch, train)
    assert main(["train", "--config", QUICKSTART]) == code
    assert capsys.readouterr().err == text


def test_no_device_is_a_plain_message(trained, monkeypatch, capsys):
    def device_count():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr("jax.device_count", device_count)
    assert main(["train", "--config", QUICKSTART]) == 1
    assert capsys.readouterr().err == "JAX finds no device: Unable to initialize backend 'tpu'\n"


def around(main):
    """The command line around another `main`."""
    return [sys.executable, "-c", f"import cnn_jax.__main__ as m; m.main = {main}; m.run()"]


def test_output_that_has_no_place_is_a_plain_message():
    program = around("lambda _: print('x') or 0")
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "output: No space left on device\n")
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *program], stderr=subprocess.PIPE, text=True
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_name_that_the_terminal_cannot_show_is_written_by_its_number():
    done = subprocess.run(
        around("lambda _: print('f\\xfcr') or 0"),
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "f\\xfcr\n", "")


USAGE = {
    "no directory": (["--workdir="], "argument --workdir: '' names no directory"),
    "unknown flag": (["--dryrun"], "unrecognized arguments: --dryrun (did you mean '--dry-run'?)"),
    "several": (
        ["--wrkdir=x", "zzz"],
        "unrecognized arguments: --wrkdir=x (did you mean '--workdir'?), zzz",
    ),
    "no value": (
        ["--config.seed"],
        "unrecognized arguments: --config.seed (must be --config.KEY=VALUE)",
    ),
    "flag for a value": (
        ["--config.seed", "--dry-run"],
        "unrecognized arguments: --config.seed (must be --config.KEY=VALUE)",
    ),
    "a bucket": (
        ["--config", QUICKSTART, "--workdir", "http://host/run"],
        "argument --workdir: http://host/run: must be a directory or one of file://, gs://, s3://",
    ),
    "no config": ([], "the following arguments are required: --config"),
    "no file": (
        ["--config", str(ROOT / "configs" / "quickstrt.py")],
        f"no file '{ROOT}/configs/quickstrt.py' (did you mean '{QUICKSTART}'?)",
    ),
}


@pytest.mark.parametrize(("arguments", "text"), USAGE.values(), ids=USAGE)
def test_a_wrong_command_line_is_exit_code_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"{text}\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cnn_jax {cnn_jax.__version__}\n"


def test_without_a_command_there_is_help(run_shell):
    result = run_shell("-m", "cnn_jax")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python -m cnn_jax ")
    assert "train a network" in result.stdout


@pytest.mark.parametrize(
    ("command", "program"),
    [(["train.py"], "python train.py"), (["-m", "cnn_jax", "train"], "python -m cnn_jax train")],
)
def test_help_shows_the_command_as_it_was_typed(command, program, run_shell):
    result = run_shell(*command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {program} --config FILE")
    assert f"  {program} --config configs/quickstart.py --dry-run\n" in result.stdout


@pytest.mark.parametrize("command", [each.__name__.rpartition(".")[2] for each in COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f" {command} " in capsys.readouterr().out


def test_five_mistakes_from_another_folder(tmp_path, run_shell):
    result = run_shell(
        str(ROOT / "train.py"),
        f"--config={QUICKSTART}",
        "--config.optimizer.learning_rate=-1",
        "--config.model.widht=3",
        "--config.batch_size",
        "1e3",
        "--config.data.name=fashion",
        "--config.schedule.name=cosin",
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert f"{QUICKSTART}: 5 mistakes in the configuration\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_signal_in_a_callback_of_the_collector_is_not_printed():
    """Python cannot raise there; the run ends at its next check."""
    program = """
import gc, signal, sys
from cnn_jax import __main__
from cnn_jax.runtime.platform import Interrupted, StopSignals

def main(arguments):
    with StopSignals() as stop:
        gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGTERM))
        gc.collect()
        gc.callbacks.pop()
        assert stop.received == signal.SIGTERM
    return 0

__main__.main = main
__main__.run([])
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
