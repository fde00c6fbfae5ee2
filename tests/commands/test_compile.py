"""Compiling for described machines: real compiles, and compilers that fail."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cnn_jax.__main__ import main
from cnn_jax.commands import compile as command
from cnn_jax.commands.compile_child import _float32
from cnn_jax.runtime import hlo
from cnn_jax.runtime.topologies import parse_topology

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.model.width=4",
    "--config.model.stage_sizes=1,",
    "--config.batch_size=64",
    "--config.eval.batch_size=16",
]
CONFIG = f"--config={ROOT}/configs/quickstart.py"
OPTIONS = command.Options(steps=("train",))
GIB = 2**30


def compiled(*arguments):
    """Runs the command in a process of its own; its exit code and what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "cnn_jax", "compile", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        timeout=600,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def cpu_report(tmp_path_factory):
    """The folder and the output of all steps compiled for two CPU devices."""
    folder = tmp_path_factory.mktemp("compile")
    written = [f"--json={folder / 'a.json'}", f"--dump={folder}", f"--plot={folder}"]
    streamed = "--config.data.residency=host"  # of a gather the compiler's own count is wrong
    code, output = compiled(CONFIG, *SMALL, streamed, "--topology=cpu:2", *written)
    assert code == 0, output
    return folder, output


def test_every_step_is_a_row(cpu_report):
    folder, output = cpu_report
    rows = json.loads((folder / "a.json").read_text())["rows"]
    assert [row["step"] for row in rows] == ["train", "evaluation", "prediction"]
    assert [row["batch"] for row in rows] == [64, 16, 16]
    for row in rows:
        assert row["step"] in output
        assert row["memory"]["peak"] > row["memory"]["arguments"] > 0
        assert row["memory"]["fits"] is None
        assert row["seconds"]["compiling"] > 0
        assert row["versions"]["jax"]
        for count in ("flops_per_image", "bytes_per_image"):
            assert row[count]["hlo"] == pytest.approx(row[count]["compiler"], rel=0.02)
    # On the padding, too, and without the gradient of the images: within a third of it.
    train = rows[0]["flops_per_image"]
    assert train["hlo"] == pytest.approx(train["geometry"], rel=0.33)
    reduced = [each for each in rows[0]["collectives"] if each["kind"] == "all-reduce"]
    assert sum(each["bytes"] for each in reduced) > 4 * 350  # the gradients
    assert rows[2]["collectives"] == []


def test_programs_and_pictures_are_written(cpu_report):
    folder, _ = cpu_report
    for step in ("train", "evaluation", "prediction"):
        (optimised,) = folder.glob(f"*{step}.hlo.txt")
        assert "HloModule" in optimised.read_text()
        stem = optimised.name.removesuffix(".hlo.txt")
        assert "stablehlo.convolution" in (folder / f"{stem}.stablehlo.txt").read_text()
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_reports_are_compared(cpu_report, tmp_path, capsys):
    folder, _ = cpu_report
    report = json.loads((folder / "a.json").read_text())
    report["rows"][0]["kernels"] += 10
    del report["rows"][1]
    other = tmp_path / "b.json"
    other.write_text(json.dumps(report))
    assert main(["compile", "--compare", str(folder / "a.json"), str(other)]) == 0
    output = capsys.readouterr().out
    kernels = report["rows"][0]["kernels"]
    assert f"kernels: {kernels - 10:,.4g} -> {kernels:,.4g}" in output
    assert "evaluation: only in" in output
    assert "prediction: the same" in output


@pytest.fixture
def two_configurations(tmp_path):
    """The quickstart made small, and the same with twice the images in a step."""
    paths = []
    for name, batch_size in {"before": 32, "after": 64}.items():
        path = tmp_path / f"{name}.py"
        path.write_text(
            f"from configs import quickstart\n\n\ndef get_config():\n"
            f"    config = quickstart.get_config()\n    config.batch_size = {batch_size}\n"
            "    config.model.width, config.model.stage_sizes = 4, (1,)\n    return config\n"
        )
        paths.append(str(path))
    return paths


def test_configurations_are_compiled_and_compared(two_configurations, tmp_path):
    report = tmp_path / "report.json"
    code, output = compiled(
        "--compare", *two_configurations, "--topology=cpu:1", "--step=train", f"--json={report}"
    )
    assert code == 0, output
    old, new = json.loads(report.read_text())["rows"]
    assert [old["file"], new["file"]] == two_configurations
    assert [old["batch"], new["batch"]] == [32, 64]
    comparison = output[output.index(" -> ".join(two_configurations)) :]
    before, after = (row["memory"]["temporaries"] for row in (old, new))
    assert after > 1.5 * before
    change = f"{before:,.4g} -> {after:,.4g} ({after / before - 1:+.1%})"
    assert f"  memory.temporaries: {change}" in comparison
    assert "  batch: 32 -> 64 (+100.0%)" in comparison


def test_the_rows_of_two_configurations_are_told_apart(
    two_configurations, compiler, tmp_path, capsys
):
    """Each by its file, in a sweep too; what is the same in both is not shown as changed."""
    compiler(
        "batch = request['config']['batch_size']\n"
        "seed = request['config']['seed']\n"
        "answer = {'batch': batch, 'devices': 1, 'memory': {'peak': batch + seed, 'fits': True,\n"
        "          'capacity': 2**30}, 'kernels': 7}\n"
        "open(request['report'], 'w').write(json.dumps(answer))"
    )
    report = str(tmp_path / "report.json")
    flags = ["--topology=cpu:1", "--step=train", "--config.seed=1,2", f"--json={report}"]
    assert main(["compile", "--compare", *two_configurations, *flags]) == 0
    output = capsys.readouterr().out
    assert main(["compile", "--compare", report, report]) == 0
    assert capsys.readouterr().out.count(": the same") == 4
    assert output[output.index(" -> ") :].splitlines()[1:-1] == [
        "cpu:1 seed=1 train:",
        "  memory.peak: 33 -> 65 (+97.0%)",
        "  batch: 32 -> 64 (+100.0%)",
        "cpu:1 seed=2 train:",
        "  memory.peak: 34 -> 66 (+94.1%)",
        "  batch: 32 -> 64 (+100.0%)",
    ]


def test_a_mistake_in_either_configuration_names_its_file(two_configurations, capsys):
    Path(two_configurations[1]).write_text("def get_config():\n    return {'batch_size': 'x'}\n")
    assert main(["compile", "--compare", *two_configurations, "--topology=cpu:1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{two_configurations[1]}: ")
    assert "batch_size = 'x': must be an int" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --topology"),
        (["--topology=cpu:1", CONFIG], "names both configurations itself, without --config"),
        (["--topology=h200", "--max-batch"], "--compare: not with --max-batch"),
        (["--topology=cpu:1", "--save=programs"], "--save: takes one topology and one conf"),
    ],
)
def test_mistakes_in_comparing_configurations(arguments, message, two_configurations, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compile", "--compare", *two_configurations, *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_programs_for_a_gpu_are_not_saved(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compile", CONFIG, "--topology=h200", f"--save={tmp_path}"])
    assert exit_.value.code == 2
    assert "a program for h200:1 would fail there: cuDNN" in capsys.readouterr().err


def test_what_cannot_be_compared(two_configurations, tmp_path, capsys):
    before, _ = two_configurations
    report = str(tmp_path / "report.json")
    Path(report).write_text('{"rows": []}')
    for pair, message in {
        (before, report): "two reports or two configurations, not one of each",
        (before, before): "takes two configurations, not one twice",
    }.items():
        with pytest.raises(SystemExit):
            main(["compile", "--compare", *pair, "--topology=cpu:1"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--topology=cpu:3"], 2, "batch_size = 64: must be divisible by the number of devices, 3"),
        (["--topology=cpu:1", "--config.batch_size=64,x"], 2, "batch_size = 'x': must be an int"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(arguments, code, message, capsys):
    assert main(["compile", CONFIG, *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=cpu:1"], "required: --config"),
        ([CONFIG, "--topology=v5e:3x3"], "v5e takes the chips along 2 axes"),
        ([CONFIG, "--topology=h20"], "no accelerator 'h20' (did you mean 'h200'?)"),
        ([CONFIG, "--topology=h200,cpu:1", "--max-batch"], "the memory of cpu:1 is not known"),
        ([CONFIG, "--json=/no/where/x.json"], "there is no directory /no/where"),
        ([CONFIG, f"--compare={ROOT}/README.md"], "expected 2 arguments"),
        ([CONFIG], "required: --topology"),
        ([CONFIG, "--topology=cpu:1", "--step=trian"], "--step trian: must be one of train, eval"),
        ([CONFIG, f"--json={ROOT}/README.md"], "is already there"),
    ],
)
def test_mistakes_in_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compile", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_report_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[]")
    assert main(["compile", "--compare", str(path), str(path)]) == 1
    assert "no report of `compile --json`" in capsys.readouterr().err


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Returns `play(code)`: the compiler in the child becomes those lines of Python."""

    def play(code):
        script = tmp_path / "compiler.py"
        script.write_text(
            f"import json, os, signal, sys, time\nrequest = json.load(sys.stdin)\n{code}"
        )
        popen = subprocess.Popen
        monkeypatch.setattr(
            command.subprocess,
            "Popen",
            lambda arguments, **named: popen([sys.executable, str(script)], **named),
        )

    return play


VALUES = {"batch_size": 64, "eval": {"batch_size": 16}, "data": {"progressive_sizes": ()}}


def one_row(options=OPTIONS):
    return command.compile_one(command.Variant(VALUES), parse_topology("v5e:2x2"), "train", options)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the compiler died of signal 11"),
        ("print('a stack'); sys.exit('what it said last')", "the compiler died: what it said last"),
        (
            "print('F0101 Check failed: 1 == 2', 'a stack', sep=chr(10), flush=True); os.abort()",
            "the compiler died of signal 6: F0101 Check failed: 1 == 2",
        ),
        ("time.sleep(600)", "stopped after 0.5 s, the time limit"),
        ("held = bytearray(10**9); time.sleep(600)", "GiB; the memory limit is 0.5 GiB"),
    ],
)
def test_a_compiler_that_fails_is_a_row(code, error, compiler):
    compiler(code)
    limits = {"time_limit": 0.5} if "0.5 s" in error else {"memory_limit": GIB // 2}
    row = one_row(dataclasses.replace(OPTIONS, **limits))
    assert error in row["error"]
    assert "failed" in command.table([row])
    assert error in "\n".join(command.details([row]))


def test_images_that_grow_are_a_row_for_each_size(compiler, capsys):
    compiler("open(request['report'], 'w').write(json.dumps({'error': request['step']}))")
    values = VALUES | {"data": {"progressive_sizes": (96, 128)}}
    topologies = [parse_topology("v5e:2x2")]
    options = dataclasses.replace(OPTIONS, steps=("train", "prediction"))
    assert command.compile_steps([command.Variant(values)], topologies, options) == 1
    output = capsys.readouterr().out
    found = [line.split(": ")[-1] for line in output.splitlines() if line.startswith("v5e:2x2 ")]
    assert [name for name in found if " " not in name] == [
        "train@96",
        "train@128",
        "train",
        "prediction",
    ]


def test_the_other_rows_go_on_and_the_exit_code_says_so(compiler, capsys):
    compiler("os.kill(os.getpid(), signal.SIGKILL)")
    topologies = [parse_topology("v5e:2x2"), parse_topology("h200")]
    assert command.compile_steps([command.Variant(VALUES)], topologies, OPTIONS) == 1
    output = capsys.readouterr().out
    assert output.count("the compiler died of signal 9") == 2


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity "
        "by 4.75G.",
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
    ],
    ids=["libtpu", "libtpu 0.0.50"],
)
def test_a_program_that_a_tpu_compiler_refuses_does_not_fit(words, compiler, capsys):
    compiler(
        f"answer = {{'error': 'RESOURCE_EXHAUSTED: {words}'}}\n"
        "open(request['report'], 'w').write(json.dumps(answer))"
    )
    row = one_row()
    assert row["memory"] == {"peak": int(20.5 * GIB), "capacity": int(15.75 * GIB), "fits": False}
    assert "no, by 4.75 GiB" in command.table([row])


MEMORIES = {  # bytes of one device by the images on it
    "in proportion": lambda images: 61e6 * images,
    "and a large state": lambda images: 100e9 + 7.3e6 * images,
    "in steps": lambda images: 60e6 * 128 * -(-images // 128),
    "with a kink": lambda images: 10e6 * images + 13e6 * max(0, images - 64),
    "ever more": lambda images: 10e6 * images + 1e3 * images**2,
    "constant": lambda images: 1e9,
    "too large for eight": lambda images: 30e9 * images,
    "too large for one": lambda images: 200e9 * images,
}


STEP = {"accumulate_steps": 1, "batch_norm": {"statistics": "global"}}
OF_TWELVE = {"accumulate_steps": 3, "batch_norm": {"statistics": "group:4"}}


SYNTHETIC = {
    "name": "synthetic",
    "data_dir": "",
    "source_dir": "",
    "image_size": 0,
    "holdout": 0.0,
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize(
    ("devices", "step", "least"), [(1, STEP, 1), (8, STEP, 8), (1, OF_TWELVE, 12)]
)
def test_the_largest_batch_is_found(memory, devices, step, least, monkeypatch):
    """In few compiles, however the memory grows, in whole micro-batches and groups."""
    topology = parse_topology(f"h200:{devices}")
    capacity = topology.accelerator.memory
    rows = []

    def compile_one(variant, topology, step, options):
        batch = variant.values["batch_size"]
        peak = int(memory(batch // devices))
        found = {"peak": peak, "capacity": capacity, "fits": peak <= capacity}
        return {"topology": topology.name, "variant": variant.name, "step": step} | {
            "batch": batch,
            "memory": found,
        }

    monkeypatch.setattr(command, "compile_one", compile_one)
    values = {"data": {**SYNTHETIC, "train_split": "train[:100000]"}} | step
    answer = command.largest_batch(command.Variant(values), topology, OPTIONS, rows.append)
    tried = {row["batch"]: row["memory"]["fits"] for row in rows}
    assert len(tried) == len(rows) <= 14, "none twice"
    fitting = [batch for batch, fits in tried.items() if fits]
    if not fitting:
        assert memory(least // devices) > capacity
        assert answer.endswith(f"not even a batch of {least} fits")
        return
    best = max(fitting)
    unit = (8 if memory(8 * least // devices) <= capacity else 1) * least
    assert f"the largest batch that fits is {best:,}" in answer
    assert best % unit == 0
    if best + unit <= 100_000:
        assert tried[best + unit] is False
    else:
        assert answer.endswith("all that the data set has")


def test_the_search_ends_at_a_compile_that_fails(compiler):
    compiler("os.kill(os.getpid(), signal.SIGKILL)")
    rows = []
    values = {"data": {**SYNTHETIC, "train_split": "train"}} | STEP
    answer = command.largest_batch(
        command.Variant(values), parse_topology("h200"), OPTIONS, rows.append
    )
    assert answer == "h200:1: the search stopped at a compile that failed"
    assert len(rows) == 1


def test_a_report_survives_an_interrupt_between_its_rows(compiler, tmp_path, monkeypatch):
    compiler("open(request['report'], 'w').write(json.dumps({'error': 'so it is'}))")
    path = tmp_path / "report.json"
    one = command.compile_one

    def interrupted(variant, topology, step, options):
        if step == "prediction":
            raise KeyboardInterrupt
        return one(variant, topology, step, options)

    monkeypatch.setattr(command, "compile_one", interrupted)
    options = command.Options(steps=("train", "prediction"))
    with pytest.raises(KeyboardInterrupt):
        command.compile_steps(
            [command.Variant(VALUES)], [parse_topology("h200")], options, json_file=path
        )
    (row,) = json.loads(path.read_text())["rows"]
    assert row["step"] == "train"


def test_directories_are_made_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "compile_one", None)
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(ValueError, match="file: cannot be written to"):
        command.compile_steps(
            [command.Variant(VALUES)],
            [parse_topology("h200")],
            dataclasses.replace(OPTIONS, plot=taken),
        )


@pytest.mark.parametrize(("stop", "seconds"), [(signal.SIGTERM, 3), (signal.SIGKILL, 0.5)])
def test_no_compiler_outlives_the_command(stop, seconds, tmp_path):
    """Whichever way that ends, once the child compiles, which takes long, or while it starts."""
    network = ["--config.model.name=cbam_resnet50", "--config.model.stem=small"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "cnn_jax", "compile", CONFIG, *network, "--topology=cpu:1"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(seconds)
    parent.send_signal(stop)
    code = parent.wait(60)
    assert code == (128 + stop if stop == signal.SIGTERM else -stop)
    deadline = time.monotonic() + 60
    while Path("/proc", found[0]).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path("/proc", found[0]).exists()
    assert not list(tmp_path.rglob("report.json"))
    if stop == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_how_a_step_is_taken_is_reported(tmp_path):
    """And the body of the loop over micro-batches counts as often as it runs."""
    report = tmp_path / "report.json"
    code, output = compiled(
        CONFIG,
        *SMALL,
        "--topology=cpu:2",
        "--step=train",
        "--config.accumulate_steps=1,4",
        "--config.batch_norm.statistics=device",
        "--config.remat=block",
        f"--json={report}",
    )
    assert code == 0, output
    once, four = json.loads(report.read_text())["rows"]
    assert once["choices"] == {"remat": "block", "batch_norm.statistics": "device"}
    assert four["choices"] == {"accumulate_steps": 4, **once["choices"]}
    assert "accumulate_steps 4, remat block, statistics device" in output
    assert four["loops_of_unknown_length"] == []
    flops = [row["flops_per_image"]["hlo"] for row in (once, four)]
    assert flops[1] == pytest.approx(flops[0], rel=0.1)
    reduced = [sum(each["bytes"] for each in row["collectives"]) for row in (once, four)]
    assert reduced[1] == 4 * reduced[0]
    assert four["memory"]["temporaries"] < 0.6 * once["memory"]["temporaries"]


@pytest.mark.slow
def test_a_gpu_needs_less_memory_where_blocks_are_computed_again(tmp_path):
    """XLA's CPU compiler undoes it, and is no witness."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("jax_cuda12_plugin is not installed")
    report = tmp_path / "report.json"
    code, output = compiled(
        CONFIG,
        "--config.model.width=8",
        "--config.model.stage_sizes=3,",
        "--config.batch_size=512",
        "--topology=h200",
        "--step=train",
        "--config.remat=none,block",
        f"--json={report}",
    )
    assert code == 0, output
    none, block = (
        (row["memory"]["temporaries"], row["flops_per_image"]["hlo"])
        for row in json.loads(report.read_text())["rows"]
    )
    assert block[0] < 0.7 * none[0]
    assert 1.1 * none[1] < block[1] < 1.5 * none[1], "one more forward pass"


@pytest.mark.parametrize(
    ("topology", "needs", "told"),
    [
        ("v5e:2x2", "libtpu", "xla_tpu_scoped_vmem_limit_kib=49152, float32 products in bfloat16"),
        ("h200:8", "jax_cuda12_plugin", "xla_gpu_enable_latency_hiding_scheduler=True, "),
    ],
)
def test_a_small_model_compiles_for_machines_that_are_not_there(topology, needs, told, tmp_path):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    report = tmp_path / "report.json"
    code, output = compiled(
        CONFIG,
        *SMALL,
        "--config.precision=bfloat16",
        f"--topology={topology}",
        "--step=train",
        f"--json={report}",
    )
    assert code == 0, output
    (row,) = json.loads(report.read_text())["rows"]
    assert row["devices"] == parse_topology(topology).num_devices
    assert row["compiler"].startswith(told)
    assert row["memory"]["fits"]
    assert row["estimate"]["images_per_second"] > 0
    assert (
        sum(each["bytes"] for each in row["collectives"]) > 2 * 350
    )  # the gradients, perhaps in bfloat16


def test_missing_compilers_are_told_once_before_anything_is_compiled(monkeypatch, capsys):
    found = importlib.util.find_spec
    absent = {"libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name in absent else found(name, *of)
    )
    monkeypatch.setattr(command, "compile_one", None)
    several = "--topology=cpu:1,v5e:2x2,h200,v5p:2x2x1"
    assert main(["compile", CONFIG, several, "--config.seed=1,2"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        'v5e:2x2, v5p:2x2x1: needs libtpu: pip install "cnn_jax[aot-tpu]"',
        'h200:1: needs JAX for CUDA: pip install "cnn_jax[aot-gpu]"',
    ]
    assert captured.out == ""


def test_float32_activations_are_told_apart_from_copies_of_parameters():
    """Of a step in bfloat16 that keeps a feature map in float32, and a kernel turned over."""

    def loss(kernel, images):
        kept = images.astype(jnp.float32) @ kernel
        product = jnp.sin(kept) @ lax.optimization_barrier(kernel.T)
        return jnp.sum(jnp.cos(product))

    shapes = (
        jax.ShapeDtypeStruct((512, 512), jnp.float32),
        jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16),
    )
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert text is not None
    program = hlo.read(text)
    alive = [each for each in hlo.liveness(program).buffers if each.kind == "activations"]
    assert any(each.array.dims == (512, 512) for each in alive), "there is a copy to leave out"
    found = _float32(program)
    assert found
    assert all(each["shape"] == [2048, 512] for each in found)
