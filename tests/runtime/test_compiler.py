"""Settings asked of the compiler, and a cache of programs that nothing breaks."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from cnn_jax.runtime import compiler
from cnn_jax.runtime.compiler import CompilerSettings, compile_program, compiler_settings

SCRIPT = """
import hashlib, json
from cnn_jax.runtime.compiler import CompilationCounter, compile_program, start_cache

counter, lines = CompilationCounter(), []
directory = start_cache(lines.append)

import jax, jax.numpy as jnp, numpy as np, optax
from cnn_jax import create_model, init_state, make_train_step
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated, shard_state

model = create_model("resnet_mini", num_classes=4, stage_sizes=(1,), width=8, stem="medium")
tx = optax.sgd(0.1, momentum=0.9)
mesh = make_mesh(data=2, fsdp=2)
make = lambda: init_state(model, tx, jnp.zeros((1, 8, 8, 1)), jax.random.key(0))
shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_state(mesh, jax.eval_shape(make)))
state = jax.jit(make, out_shardings=shardings)()
numbers = np.random.default_rng(0)
batch = {"image": numbers.normal(size=(8, 8, 8, 1)), "label": numbers.integers(0, 4, 8)}
batch = {"image": batch["image"].astype(np.float32), "label": batch["label"].astype(np.int32)}
batch = jax.device_put(batch, batch_sharding(mesh))
key = jax.device_put(jax.random.key(1), replicated(mesh))
step = compile_program(
    jax.jit(
        make_train_step(model, tx), donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    ).lower(state, batch, key)
)
for _ in range(3):
    state, sums = step(state, batch, key)
digest = hashlib.sha256()
for leaf in jax.tree.leaves(jax.device_get(state)):
    digest.update(np.asarray(leaf).tobytes())
print(json.dumps({
    "directory": str(directory), "lines": lines, "hits": counter.hits, "misses": counter.misses,
    "weights": digest.hexdigest(),
}))
"""
"""Three steps with donated, sharded state, on four devices."""


def train(home: Path, **environment: str) -> dict:
    """Returns what a process says that trains with its cache below `home`."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    settings = {"JAX_NUM_CPU_DEVICES": "4", "XDG_CACHE_HOME": str(home), **environment}
    process = subprocess.run(
        [sys.executable, "-W", "default", "-c", SCRIPT],
        env=inherited | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """The home of a cache that one process has filled, and what that process said."""
    home = tmp_path_factory.mktemp("home")
    return home, train(home)


def programs_of(run: dict) -> list[Path]:
    return sorted(Path(run["directory"]).glob("*-cache"))


def test_a_cold_start_compiles_and_keeps_all_programs(cold):
    home, run = cold
    assert Path(run["directory"]).is_relative_to(home / "cnn_jax" / "xla")
    assert Path(run["directory"]).stat().st_mode & 0o077 == 0
    assert run["lines"] == []
    assert run["hits"] == 0
    assert run["misses"] == len(programs_of(run)) > 1


def test_a_warm_start_compiles_nothing_and_gives_the_same_weights(cold):
    home, run = cold
    again = train(home)
    assert (again["hits"], again["misses"]) == (run["misses"], 0)
    assert again["weights"] == run["weights"]


def test_damaged_programs_are_compiled_again_and_replaced(cold):
    home, run = cold
    programs = programs_of(run)
    for i, program in enumerate(programs):
        content = bytearray(program.read_bytes())
        content[len(content) // 2] ^= 0xFF
        program.write_bytes(content if i % 3 == 0 else content[: len(content) // 2 * (i % 3 - 1)])
    mended = train(home)
    assert mended["weights"] == run["weights"]
    assert (mended["hits"], mended["misses"]) == (0, len(programs))
    assert all("fails at reading jit_" in line for line in mended["lines"])
    again = train(home)
    assert (again["hits"], again["misses"], again["lines"]) == (len(programs), 0, [])


def test_programs_whose_writing_was_cut_short_do_not_count(cold):
    home, run = cold
    programs = programs_of(run)
    cut = programs[0]
    cut.write_bytes(cut.read_bytes()[:100])
    cut.with_name(cut.name.removesuffix("-cache") + "-atime").unlink()
    again = train(home)
    assert (again["hits"], again["misses"]) == (len(programs) - 1, 1)
    assert again["lines"] == []
    assert again["weights"] == run["weights"]


def test_a_directory_that_cannot_be_used_is_done_without(tmp_path, cold):
    file = tmp_path / "file"
    file.touch()
    run = train(file)
    assert run["directory"] == "None"
    assert (run["hits"], run["misses"]) == (0, 0)
    (line,) = run["lines"]
    assert line.startswith(f"programs are compiled anew each time, as {file}/cnn_jax/xla/")
    assert line.endswith(" cannot be used: Not a directory")
    assert run["weights"] == cold[1]["weights"]


@pytest.fixture
def settings_of_jax():
    """Puts the cache's settings back; a test must not compile in between."""
    names = [name for name in jax.config.values if "cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def home(tmp_path, monkeypatch, settings_of_jax):
    for name in [name for name in os.environ if name.startswith("JAX_") and "CACHE" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    return tmp_path


def test_the_cache_is_bounded(home):
    assert compiler.start_cache(print)
    assert jax.config.jax_compilation_cache_max_size == 4 * 2**30
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_directory_open_to_others_is_not_used(home, capsys):
    directory = Path(compiler.start_cache(print) or "")
    jax.config.update("jax_compilation_cache_dir", None)
    directory.chmod(0o777)
    assert compiler.start_cache(print) is None
    assert capsys.readouterr().out.endswith(f"as {directory} can be written to by others\n")
    assert jax.config.jax_compilation_cache_dir is None


def test_the_switch_of_jax_turns_it_off(home):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiler.start_cache(print) is None
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("alone", "shared", "platform", "used"),
    [
        (True, False, "cpu", True),
        (False, True, "gpu", True),
        (False, False, "gpu", False),
        (False, True, "cpu", False),
    ],
)
def test_processes_use_the_cache_where_all_find_the_same(
    alone, shared, platform, used, home, monkeypatch
):
    directory = compiler.start_cache(print)
    seen = []
    monkeypatch.setattr(compiler, "is_alone", lambda: alone)
    monkeypatch.setattr(compiler, "is_shared", lambda place: seen.append(place) or shared)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    compiler.use_cache_together()
    assert jax.config.jax_enable_compilation_cache == used
    assert seen == ([] if alone else [directory])


def test_what_the_user_has_told_jax_holds(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    assert compiler.start_cache(print) == "gs://bucket/cache"
    assert jax.config.jax_compilation_cache_max_size == -1
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("platform", compiler.OPTIONS)
def test_the_compiler_knows_every_option(platform):
    settings = compiler_settings(platform, deterministic=True)
    assert settings.unknown == ()
    assert ("xla_gpu_deterministic_ops" in settings.options) == (platform == "gpu")


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    options = {"xla_embed_ir_in_executable": True, "xla_from_tomorrow": "1"}
    monkeypatch.setitem(compiler.OPTIONS, "cpu", options)
    settings = compiler_settings()
    assert settings == CompilerSettings(
        "cpu", {"xla_embed_ir_in_executable": True}, ("xla_from_tomorrow",)
    )
    assert settings.describe() == (
        "xla_embed_ir_in_executable=True, without xla_from_tomorrow, which it does not know, "
        "float32 products in float32"
    )
    doubled = compile_program(jax.jit(lambda x: 2 * x).lower(3.0), settings.options)
    assert doubled(3.0) == 6.0


@pytest.mark.parametrize(("groups", "by"), [(1, "XLA"), (2, "YNNPACK")])
def test_a_convolution_on_the_cpu_is_made_by(groups, by):
    """YNNPACK has one core make this one where its channels are of one group; see `OPTIONS`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 16, 16, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32 // groups, 32)).astype(np.float32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    lowered = jax.jit(convolve).lower(x, kernel)
    compiled = compile_program(lowered, compiler_settings("cpu").options)
    unseen = lowered.compile(compiler_options=dict(compiler.unseen_options(lowered)))
    for program in (compiled, unseen):
        assert ("__ynn_fusion" in program.as_text()) == (by == "YNNPACK")
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2)).astype(np.float64)
    windows = windows.reshape(-1, groups, 32 // groups, 3, 3)
    kernels = kernel.astype(np.float64).reshape(3, 3, 32 // groups, groups, 32 // groups)
    expected = np.einsum("pgcij,ijcgd->pgd", windows, kernels, optimize=True)
    np.testing.assert_allclose(compiled(x, kernel).reshape(expected.shape), expected, atol=1e-4)


def test_what_the_environment_says_of_an_option_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/x --{compiler.YNN_FUSIONS}=-reduce")
    assert compiler_settings("cpu").options == compiler.wanted_options() == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
    assert list(compiler_settings("cpu").options) == [compiler.YNN_FUSIONS]
    assert compiler.wanted_options() == compiler.OPTIONS["cpu"]


def test_what_is_for_devices_of_one_kind_goes_to_them_alone(monkeypatch):
    own, option = jax.devices()[0].device_kind, "xla_backend_optimization_level"
    monkeypatch.setattr(compiler, "OF_KINDS", {own: {option: "1"}, "TPU v9": {option: "2"}})
    assert dict(compiler_settings("cpu").options) == {**compiler.OPTIONS["cpu"], option: "1"}
    assert compiler_settings(device=jax.devices()[3]).options[option] == "1"
    assert option not in compiler_settings("gpu").options, "no such device is here"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{option}=0")
    assert option not in compiler_settings("cpu").options


def test_the_precision_of_products_is_said():
    assert compiler_settings("cpu").describe().endswith("REDUCE, float32 products in float32")
    assert compiler_settings("tpu").describe() == "XLA's defaults, float32 products in bfloat16"
    with jax.default_matmul_precision("highest"):
        assert compiler_settings("tpu").describe().endswith("float32 products in highest")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match=r"platform is 'cuda'; it must be one of gpu, tpu, cpu"):
        compiler_settings("cuda")
