"""The second start of a command: the same numbers, from programs that are not traced again."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from driver import ROOT, assert_same_run, assert_same_weights


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a machine that has compiled nothing yet."""
    cache = tmp_path_factory.mktemp("cache")
    return {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_LOG_COMPILES": "1"}


def programs_of(workdir):
    return json.loads((workdir / "summary.json").read_text())["programs"]


def test_a_run_from_kept_programs_is_the_one_that_was_traced(
    trainer, reference, environment, tmp_path
):
    traced, kept = tmp_path / "traced", tmp_path / "kept"
    code, output = trainer.run(traced, environment=environment)
    assert code == 0, output
    assert programs_of(traced)["traced for the next start"] == 3
    assert output.count("Finished tracing step for jit") == 2
    assert "compiling the train step\n" in output
    assert "compiling the evaluation step\n" in output

    of_the_host = "--config.data.num_threads=1"
    code, output = trainer.run(kept, of_the_host, environment=environment)
    assert code == 0, output
    assert programs_of(kept)["without tracing"] == 3
    assert programs_of(kept)["compiled"] == 0
    assert programs_of(kept)["why not kept"] == ""
    assert "3 of them not even traced" in output
    assert "Finished tracing step for jit" not in output
    assert "Finished tracing init for jit" in output, "by the plan, which compiles nothing of it"
    assert "compilation of jit(init)" not in output
    assert "compiling the" not in output
    assert_same_run(kept, traced)
    assert_same_run(kept, reference)


@pytest.mark.slow
def test_two_processes_use_what_both_have_kept_or_compile_together(trainer, tmp_path):
    """Each has a cache of its own, as on two machines; one is lost before the third start."""
    caches = [tmp_path / "cache" / str(index) for index in range(2)]
    of_each = [
        {"environment": {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_LOG_COMPILES": "1"}}
        for cache in caches
    ]
    found = []
    for name in ("traced", "kept", "lost"):
        if name == "lost":
            shutil.rmtree(caches[1])
        workdir = tmp_path / name
        codes, outputs = trainer.run_two(workdir, "--config.num_epochs=1", of_each=of_each)
        assert codes == [0, 0], outputs
        found.append(programs_of(workdir)["without tracing"])
        traced = [output.count("Finished tracing step for jit") for output in outputs]
        assert traced == ([0, 0] if name == "kept" else [2, 2])
        assert_same_weights(workdir, tmp_path / "traced", step=8)
    assert found == [0, 3, 0]
    marks = [sorted(path.read_text() for path in cache.rglob("made")) for cache in caches]
    assert marks[0] == marks[1]
    assert len(marks[0]) == 3


def test_evaluate_traces_once(reference, environment, tmp_path):
    scores = []
    for name in ("traced", "kept"):
        path = tmp_path / f"{name}.json"
        command = ["-m", "cnn_jax", "evaluate", f"--workdir={reference}", f"--json={path}"]
        process = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for sign in ("Finished tracing of_pixels for jit", "Finished XLA compilation"):
            assert (sign in process.stderr) == (name == "traced"), sign
        scores.append(path.read_text())
    assert scores[0] == scores[1]


def test_an_exported_file_is_compiled_once(reference, environment, tmp_path):
    model = tmp_path / "model.zip"
    options = {"cwd": ROOT, "env": os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment}
    command = [sys.executable, "-m", "cnn_jax"]
    subprocess.run([*command, "export", f"--workdir={reference}", f"--to={model}"], **options)
    serve = [*command, "serve", f"--model={model}", "--port=0", "--max-batch=2"]
    for name in ("compiled", "kept"):
        with subprocess.Popen(
            serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("ready"):
                    process.terminate()
        assert process.returncode == 0, lines
        traced = sum("Finished tracing call for jit" in line for line in lines)
        assert traced == (2 if name == "compiled" else 0), lines
