"""Names of machines, and their devices; of TPUs and GPUs where the compilers are installed."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from cnn_jax.errors import UserError
from cnn_jax.runtime import topologies
from cnn_jax.runtime.accelerators import ACCELERATORS, GIB
from cnn_jax.runtime.topologies import parse_topology

NO_LIBTPU = "compiling for TPUs: pip install 'cnn_jax[aot-tpu]'"
NO_CUDA = "compiling for GPUs: pip install 'cnn_jax[aot-gpu]'"

DESCRIBE = """
import json, sys
from cnn_jax.runtime.topologies import parse_topology
found = {}
for name in sys.argv[1:]:
    devices = parse_topology(name).devices()
    hosts = len({device.process_index for device in devices})
    found[name] = [len(devices), hosts, devices[0].device_kind]
print(json.dumps(found))
"""

COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated
from cnn_jax.runtime.topologies import parse_topology

def step(weights, images):
    loss = lambda weights: jnp.mean(jax.nn.relu(images @ weights) ** 2)
    return weights - 0.1 * jax.grad(loss)(weights)

mesh = make_mesh(devices=parse_topology(sys.argv[1]).devices())
size = 64 * mesh.size
weights = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=replicated(mesh))
images = jax.ShapeDtypeStruct((size, 256), jnp.bfloat16, sharding=batch_sharding(mesh))
compiled = jax.jit(step).lower(weights, images).compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "devices": mesh.size,
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "all-reduce": "all-reduce" in compiled.as_text(),
}))
"""

TOO_LARGE = """
import json, sys
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from cnn_jax.runtime.topologies import parse_topology

found = {}
for name in sys.argv[1:]:
    sharding = SingleDeviceSharding(parse_topology(name).devices()[0])
    terabyte = jax.ShapeDtypeStruct((256, 2**30), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(terabyte).compile()
    except jax.errors.JaxRuntimeError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def in_child(code, *names):
    """What `code` prints, as JSON, in a process that is started as the first topology wants it."""
    environment = os.environ | parse_topology(names[0]).environment()
    result = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.parametrize(
    ("text", "name", "platform", "num_devices", "links"),
    [
        ("v5e:4x4", "v5e:4x4", "tpu", 16, 2),
        ("v5e:2x2", "v5e:2x2", "tpu", 4, 2),
        ("v5e:1x1", "v5e:1x1", "tpu", 1, 0),
        ("v5e:16x16", "v5e:16x16", "tpu", 256, 4),
        ("v5p:2x2x1", "v5p:2x2x1", "tpu", 4, 2),
        ("v5e:8x16", "v5e:8x16", "tpu", 128, 2),
        ("v4:2x2x4", "v4:2x2x4", "tpu", 16, 3),
        ("v4:4x4x8", "v4:4x4x8", "tpu", 128, 6),
        ("v3:2x2", "v3:2x2", "tpu", 8, 2),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", "tpu", 8, 2),
        ("h200", "h200:1", "cuda", 1, 0),
        ("h200:8", "h200:8", "cuda", 8, 18),
        ("h200:16", "h200:16", "cuda", 16, 18),
        (" A100-40GB:2 ", "a100-40gb:2", "cuda", 2, 12),
        ("cpu", "cpu:1", "cpu", 1, 0),
        ("cpu:8", "cpu:8", "cpu", 8, 0),
    ],
)
def test_a_name_says_how_many_devices(text, name, platform, num_devices, links):
    topology = parse_topology(text)
    assert topology.name == name
    assert topology.platform == platform
    assert topology.num_devices == num_devices
    assert topology.links == links
    assert parse_topology(name) == topology


def test_more_gpus_than_a_host_holds_are_on_full_hosts():
    assert parse_topology("h200:8").shape == (1, 8)
    assert parse_topology("h200:16").shape == (2, 8)
    assert parse_topology("t4:8").shape == (2, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h201:8", r"no accelerator 'h201' \(did you mean 'h200'\?\); known: a100-40gb, "),
        ("a100:8", r"no accelerator 'a100' \(did you mean 'a100-[48]0gb'\?\)"),
        ("v5:2x2", r"no accelerator 'v5' \(did you mean 'v5[ep]'\?\)"),
        ("", r"no accelerator ''; known: "),
        *[
            (f"v5e{size}", r"v5e takes the chips along 2 axes, such as v5e:2x2: even along the")
            for size in ("", ":", ":4", ":2x2x1", ":0x2", ":3x3", ":1x2", ":-2x2", ":2x", ":2,2")
        ],
        ("v5e:16x32", "at most 256 in all"),
        ("v5p:2x2", r"v5p takes the chips along 3 axes, such as v5p:2x2x1: "),
        *[
            (f"h200:{size}", r"h200 takes a number of devices, such as h200:8: at most 8, or full")
            for size in ("", "0", "2x2", "12", "8.0", "many")
        ],
        ("cpu:0", "cpu takes a number of devices, such as cpu:8$"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_rule(text, message):
    with pytest.raises(UserError, match=f"^topology {text!r}: .*{message}"):
        parse_topology(text)


def test_cpu_devices():
    assert parse_topology("cpu:3").devices() == jax.devices()[:3]
    with pytest.raises(UserError, match="cpu:9: this process has 8 CPU devices; start it with"):
        parse_topology("cpu:9").devices()


def test_a_process_can_be_given_any_number_of_cpus():
    found, _ = in_child(DESCRIBE, "cpu:3")
    assert found == {"cpu:3": [3, 1, "cpu"]}


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "aot-tpu"), ("h200:8", "aot-gpu")])
def test_a_compiler_that_is_not_installed_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf'{name}: needs .*: pip install "cnn_jax\[{extra}\]"'):
        parse_topology(name).devices()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("ABORTED: libtpu multi-process lockfile. Run rm", "v5e:2x2: another process uses libtpu"),
        (
            "INVALID_ARGUMENT: no such slice\nfile.cc:1",
            "^v5e:2x2: INVALID_ARGUMENT: no such slice$",
        ),
    ],
)
def test_a_refusal_of_the_compiler_is_one_line(refusal, message, monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError(refusal)

    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: object())
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=message):
        parse_topology("v5e:2x2").devices()


def test_tpu_slices_are_as_libtpu_describes_them():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    slices = {
        "v3:2x2": [8, 1, "TPU v3"],
        "v3:4x4": [32, 4, "TPU v3"],
        "v4:2x2x1": [4, 1, "TPU v4"],
        "v4:4x4x4": [64, 16, "TPU v4"],
        "v5e:1x1": [1, 1, "TPU v5 lite"],
        "v5e:2x2": [4, 1, "TPU v5 lite"],
        "v5e:4x4": [16, 4, "TPU v5 lite"],
        "v5p:2x2x1": [4, 1, "TPU v5"],
        "v5p:2x2x2": [8, 2, "TPU v5"],
        "v6e:2x4": [8, 2, "TPU v6 lite"],
        "tpu7x:2x2x1": [8, 1, "TPU7x"],
    }
    found, stderr = in_child(DESCRIBE, *slices)
    assert found == slices
    assert "libtpu" not in stderr  # no complaints of a metadata server that is not there
    for name, (devices, hosts, kind) in slices.items():
        topology = parse_topology(name)
        assert topology.num_devices == devices
        assert topology.accelerator.kind == kind
        assert hosts == max(devices // topology.accelerator.devices_per_host, 1)


def test_every_gpu_is_as_xla_describes_it():
    pytest.importorskip("jax_cuda12_plugin", reason=NO_CUDA)
    names = [name for name, entry in ACCELERATORS.items() if entry.platform == "cuda"]
    found, _ = in_child(DESCRIBE, *names, "h200:8", "h200:16")
    expected = {name: [1, 1, ACCELERATORS[name].kind] for name in names}
    assert found == expected | {
        "h200:8": [8, 1, "NVIDIA H200"],
        "h200:16": [16, 2, "NVIDIA H200"],
    }


@pytest.mark.parametrize("name", ["cpu:4", "v5e:2x2", "h200:8"])
def test_a_sharded_step_is_compiled_for_it(name):
    if name.startswith("v5e"):
        pytest.importorskip("libtpu", reason=NO_LIBTPU)
    if name.startswith("h200"):
        pytest.importorskip("jax_cuda12_plugin", reason=NO_CUDA)
    found, _ = in_child(COMPILE, name)
    assert found == {
        "devices": parse_topology(name).num_devices,
        "arguments": 2 * 256 * 256 + 2 * 64 * 256,  # all the weights, this device's images
        "outputs": 2 * 256 * 256,
        "all-reduce": True,
    }


def test_memory_of_a_tpu_is_what_its_compiler_admits():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    names = ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
    found, _ = in_child(TOO_LARGE, *names)
    for name in names:
        admitted = re.search(r"available HBM \(([\d.]+)G\)", found[name])
        assert admitted, found[name]
        assert parse_topology(name).accelerator.memory == pytest.approx(
            float(admitted[1]) * GIB, rel=0.01
        )


def test_two_processes_compile_for_tpus_at_once():
    pytest.importorskip("libtpu", reason=NO_LIBTPU)
    hold = "from cnn_jax.runtime.topologies import *; parse_topology('v5e:2x2').devices(); "
    environment = os.environ | parse_topology("v5e:2x2").environment()
    with subprocess.Popen(
        [sys.executable, "-c", hold + "print('ready', flush=True); input()"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        assert in_child(DESCRIBE, "v5e:2x2")[0] == {"v5e:2x2": [4, 1, "TPU v5 lite"]}
        other.communicate("\n")
