"""Tiny runs, planned as the trainer plans them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.cli.config_files import load
from cnn_jax.config import override, parse
from cnn_jax.plan import make_plan

CONFIG = Path(__file__).parents[2] / "configs/quickstart.py"
TINY = (
    ("model.width", "8"),
    ("model.stage_sizes", "(1,)"),
    ("batch_size", "16"),
    ("eval.batch_size", "16"),
    ("augment.crop_padding", "0"),
    ("augment.flip", "false"),
    ("schedule.name", "constant"),
    ("schedule.warmup_epochs", "0"),
    ("optimizer.learning_rate", "0.02"),
    ("data.residency", "host"),
)


def plan(*texts, devices: int = 8) -> Any:
    values = override(load(CONFIG), (*TINY, *texts))
    config = parse(values, num_devices=devices)
    return make_plan(config, devices=jax.devices()[:devices])


def batches(number: int) -> list[dict[str, np.ndarray]]:
    """Of 16 images whose brightness says their class."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(number):
        labels = rng.integers(10, size=16, dtype=np.int32)
        images = rng.integers(60, size=(16, 28, 28, 1)) + 20 * labels[:, None, None, None]
        index = np.arange(16, dtype=np.int32)
        made.append(
            {
                "image": images.astype(np.uint8),
                "label": labels,
                "index": index,
                "epoch": np.zeros_like(index),
            }
        )
    return made
