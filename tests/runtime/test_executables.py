"""Programs in files: they do the same as before, and only where they fit and are this user's."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cnn_jax.errors import UserError
from cnn_jax.runtime import executables
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.executables import UnusableError, differences
from cnn_jax.runtime.sharding import make_mesh, replicated

MESH = make_mesh(data=2, fsdp=4)
DIVIDED = jax.sharding.NamedSharding(MESH, PartitionSpec(("data", "fsdp"), None))


def step(state, key):
    return {"w": state["w"] @ state["w"].T + jax.random.normal(key, state["w"].shape)}


def abstract():
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {
        "state": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=DIVIDED)},
        "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(MESH)),
    }


def lower(function=step):
    jitted = jax.jit(function, donate_argnums=0, out_shardings={"w": DIVIDED})
    return jitted.lower(*abstract().values())


def conditions(lowered, **config):
    return executables.conditions(lowered, abstract(), mesh=MESH, options={}, config=config)


def concrete():
    w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    key = jax.device_put(jax.random.key(3), replicated(MESH))
    return {"w": jax.device_put(w, DIVIDED)}, key


def load(directory, lowered=None, here=None):
    here = here or conditions(lowered or lower())
    return executables.load(directory, "step", here, list(MESH.devices.flat))


@pytest.fixture(scope="module")
def program():
    return compile_program(lower())


@pytest.fixture
def saved(program, tmp_path):
    """The directory of a saved step."""
    directory = tmp_path / "a" / "programs"
    executables.save(directory, "step", program, conditions(lower()))
    return directory


def test_a_loaded_program_computes_the_same_and_donates(program, saved):
    loaded = load(saved)
    state, key = concrete()
    ours = loaded(state, key)["w"]
    assert state["w"].is_deleted()
    assert ours.sharding == DIVIDED
    expected = program(*concrete())["w"]
    assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()


def test_a_loaded_program_refuses_other_arguments(saved):
    state, key = concrete()
    with pytest.raises(TypeError, match="Argument types differ"):
        load(saved)({"w": state["w"][:4]}, key)


def test_a_loaded_program_is_not_compiled(saved, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    load(saved)


def test_what_a_program_holds_for_is_written(saved):
    description = json.loads((saved / "step.json").read_text())
    assert description["devices"] == "8 x cpu"
    assert description["mesh"] == "data 2, fsdp 4"
    assert description["argument state['w']"] == "float32[8/data/fsdp,8]"
    assert description["argument key"] == "key<fry>[]"
    assert description["jax"] == jax.__version__
    assert description["processor"]
    contents = (saved / "step.executable").read_bytes()
    assert description["executable"] == hashlib.sha256(contents).hexdigest()


def test_files_are_for_this_user_alone(saved):
    assert saved.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o600}


def test_nothing_is_overwritten(program, saved):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match=r"step\.executable is already there"):
        executables.save(saved, "step", program, {})
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


def test_a_program_is_not_saved_where_it_could_not_be_trusted(program, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="can be written to by others"):
        executables.save(tmp_path, "step", program, {})
    assert not list(tmp_path.iterdir())


def test_a_compiler_without_serialisation_is_named(program, tmp_path, monkeypatch):
    def serialize(_):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(executables, "serialize", serialize)
    with pytest.raises(UserError, match="cannot be saved: Compilation does not support"):
        executables.save(tmp_path, "step", program, {})


def test_another_step_is_refused(saved):
    lowered = lower(lambda state, key: {"w": 2 * step(state, key)["w"]})
    with pytest.raises(UnusableError, match=r"^the step \(its StableHLO\): \w{12} there, \w{12} h"):
        load(saved, lowered)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"jaxlib": "0.0.1"}, "jaxlib: 0.0.1 there, [0-9.]+ here"),
        ({"optax": None}, "optax: absent there, [0-9.]+ here"),
        ({"libtpu": "0.0.50"}, "libtpu: 0.0.50 there, absent here"),
        ({"processor": "arm64-0"}, "processor: arm64-0 there, .+ here"),
        ({"devices": "4 x NVIDIA H200"}, "devices: 4 x NVIDIA H200 there, 8 x cpu here"),
        ({"XLA_FLAGS": "--xla_a=1"}, "XLA_FLAGS: --xla_a=1 there, none here"),
        ({"compiler options": "xla_b=True"}, "compiler options: xla_b=True there, none here"),
        ({"argument key": "uint32[2]"}, r"argument key: uint32\[2\] there, key<fry>\[\] here"),
    ],
)
def test_each_difference_is_a_line(changed, line, saved, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    path = saved / "step.json"
    there = json.loads(path.read_text()) | {"XLA_FLAGS": ""} | changed
    path.write_text(json.dumps({k: v for k, v in there.items() if v is not None}))
    with pytest.raises(UnusableError, match=f"^{line}$"):
        load(saved)


def test_the_configuration_explains_another_step():
    there = {executables.STEP: "a" * 64, "config.seed": "0"}
    here = {executables.STEP: "a" * 64, "config.seed": "1"}
    assert differences(there, here) == []
    here[executables.STEP] = "b" * 64
    assert differences(there, here)[-1] == "config.seed: 0 there, 1 here"


def test_many_arguments_are_cut_short():
    there = {f"argument a{i}": "int32[]" for i in range(25)}
    lines = differences(there | {"jax": "1"}, {"jax": "2"})
    assert lines[0] == "jax: 1 there, 2 here"
    assert lines[-1] == "and 15 more arguments"
    assert len(lines) == 12


def flip(path, position=-100):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)


def truthfully_broken(directory):
    """A file with the right SHA-256 that no version of JAX can read."""
    (directory / "step.executable").write_bytes(b"no program")
    path = directory / "step.json"
    digest = hashlib.sha256(b"no program").hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"executable": digest}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip(d / "step.executable"), "is damaged: its SHA-256 is not that of"),
        (lambda d: os.truncate(d / "step.executable", 1000), "is damaged"),
        (
            lambda d: os.truncate(d / "step.json", 100),
            r"step\.json cannot be read: JSONDecodeError",
        ),
        (lambda d: (d / "step.json").write_text("[]"), "cannot be read: AttributeError"),
        (lambda d: (d / "step.json").write_text("{}"), "cannot be read: KeyError: 'executable'"),
        (lambda d: (d / "step.json").write_bytes(b"\xff"), "cannot be read: UnicodeDecodeError"),
        (truthfully_broken, r"step\.executable cannot be read: UnpicklingError"),
        (lambda d: (d / "step.executable").unlink(), r"step\.executable: No such file"),
        (lambda d: (d / "step.json").unlink(), r"step\.json: No such file"),
    ],
)
def test_damage_is_one_line(damage, message, saved):
    damage(saved)
    with pytest.raises(UnusableError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".", "step.json", "step.executable"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_not_opened(name, mode, saved, monkeypatch):
    path = saved / name
    path.chmod(path.stat().st_mode | mode)
    monkeypatch.setattr(executables, "deserialize_and_load", None)
    with pytest.raises(UnusableError, match=r"can be written to by others; chmod go-w"):
        load(saved)


def test_a_link_counts_as_what_it_points_to(saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (saved / "step.executable").rename(elsewhere)
    (saved / "step.executable").symlink_to(elsewhere)
    load(saved)
    elsewhere.chmod(0o666)
    with pytest.raises(UnusableError, match="can be written to by others"):
        load(saved)
    link = tmp_path / "link"
    link.symlink_to(saved)
    saved.chmod(0o777)
    with pytest.raises(UnusableError, match="link can be written to by others"):
        load(link)


def test_another_users_files_are_not_opened(saved, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: saved.stat().st_uid + 1)
    with pytest.raises(UnusableError, match=r"belongs to another user$"):
        load(saved)
