"""What is loaded, and when: the library alone is light, and TensorFlow is never imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cnn_jax

ROOT = Path(__file__).parents[1]

HEAVY = (
    "grain",
    "tensorflow_datasets",
    "array_record",
    "orbax",
    "ml_collections",
    "matplotlib",
    "tensorboardX",
    "tqdm",
    "PIL",
    "cv2",
    "simplejpeg",
    "filelock",
    "safetensors",
    "aiohttp",
    "prometheus_client",
)
NOT_INSTALLED = tuple(name for name in HEAVY if name != "orbax")  # flax itself requires orbax


@pytest.fixture
def run_python(tmp_path):
    """Returns `run(*arguments)`: a fresh Python on one device, which must succeed; its output.

    `path` is searched before the packages that are installed.
    """

    def run(*arguments: str, path: Path = tmp_path, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
            | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
            | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


IMPORT = """
import json, sys
import flax.linen, jax, optax
before = set(sys.modules)
import cnn_jax
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules.keys() - before})))
"""


def test_import_cnn_jax_loads_little_that_jax_flax_and_optax_have_not(run_python):
    loaded = json.loads(run_python("-c", IMPORT))
    assert "cnn_jax" in loaded
    assert not set(loaded) & {*HEAVY, "tensorflow"}


TRAIN_WITHOUT = """
import functools, sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())

import jax
import jax.numpy as jnp
from cnn_jax import BottleneckBlock, ConvBlock, ModernCNN, ResidualBlock
from cnn_jax import create_model, init_state, make_eval_step, make_train_step
from cnn_jax.training.augment import make_augment, normalize
from cnn_jax.training.optim import make_optimizer, make_schedule

key, images = jax.random.key(0), jnp.ones((4, 6, 6, 1))
for module in (ConvBlock(2), ResidualBlock(1), BottleneckBlock(1, expansion=1)):
    jax.eval_shape(functools.partial(module.init, train=False), key, images)

model = create_model("modern_cnn", num_classes=3, stage_sizes=(1,), width=2, stem="small")
assert isinstance(model, ModernCNN)
tx = make_optimizer("sgd", make_schedule("cosine", peak=0.1, total_steps=3))
prepare = functools.partial(normalize, mean=(0.5,), std=(0.5,), dtype=jnp.dtype("float32"))
step = make_train_step(model, tx, normalize=prepare, augment=make_augment(flip=True))
numbers = jnp.arange(4)
batch = {"image": jnp.ones((4, 6, 6, 1), jnp.uint8), "label": numbers % 3}
state = jax.jit(functools.partial(init_state, model, tx))(images, key)
state, sums = jax.jit(step)(state, {**batch, "index": numbers, "epoch": numbers}, key)
evaluate = jax.jit(make_eval_step(model, normalize=prepare))
tested = evaluate(state, {**batch, "mask": jnp.ones(4)})
assert not set(sys.argv[1:]) & set(sys.modules)
print(int(state.step), bool(sums["finite"]), float(tested["count"]))
"""


def test_the_commands_are_named_and_nothing_else_is_invented():
    for name in ("evaluate", "predict", "inspect", "plot", "export", "serve", "features"):
        assert name in dir(cnn_jax)
        assert (getattr(cnn_jax, name).__doc__ or "").strip().endswith(".")
    with pytest.raises(AttributeError, match="module 'cnn_jax' has no attribute 'evaluat'"):
        _ = cnn_jax.evaluat


def test_models_and_steps_work_where_data_and_reports_are_not_installed(run_python):
    assert run_python("-c", TRAIN_WITHOUT, *NOT_INSTALLED, "tensorflow") == "1 True 4.0\n"


FAKE_TENSORFLOW = """
import os, traceback
with open(os.environ["TENSORFLOW_MARKER"], "a") as marker:
    marker.write("".join(traceback.format_stack()))
raise ImportError("TensorFlow must not be imported")
"""


@pytest.mark.slow
def test_a_whole_training_never_imports_tensorflow(run_python, tmp_path):
    package = tmp_path / "packages" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_TENSORFLOW)
    marker, workdir = tmp_path / "marker", tmp_path / "run"
    output = run_python(
        "train.py",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.data.train_split=train[:128]",
        "--config.data.test_split=test[:64]",
        "--config.model.stage_sizes=1,",
        "--config.model.width=4",
        "--config.batch_size=64",
        "--config.eval.batch_size=64",
        "--config.num_epochs=1",
        path=package.parent,
        TENSORFLOW_MARKER=str(marker),
    )
    assert not marker.exists(), f"TensorFlow was imported by\n{marker.read_text()}"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert 0 <= rows[-1]["test/accuracy"] <= 1
    assert "test accuracy" in output
