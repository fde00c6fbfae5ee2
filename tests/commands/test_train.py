"""A whole run: what is compiled, measured and written."""

import json
import re
import time

import numpy as np
import pytest
from driver import TOTAL_STEPS, read_metrics, read_state, saved_steps
from PIL import Image

from cnn_jax.data.sources import open_source
from cnn_jax.models import create_model

STRICT = {
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_LOG_COMPILES": "1",
}


@pytest.fixture(scope="module")
def strict_run(trainer, tmp_path_factory):
    """The directory and the output of a run on 8 devices that may not move data by accident."""
    workdir = tmp_path_factory.mktemp("strict") / "run"
    code, output = trainer.run(workdir, environment=STRICT)
    assert code == 0, output
    return workdir, output


@pytest.mark.slow
def test_every_program_is_compiled_once(strict_run):
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", strict_run[1])
    # One may be compiled again, without what the compiler gets wrong: see training/miscompile.
    assert compiled.count("step") in (2, 3), "the training step and the evaluation step"
    assert compiled.count("all_finite") == 1


@pytest.mark.slow
def test_eight_devices_and_one_tell_the_same(strict_run, reference):
    workdir, _ = strict_run
    for row, expected in zip(read_metrics(workdir), read_metrics(reference), strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-9)
    ours, theirs = (
        read_state(path / "checkpoints" / str(TOTAL_STEPS)) for path in (workdir, reference)
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():  # in 24 steps a rounding may put a ReLU on its other side
        scale = np.abs(np.asarray(theirs[name], np.float64)).max()
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=5e-3 * scale, err_msg=name)


def test_rows_have_the_documented_keys(reference):
    rows = read_metrics(reference)
    tested = [row for row in rows if "test/loss" in row]
    assert [row["step"] for row in tested] == [8, 16, 24]
    assert [row["epoch"] for row in tested] == [1.0, 2.0, 3.0]
    for row in tested:
        assert set(row) == {"step", "epoch", "test/loss", "test/accuracy"}
        assert 0 <= row["test/accuracy"] <= 1
    trained = [row for row in rows if row not in tested]
    reported = {step for step in range(1, 25) if step % 2 == 0 or step % 3 == 0 or step % 8 == 0}
    assert [row["step"] for row in trained] == sorted(reported)
    for row in trained:
        assert {"step", "epoch", "train/loss", "train/accuracy", "learning_rate"} <= set(row)
        assert row["epoch"] == row["step"] / 8
        assert 0 <= row["train/accuracy"] <= 1


def test_accuracy_is_a_count_over_every_test_image(trainer, reference):
    state = read_state(reference / "checkpoints" / str(TOTAL_STEPS))
    variables: dict = {}
    for path, array in state.items():
        names = re.findall(r"'(\w+)'", path)
        if names[0] in ("params", "batch_stats"):
            section = variables
            for name in names[:-1]:
                section = section.setdefault(name, {})
            section[names[-1]] = array
    model = create_model(
        "modern_cnn", num_classes=10, stage_sizes=(1,), width=4, stem="medium", block="residual"
    )
    (data_dir,) = (flag.partition("=")[2] for flag in trainer.flags if "data_dir" in flag)
    test = open_source("fashion_mnist_10k", "test[:300]", data_dir=data_dir).batch(np.arange(300))
    images = ((test["image"] / 255 - 0.2860) / 0.3530).astype(np.float32)
    logits = np.asarray(model.apply(variables, images, train=False), np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(300), test["label"]]

    final = read_metrics(reference)[-1]
    assert final["test/accuracy"] == (logits.argmax(axis=1) == test["label"]).sum() / 300
    assert final["test/loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_the_newest_and_the_best_checkpoint_are_kept(reference):
    tested = {row["step"]: row.get("test/accuracy", 0) for row in read_metrics(reference)}
    best = json.loads((reference / "summary.json").read_text())["best"]
    assert best["test/accuracy"] == tested[best["step"]] == max(tested.values())
    assert saved_steps(reference) == sorted({best["step"], 21, 24})


def test_the_curves_are_drawn(reference):
    with Image.open(reference / "curves.png") as image:
        assert image.format == "PNG"
        colours = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "matplotlib's first two line colours"


def test_a_dry_run_prints_the_plan_and_writes_nothing(train_here, tmp_path):
    code, output = train_here(tmp_path / "run", "--dry-run")
    assert code == 0
    assert "398 parameters" in output
    assert "512 train and 300 test images" in output
    assert "24 of 64 images: 3 epochs, seed 0" in output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(train_here, complete, tmp_path):
    code, output = train_here(complete, "--dry-run", "--config.optimizer.learning_rate=0.2")
    assert code == 1
    assert f"{complete} holds a run with another configuration:\n" in output
    (tmp_path / "file").write_text("")
    code, output = train_here(tmp_path / "file", "--dry-run")
    assert code == 1
    assert output.endswith(f"--workdir {tmp_path}/file: is no directory\n")


def test_the_summary_names_what_is_written(train_here, complete):
    _, output = train_here(complete)
    assert f"written to {complete}" in output
    for name in ("metrics.jsonl", "summary.json", "curves.png", "tensorboard", "checkpoints"):
        assert name in output
        assert (complete / name).exists()


@pytest.mark.usefixtures("compile_quickly")
def test_what_steps_need_for_a_while_decides_on_advice(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr("cnn_jax.commands.train.advice_on_pages", lambda size: f"for {size} bytes")
    code, output = train_here(tmp_path / "run", "--config.num_epochs=1")
    assert code == 0, output
    assert re.search(r"^memory     for [1-9]\d{4,6} bytes$", output, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
def test_a_slow_source_is_waited_for(train_here, tmp_path, monkeypatch):
    from cnn_jax import plan

    pause = 1.0

    class SlowSource:
        def __init__(self, *arguments, **keywords):
            self.source = open_source(*arguments, **keywords)
            self.info, self.split = self.source.info, self.source.split

        def __len__(self):
            return len(self.source)

        def batch(self, indices, epochs=None):
            if len(indices) == 64:  # of a step
                time.sleep(pause)
            return self.source.batch(indices, epochs)

    monkeypatch.setattr(plan, "open_source", SlowSource)
    streamed = "--config.data.residency=host"
    code, output = train_here(tmp_path / "run", "--config.num_epochs=1", streamed)
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    waiting = summary["seconds"]["waiting for data"]
    # Four of the eight batches are made before the first step; of the others two at a time.
    assert waiting >= pause / 2
    assert summary["limited_by"] == "batching"
    assert "batching limits), evaluating" in output
