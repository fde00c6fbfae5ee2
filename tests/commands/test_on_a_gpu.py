"""What is compiled for a described GPU, on that GPU; skipped where there is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnn_jax.runtime.accelerators import ACCELERATORS

ROOT = Path(__file__).parents[2]

KIND = "import jax; print(jax.devices()[0].device_kind)"

PEAK = """
import sys
from pathlib import Path

import jax
import numpy as np

from cnn_jax.cli.config_files import load, split_overrides
from cnn_jax.config import override, parse
from cnn_jax.plan import make_plan
from cnn_jax.runtime.compiler import compile_program

_, texts = split_overrides(sys.argv[2:])
plan = make_plan(parse(override(load(Path(sys.argv[1])), texts), num_devices=1))
step = compile_program(plan.lower("train"), plan.compiler.options)
state, key = plan.make_state(), plan.make_key()
batch = {
    name: jax.device_put(np.zeros(each.shape, each.dtype), each.sharding)
    for name, each in plan.arguments("train")["batch"].items()
}
for _ in range(2):
    state = jax.block_until_ready(step(state, batch, key))[0]
print(jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])
"""

GRADIENTS = """
import sys

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.models import create_model

jax.config.update("jax_default_matmul_precision", "highest")
model = create_model(sys.argv[1], num_classes=10)
images = np.random.default_rng(0).normal(size=(16, 64, 64, 3)).astype(np.float32)
weights = np.random.default_rng(1).normal(size=(16, 10)).astype(np.float32)
cpu = jax.devices("cpu")[0]
with jax.default_device(cpu):
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))


@jax.jit
def gradient(params, rest, images):
    def loss(params):
        logits, _ = model.apply({"params": params, **rest}, images, train=True, **extra)
        return jnp.sum(logits * weights)

    extra = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    return jax.grad(loss)(params)


params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
found = [
    jax.device_get(gradient(*jax.device_put((params, rest, images), device)))
    for device in (cpu, jax.devices()[0])
]
for (path, left), right in zip(
    jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
):
    size = np.linalg.norm(left)
    print(np.linalg.norm(left - right) / (size + 1e-3), size, jax.tree_util.keystr(path))
"""


def run(*arguments, cache=""):
    """Runs Python in a process of its own, which sees one GPU; returns what it printed."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del environment["JAX_NUM_CPU_DEVICES"]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def topology():
    """The name of the first GPU of this machine."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("this machine has no GPU of NVIDIA")
    found = run("-c", KIND)
    if found.returncode:
        pytest.skip(f"JAX finds no GPU: {found.stderr.strip().splitlines()[-1]}")
    kind = found.stdout.strip()
    names = [name for name, each in ACCELERATORS.items() if each.kind == kind]
    if not names:
        pytest.skip(f"{kind} is not described in cnn_jax.runtime.accelerators")
    return names[0]


SHORT = (
    "--config=configs/quickstart.py",
    "--config.num_epochs=1",
    "--config.data.train_split=train[:640]",
    "--config.data.test_split=test[:256]",
    "--config.log.every_steps=1",
)


def first_loss(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(row["train/loss"] for row in rows if "train/loss" in row)


def succeeded(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_takes_the_memory_that_was_predicted(precision, topology, tmp_path):
    """Within a tenth, in a process that does nothing else; code is not in the card's count.

    An earlier process compiles: what it tries on the card to choose algorithms takes memory too.
    """
    config = "configs/synthetic.py"
    changes = ["--config.batch_size=64", f"--config.precision={precision}"]
    report = tmp_path / "report.json"
    flags = [f"--topology={topology}", "--step=train", f"--json={report}"]
    succeeded(run("-m", "cnn_jax", "compile", f"--config={config}", *changes, *flags))
    (row,) = json.loads(report.read_text())["rows"]
    predicted = row["memory"]["peak"] - row["memory"]["code"]
    succeeded(run("-c", PEAK, config, *changes, cache=tmp_path))
    said = succeeded(run("-c", PEAK, config, *changes, cache=tmp_path))
    measured = int(said.splitlines()[-1])
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_the_second_start_traces_nothing(topology, tmp_path):
    """And its first step has the loss of the first start's."""
    losses = []
    for name, untraced in {"traced": 0, "kept": 3}.items():
        workdir = tmp_path / name
        flags = [*SHORT, f"--workdir={workdir}", f"--config.data.data_dir={tmp_path / 'data'}"]
        succeeded(run("train.py", *flags, cache=tmp_path / "cache"))
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["programs"]["without tracing"] == untraced
        losses.append(first_loss(workdir))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "googlenet_mini"])
def test_gradients_are_those_of_the_cpu(name, topology):
    """Through what is written otherwise for a GPU: stem, max pooling, BatchNorm.

    Rounding changes masks of ReLU: on an H200 by up to 2.6 and 0.4 % of an array's norm.
    """
    rows = [line.split(" ", 2) for line in succeeded(run("-c", GRADIENTS, name)).splitlines()]
    assert len(rows) > 50
    assert max(float(difference) for difference, _, _ in rows) < 0.1, rows
