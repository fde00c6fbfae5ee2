"""`export`: a file that JAX alone runs, with the numbers of the run."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

from cnn_jax.__main__ import main
from cnn_jax.commands.export import export
from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError
from cnn_jax.exported import open_exported
from cnn_jax.models.folding import fold_batch_norms
from cnn_jax.runtime.compiler import YNN_FUSIONS
from cnn_jax.runtime.topologies import parse_topology
from cnn_jax.trained import open_run
from cnn_jax.training.miscompile import may_be_wrong

SIZES = (1, 7, 64)

USING = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
LOAD, LOAD_ONNX = re.findall(r"```py\n(.*?)```", USING, re.DOTALL)

IN_A_PROCESS = f"""
import os, sys

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "cnn_jax"))]
{LOAD}
import importlib.util

images = np.load("images.npy")
np.savez("found.npz", **{{str(size): predict(images[:size]) for size in {SIZES}}})
assert importlib.util.find_spec("cnn_jax") is None, "the package can be imported"
assert not {{"cnn_jax", "flax"}} & sys.modules.keys()
print(json.dumps(about["class_names"]))
"""


@pytest.fixture(scope="module")
def images(reference):
    data_dir = open_run(reference).config.data.data_dir
    return open_source("fashion_mnist_10k", "test[:64]", data_dir=data_dir).batch(np.arange(64))[
        "image"
    ]


@pytest.fixture(scope="module")
def artefact(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "clothes.zip"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export", f"--workdir={reference}", f"--to={path}"]) == 0
    words = r"within (\S+) of the run's probabilities on random images on the CPU"
    found = re.fullmatch(words, said.getvalue().splitlines()[-1])
    assert found is not None
    assert float(found[1]) <= 1e-5
    return path


def expected_probabilities(run, images):
    """By flax alone, BatchNorms and all, and a softmax in float64."""
    pixels = images.astype(np.float32) / 255
    logits = run.model.apply(run.variables, (pixels - 0.2860) / 0.3530, train=False)
    exponents = np.exp(np.asarray(logits, np.float64))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_a_cpu_is_to_make_convolutions_on_every_core(artefact):
    """And free of the fusions that can be wrong, which nobody sees who compiles a file."""
    file = open_exported(artefact)
    assert file.about["compiler_options"] == {
        "cpu": {YNN_FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    }
    assert not may_be_wrong(file.compile_probabilities(4).as_text())


def test_a_process_without_this_package_has_the_same_probabilities(
    reference, artefact, images, tmp_path
):
    np.save(tmp_path / "images.npy", images)
    shutil.copy(artefact, tmp_path)
    result = subprocess.run(
        [sys.executable, "-I", "-c", IN_A_PROCESS],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    run = open_run(reference)
    assert tuple(json.loads(result.stdout.splitlines()[-1])) == run.class_names
    expected = expected_probabilities(run, images)
    assert np.ptp(expected) > 0.1
    found = np.load(tmp_path / "found.npz")
    for size in SIZES:
        np.testing.assert_allclose(found[str(size)], expected[:size], rtol=0, atol=1e-5)


def assert_said_of_bfloat16(line):
    said = re.fullmatch(
        r"within (\S+) of the probabilities of the run's weights in float32 on random images on "
        r"the CPU; the run computes in bfloat16, and there differs by (\S+)",
        line,
    )
    assert said, line
    assert float(said[1]) <= 1e-5 < float(said[2])


def test_what_a_run_in_bfloat16_has_learned_is_exported_in_float32(
    reference, in_bfloat16, images, tmp_path, capsys
):
    path = tmp_path / "clothes.zip"
    assert main(["export", f"--workdir={in_bfloat16}", f"--to={path}"]) == 0
    assert_said_of_bfloat16(capsys.readouterr().out.splitlines()[-1])
    exported = open_exported(path)
    assert exported.about["precision"] == "float32"
    expected = expected_probabilities(open_run(reference), images)  # the same weights, in float32
    found = exported.compile_probabilities(64)(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    as_run = jax.nn.softmax(open_run(in_bfloat16).compile_logits(64)(images))
    assert np.abs(as_run - expected).max() > 1e-4  # which is why


def test_a_network_that_is_folded_wrong_is_not_written(reference, tmp_path, capsys, monkeypatch):
    def wrong(model, variables, image):
        folded, variables = fold_batch_norms(model, variables, image)
        return folded, jax.tree.map(lambda x: x * 1.01, variables)

    monkeypatch.setattr("cnn_jax.trained.fold_batch_norms", wrong)
    assert main(["export", f"--workdir={reference}", f"--to={tmp_path / 'new.zip'}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("export: as stablehlo it computes other probabilities than the run's")
    assert said.endswith("; nothing is written\n")
    assert list(tmp_path.iterdir()) == []


OF_ONNX_IN_A_PROCESS = f"""
import os, sys

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "cnn_jax"))]
{LOAD_ONNX}
images = np.load("images.npy")
run = lambda images: session.run(["probabilities"], dict(images=images))[0]
np.savez("found.npz", **{{str(size): run(images[:size]) for size in {SIZES}}})
assert not {{"cnn_jax", "flax", "jax"}} & sys.modules.keys()
print(json.dumps(about["class_names"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime")),
    reason='needs pip install jax2onnx onnxruntime "orbax-checkpoint>=0.12.8"',
)
def test_onnxruntime_alone_has_the_same_probabilities(reference, in_bfloat16, images, tmp_path):
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def python(*arguments):
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    # of its own: the converter changes flax and jax while it works
    flags = (f"--workdir={in_bfloat16}", "--format=onnx", "--to=clothes.onnx")
    output = python("-m", "cnn_jax", "export", *flags)
    assert "on onnxruntime\n" in output
    assert_said_of_bfloat16(output.splitlines()[-1])
    np.save(tmp_path / "images.npy", images)
    output = python("-c", OF_ONNX_IN_A_PROCESS)
    run = open_run(reference)
    assert tuple(json.loads(output.splitlines()[-1])) == run.class_names
    expected = expected_probabilities(run, images)
    found = np.load(tmp_path / "found.npz")
    for size in SIZES:
        np.testing.assert_allclose(found[str(size)], expected[:size], rtol=0, atol=1e-5)


def test_one_program_for_three_platforms_without_batch_norms(reference, artefact):
    with zipfile.ZipFile(artefact) as file:
        assert file.namelist() == ["model.json", "model.stablehlo"]
        about = json.loads(file.read("model.json"))
        exported = jax.export.deserialize(bytearray(file.read("model.stablehlo")))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [str(each) for each in exported.in_avals] == ["uint8[batch,28,28,1]"]
    assert [str(each) for each in exported.out_avals] == ["float32[batch,10]"]
    assert exported.nr_devices == 1
    module = exported.mlir_module()
    assert "stablehlo.convolution" in module
    assert "rsqrt" not in module  # nor anything else of a BatchNorm
    assert about["batch_norms_folded"] is True
    assert about["input"]["shape"] == ["batch", 28, 28, 1]
    assert about["preprocessing"]["mean"] == [0.2860]
    assert about["step"] == 24
    assert about["versions"]["jax"] == jax.__version__


COMPILE = """
import json, sys, zipfile
import jax, jax.export
from jax.sharding import SingleDeviceSharding
from cnn_jax.runtime.topologies import parse_topology

with zipfile.ZipFile(sys.argv[1]) as file:
    exported = jax.export.deserialize(bytearray(file.read("model.stablehlo")))
device = SingleDeviceSharding(parse_topology(sys.argv[2]).devices()[0])
images = jax.ShapeDtypeStruct((7, 28, 28, 1), "uint8", sharding=device)
compiled = jax.jit(exported.call).lower(images).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
products = [line for line in text.splitlines() if "convolution(" in line or "custom-call(" in line]
print(json.dumps({
    "convolutions": any("conv" in line for line in products),
    "branches": "conditional(" in text,
    "outputs": memory.output_size_in_bytes,
}))
"""


@pytest.mark.parametrize(
    ("topology", "compiler"), [("v5e:2x2", "libtpu"), ("h200", "jax_cuda12_plugin")]
)
def test_it_compiles_for_machines_that_are_not_here(topology, compiler, artefact):
    pytest.importorskip(compiler, reason="needs pip install 'cnn_jax[aot-tpu,aot-gpu]'")
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(artefact), topology],
        env=os.environ | parse_topology(topology).environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["convolutions"]
    assert not found["branches"]  # of the three platforms' forms its own is left
    assert found["outputs"] >= 7 * 10 * 4


def test_which_checkpoint(reference, tmp_path):
    assert export(reference, tmp_path / "a.zip", checkpoint="21", platforms=["cpu"])["step"] == 21


def test_mistakes_have_one_message(reference, artefact, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["export", *arguments])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    before = artefact.read_bytes()
    to = f"--to={tmp_path / 'new.zip'}"
    run = f"--workdir={reference}"
    assert "is already there; name another file" in refused(run, f"--to={artefact}")
    assert "there is no directory" in refused(run, f"--to={tmp_path / 'no' / 'new.zip'}")
    assert "required: --to" in refused(run)
    error = refused(run, to, "--format=savedmodel")
    assert "'savedmodel': only TensorFlow writes a SavedModel, and it is never imported" in error
    assert "take stablehlo, which jax.export reads, or onnx" in error
    assert "invalid choice: 'torch'" in refused(run, to, "--format=torch")
    assert "the run has its configuration" in refused(run, to, "--config.batch_size=3")
    with pytest.raises(UserError, match="exists already and is left as it is"):
        export(reference, artefact)
    assert artefact.read_bytes() == before

    assert main(["export", f"--workdir={tmp_path}", to]) == 1
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert main(["export", run, to]) == 1
    assert capsys.readouterr().err == (
        "export: stablehlo needs flatbuffers; install it: pip install flatbuffers\n"
    )
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert main(["export", run, to, "--format=onnx"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("export: onnx needs jax2onnx")
    assert error.endswith('pip install jax2onnx onnxruntime "orbax-checkpoint>=0.12.8"\n')
    assert list(tmp_path.iterdir()) == []
