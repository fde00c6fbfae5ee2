"""Kept programs: found by all that decides them and nothing less, whatever befalls the files."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cnn_jax.runtime import executables, programs
from cnn_jax.runtime.compiler import CompilationCounter
from cnn_jax.runtime.sharding import make_mesh, replicated

ROOT = Path(__file__).parents[2]
MESH = make_mesh(data=8)
DEVICES = list(MESH.devices.flat)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=replicated(MESH))
QUESTION = {
    "arguments": {"w": W},
    "devices": DEVICES,
    "options": {},
    "decided_by": {"seed": 0},
}


@pytest.fixture(scope="module")
def program():
    return jax.jit(lambda w: w @ w.T + 1, donate_argnums=0).lower(W).compile()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The directory of this process's kept programs, and the lines that are said."""
    lines = []
    monkeypatch.setattr(programs, "foreign_module", lambda: "")
    monkeypatch.setattr(programs, "_programs", None)  # put back afterwards
    programs.start(str(tmp_path), lines.append)
    return tmp_path / "programs", lines


def ask(program=None, **changes):
    """Returns the answer, and whether it had to be made; without a program that is an error."""
    made = []

    def make():
        assert program is not None, "not found"
        made.append(program)
        return program

    return programs.kept("step", make, **{**QUESTION, **changes}), bool(made)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_kept_program_computes_the_same_and_donates(program, shelf):
    assert ask(program)[1]
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    expected = program(jax.device_put(w, W.sharding))
    argument = jax.device_put(w, W.sharding)
    found, made = ask()
    assert not made
    assert np.asarray(found(argument)).tobytes() == np.asarray(expected).tobytes()
    assert argument.is_deleted()


def test_what_is_found_and_what_is_made_is_counted(program, shelf):
    counter = CompilationCounter()
    ask(program)
    ask()
    ask()
    assert (counter.untraced, counter.traced) == (2, 1)
    assert counter.as_dict()["without tracing"] == 2
    assert counter.as_dict()["why not kept"] == ""
    assert counter.describe() == "2 of 2 programs were kept, 2 of them not even traced"


def restart():
    programs.start(str(programs._programs._directory.parent), print)


def other_source(monkeypatch):
    monkeypatch.setattr(programs, "source_digest", lambda: "0" * 64)
    restart()


def other_version(package):
    def change(monkeypatch):
        version = importlib.metadata.version

        def changed(name):
            return "0.0.1" if name == package else version(name)

        monkeypatch.setattr(importlib.metadata, "version", changed)

    return change


def other_variable(name):
    return lambda monkeypatch: monkeypatch.setenv(name, "--of_another_kind")


ELSEWHERE = {
    "source": other_source,
    "configuration's code": lambda _: programs.note_config_file(b"def get_config(): ..."),
    "process": lambda patch: patch.setattr(jax, "process_index", lambda: 1),
    "processor": lambda patch: patch.setattr(executables, "processor", lambda: "arm64-0"),
    "python": lambda patch: patch.setattr(programs.platform, "python_version", lambda: "3.0"),
    **{name: other_version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    **{name: other_variable(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "FLAX_X")},
}


@pytest.mark.parametrize("change", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_program_of_other_surroundings_is_not_found(change, program, shelf):
    ask(program)
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert ask(program)[1]
        ask()
    restart()
    ask()


@contextlib.contextmanager
def jax_told(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_matmul_precision", "highest"),
        ("jax_enable_x64", True),
        ("jax_debug_nans", True),
        ("jax_threefry_partitionable", False),
    ],
)
def test_a_program_that_jax_was_told_otherwise_of_is_not_found(name, value, program, shelf):
    ask(program)
    with jax_told(name, value):
        assert ask(program)[1]
        ask()
    ask()


DIVIDED = jax.sharding.NamedSharding(MESH, PartitionSpec("data"))


@pytest.mark.parametrize(
    "changes",
    [
        {"decided_by": {"seed": 1}},
        {"decided_by": {"seed": 0, "width": 8}},
        {"options": {"xla_embed_ir_in_executable": True}},
        {"devices": DEVICES[::-1]},
        {"arguments": {"w": jax.ShapeDtypeStruct((8, 9), jnp.float32, sharding=W.sharding)}},
        {"arguments": {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=W.sharding)}},
        {"arguments": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=DIVIDED)}},
    ],
    ids=["value", "key", "options", "devices", "shape", "dtype", "sharding"],
)
def test_a_program_for_something_else_is_not_found(changes, program, shelf):
    ask(program)
    assert ask(program, **changes)[1]
    ask()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_log_compiles", True),
        ("jax_logging_level", "DEBUG"),
        ("jax_compilation_cache_max_size", 7),
    ],
)
def test_what_has_no_say_does_not_count(name, value, program, shelf):
    ask(program)
    with jax_told(name, value):
        ask()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *itertools.product(
            [cut, flip, Path.unlink, lambda path: path.chmod(0o666)],
            ["step.executable", "step.json"],
        ),
        (Path.unlink, "made"),
    ],
)
def test_a_damaged_program_is_made_again_and_replaced(damage, name, program, shelf):
    directory, lines = shelf
    ask(program)
    (path,) = directory.glob(f"step-*/{name}")
    damage(path)
    assert ask(program)[1]
    (line,) = lines
    assert line.startswith("the kept program 'step' is made again: ")
    ask()
    assert len(lines) == 1


def test_source_that_changes_meanwhile_keeps_nothing(program, shelf, monkeypatch):
    """What was loaded before the change and what after it, nobody knows."""

    def make():
        monkeypatch.setattr(programs, "source_digest", lambda: "0" * 64)
        return program

    counter = CompilationCounter()
    programs.kept("step", make, **QUESTION)
    assert files_of(shelf[0]) == []
    assert (counter.traced, counter.why_not) == (
        0,
        "the source of cnn_jax has changed since the start",
    )


def seed_of(path):
    return json.loads(path.read_text())["decided by seed"]


def test_the_programs_used_longest_ago_go(program, shelf, monkeypatch):
    for seed in range(4):
        ask(program, decided_by={"seed": seed})
    places = {seed_of(path): path.parent for path in shelf[0].glob("*/step.json")}
    for age, seed in enumerate("0123"):
        os.utime(places[seed], (1000 + age, 1000 + age))
    ask(decided_by={"seed": 0})  # is now the youngest but one
    size = sum(path.stat().st_size for path in files_of(places["0"]))
    monkeypatch.setattr(programs, "BYTES", 3 * size + size // 2)
    ask(program, decided_by={"seed": 4})
    assert {seed_of(path) for path in shelf[0].glob("*/step.json")} == {"0", "3", "4"}


def test_a_directory_that_cannot_be_used_is_done_without(program, shelf):
    counter = CompilationCounter()
    shelf[0].write_text("in the way")
    assert ask(program)[1]
    assert ask(program)[1]
    assert str(shelf[0]) in counter.why_not
    assert (counter.traced, shelf[1]) == (0, [])


def test_a_compiler_whose_programs_cannot_be_saved_is_done_without(program, shelf, monkeypatch):
    def serialize(_):
        raise ValueError("Compilation does not support serialization")

    counter = CompilationCounter()
    monkeypatch.setattr(executables, "serialize", serialize)
    assert ask(program)[1]
    assert list(shelf[0].iterdir()) == []
    assert counter.why_not.endswith("cannot be saved: Compilation does not support serialization")


@pytest.mark.parametrize("cache", [None, "gs://bucket/cache"])
def test_without_a_cache_in_a_directory_nothing_is_kept(cache, program, shelf):
    programs.start(cache, print)
    assert programs.obstacle() == "there is no compilation cache in a local directory"
    assert ask(program)[1]
    assert ask(program)[1]


@pytest.fixture
def other(monkeypatch):
    """Returns what another process says of keeping a program, and of what it has kept."""
    said = {"keeping step": "", "kept step": ""}

    def together(name, value, decide):
        return decide([value, said[name]])

    monkeypatch.setattr(programs, "together", together)
    return said


def mark_of(shelf):
    (path,) = shelf[0].glob("step-*/made")
    return path.read_text()


def test_what_all_processes_have_made_together_is_found(program, shelf, other):
    ask(program)
    assert programs.obstacle() == ""
    other["kept step"] = mark_of(shelf)
    ask()
    assert mark_of(shelf) == other["kept step"]


@pytest.mark.parametrize("theirs", ["", "made at another time"])
def test_what_another_process_lacks_or_made_at_another_time_all_make_again(
    theirs, program, shelf, other
):
    ask(program)
    before = mark_of(shelf)
    other["kept step"] = theirs
    assert ask(program)[1]
    assert mark_of(shelf) != before


def test_what_another_process_cannot_keep_none_keeps(program, shelf, other):
    other["keeping step"] = "no disk there"
    counter = CompilationCounter()
    assert ask(program)[1]
    assert counter.why_not == "no disk there"
    assert files_of(shelf[0]) == []


def test_nothing_is_kept_where_other_code_has_a_say(program, shelf, monkeypatch):
    monkeypatch.setattr(programs, "foreign_module", lambda: "mine")
    counter = CompilationCounter()
    assert ask(program)[1]
    assert counter.as_dict()["why not kept"] == "mine could have a say in them"
    assert files_of(shelf[0]) == []


NAMED = """
import sys, types
import cnn_jax.commands.train
from cnn_jax.runtime.programs import foreign_module

sys.modules["made_up"] = types.ModuleType("made_up")
sys.modules["made_up"].__file__ = "made_up.py"
for i in range(2):
    for main in sys.argv[1:]:
        sys.modules["__main__"].__file__ = main
        print(foreign_module() or "none")
    import planted
"""


def test_code_that_is_not_known_by_version_or_digest_is_foreign(tmp_path):
    (tmp_path / "planted.py").touch()  # beside a module that only says it has a file
    own = [ROOT / "train.py", ROOT / "cnn_jax/__main__.py", Path(sys.executable).parent / "cnn-jax"]
    other = ROOT / "benchmarks/seeds.py"
    process = subprocess.run(
        [sys.executable, "-c", NAMED, *own, other],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    named = process.stdout.split()
    assert named == [*["none"] * 3, str(other), *["planted"] * 3, str(other)]


AT_ONCE = """
import sys, time
from pathlib import Path
import jax
from cnn_jax.runtime import programs

programs.foreign_module = lambda: ""
programs.start(sys.argv[1], print)
w = jax.ShapeDtypeStruct((4, 4), "float32")


def make():
    Path(sys.argv[1], sys.argv[2]).touch()
    while not all(Path(sys.argv[1], name).exists() for name in "ab"):
        time.sleep(0.001)
    print("made")
    return jax.jit(lambda w: w @ w).lower(w).compile()


question = {"arguments": {"w": w}, "devices": jax.devices()[:1], "options": {}, "decided_by": {}}
program = programs.kept("step", make, **question)
print(float(program(jax.numpy.full((4, 4), 2.0)).sum()))
"""


def test_two_starts_at_once_leave_one_program(tmp_path):
    def start(name):
        command = [sys.executable, "-c", AT_ONCE, str(tmp_path), name]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    both = [start("a"), start("b")]
    assert [process.communicate(timeout=300)[0] for process in both] == ["made\n256.0\n"] * 2
    (place,) = (tmp_path / "programs").iterdir()
    assert {path.name for path in place.iterdir()} == {"step.executable", "step.json", "made"}
    assert start("c").communicate(timeout=300)[0] == "256.0\n"


COMPILES_AND_SAVES = """
import pathlib, sys
import jax, jax.numpy as jnp
from cnn_jax.errors import UserError
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.executables import save
lowered = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0)).lower(jnp.ones((8, 8)))
try:
    save(pathlib.Path(sys.argv[1]), "step", compile_program(lowered), {})
except UserError as error:
    print(error)
"""


def test_what_came_from_the_compilation_cache_is_not_saved_again(tmp_path):
    """On the CPU it would be saved without its functions: 'Function ... not found' when it runs."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    said = []
    for start in ("first", "second"):
        command = [sys.executable, "-c", COMPILES_AND_SAVES, str(tmp_path / start)]
        said.append(subprocess.check_output(command, text=True, env=environment, cwd=ROOT))
    assert said == ["", "it came from JAX's compilation cache, and such a program loses parts\n"]
    assert [(tmp_path / start).exists() for start in ("first", "second")] == [True, False]
