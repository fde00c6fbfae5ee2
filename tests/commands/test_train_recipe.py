"""A run with everything on that a recipe may have, killed and told again."""

import json

import pytest
from driver import assert_same_run, read_metrics, read_state

FLAGS = (
    "--config.augment.flip=false",
    "--config.augment.alternate_flips=true",
    "--config.augment.random_operations=1",
    "--config.augment.contrast=0.4",
    "--config.augment.erase_probability=0.25",
    "--config.augment.mixup_alpha=0.2",
    "--config.augment.cutmix_alpha=1.0",
    "--config.optimizer.name=lamb",
    "--config.optimizer.learning_rate=0.02",
    "--config.optimizer.clip_norm=1.0",
    "--config.loss.name=binary_cross_entropy",
    "--config.loss.threshold=0.2",
    "--config.ema.decay=0.9",
    "--config.eval.average_flips=true",
)


@pytest.mark.slow
def test_a_killed_recipe_ends_with_the_same_bits(trainer, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = trainer.run(whole, *FLAGS)
    assert code == 0, output
    assert "RandAugment, colour jitter, random erasing, mixup, cutmix, averaged" in output
    child = trainer.start(killed, *FLAGS)
    child.wait_for("step 14/24")
    child.kill()
    code, output = trainer.run(killed, *FLAGS)
    assert code == 0, output
    assert_same_run(killed, whole)

    tested = {row["step"]: row for row in read_metrics(whole) if "test/accuracy" in row}
    names = {"test/loss", "test/accuracy", "test/loss_ema", "test/accuracy_ema"}
    assert all(names <= set(row) for row in tested.values())
    summary = json.loads((whole / "summary.json").read_text())
    best = max(row["test/accuracy_ema"] for row in tested.values())
    assert summary["best"]["test/accuracy_ema"] == best
    assert summary["test/accuracy_ema"] == tested[24]["test/accuracy_ema"]
    assert "with averaged weights" in output
    saved = read_state(whole / "checkpoints" / "24")
    assert any(name.startswith("['ema']['batch_stats']") for name in saved)
