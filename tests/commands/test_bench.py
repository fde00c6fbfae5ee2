"""`bench`: sides that agree, a table and a record of them, and what is refused."""

import json
import os
import signal
import statistics

import numpy as np
import pytest
from driver import ROOT

from cnn_jax.__main__ import main
from cnn_jax.benchmarking import windows
from cnn_jax.benchmarking.sides import open_sides
from cnn_jax.benchmarking.workload import Workload, architecture
from cnn_jax.errors import UserError

TINY = {"model.width": 4, "model.stage_sizes": "1,1", "model.stem": "medium"}


@pytest.fixture
def bench(capsys, monkeypatch):
    """Returns a function that types a `bench` command: (exit code, output)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # how fast it is, is not tested
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["bench", *arguments])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run


@pytest.fixture
def accept_any_times(monkeypatch):
    """The tests' machine is never quiet."""
    monkeypatch.setattr(windows, "SPREAD", float("inf"))
    monkeypatch.setattr(windows, "LOADED", float("inf"))


def tiny(config: str = "configs/quickstart.py") -> list[str]:
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in TINY.items())]


@pytest.mark.slow
def test_a_step_beside_linen_and_torch(bench, accept_any_times, tmp_path):
    pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[parity]"')
    file = tmp_path / "step.json"
    flags = ["--config.model.block=bottleneck", "--batch=32", "--peer=linen,torch", "--steps=1"]
    code, output = bench("step", *tiny(), *flags, f"--json={file}")
    assert code == 0, output
    report = json.loads(file.read_text())
    sides = report["sides"]
    assert list(sides) == ["ours", "linen", "torch"]
    losses = sides["ours"]["losses"]
    for name in ("linen", "torch"):
        np.testing.assert_allclose(sides[name]["losses"], losses, rtol=1e-5)
        ratio = sides[name]["median"] / sides["ours"]["median"]
        assert report["ratios"][name] == pytest.approx(ratio)
    assert losses == sorted(losses, reverse=True), "the same batch is learned, so weights move"
    assert losses[0] - losses[-1] > 1e-3
    for side in sides.values():
        assert len(side["seconds"]) == 5
        assert side["images_per_second"] == pytest.approx(32 / statistics.median(side["seconds"]))
    assert sides["ours"]["share_of_bound"] > 0
    assert "bytes_per_image" not in sides["torch"]
    assert f"written to {file}" in output


@pytest.mark.slow
def test_predictions_agree_and_a_busy_machine_is_told(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "LOADED", -1.0)
    file = tmp_path / "predict.json"
    flags = ["--batch=2", "--peer=linen", "--steps=1", f"--json={file}"]
    code, output = bench("predict", *tiny(), *flags)
    assert code == 3, output
    assert "not a measurement, and not recorded:" in output
    assert "of the machine's time; at most" in output
    assert "BatchNorm folded" in output
    assert not file.exists()


def test_a_side_that_dies_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = {"width": 4, "stage_sizes": (1,)}
    workload = Workload("resnet_mini", arguments, 10, (8, 8, 1), 2, "float32", training=False)
    with open_sides([], workload, tmp_path) as (side,):
        assert np.shape(side.results(1)) == (1, 2, 10)
        os.kill(side.process, signal.SIGKILL)
        with pytest.raises(UserError, match="ours: its process died with code -9"):
            side.window(1)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("resnet50d", {}),
        ("seresnet50", {}),
        ("convnext_mini", {}),
        ("resnet50", {"norm": "group"}),
        ("resnet_mini", {"stochastic_depth_rate": 0.1}),
    ],
)
def test_a_network_that_peers_do_not_have_is_refused(model, arguments):
    workload = Workload(model, arguments, 10, (32, 32, 3), 2, "float32", training=True)
    with pytest.raises(UserError, match=f"--peer: {model} with .* has no peer"):
        architecture(workload)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step"], "one of the arguments --model --config is required"),
        (["step", "--model=resnet50"], "--model: needs --batch"),
        (["step", "--model=resnet50", "--batch=1", "--config.seed=1"], "only with --config"),
        (["step", "--config=configs/quickstart.py", "--image=32"], "--image: only with --model"),
        (
            ["step", "--config=configs/quickstart.py", "--peer=tf"],
            "--peer tf: must be one of linen",
        ),
        (["step", "--config=configs/quickstart.py", "--windows=4"], "must be at least 5"),
        (["step", "--config=configs/quickstart.py", "--seconds=4"], "--seconds: only with data"),
        (["data", "--config=configs/quickstart.py", "--peer=linen"], "--peer: not with data"),
        (["data", "--model=resnet50"], "--model: not with data"),
        (["step", "--model=resnet50", "--batch=1", "--json=configs"], "'configs' is already there"),
    ],
)
def test_flags_that_do_not_go_together(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench(*arguments)
    assert message in capsys.readouterr().err


def test_data_are_measured_stage_by_stage(bench, trainer, tmp_path):
    file = tmp_path / "data.json"
    on_disk = ["--config.data.memory_limit_mb=0", "--config.batch_size=16", trainer.flags[-1]]
    flags = ["--config=configs/quickstart.py", *on_disk, "--seconds=1", f"--json={file}"]
    code, output = bench("data", *flags)
    assert code == 0, output
    report = json.loads(file.read_text())
    rates = report["examples_per_second"]
    assert rates.pop("together") > 0
    assert rates.keys() == {"reading", "decoding", "batching", "copying to the device"}
    with_threads = {stage: 2 * rate for stage, rate in rates.items()}
    with_threads["copying to the device"] = rates["copying to the device"]
    assert report["limited_by"] == min(with_threads, key=lambda stage: with_threads[stage])
    assert f"{report['limited_by']} limits\n" in output
