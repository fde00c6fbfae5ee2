"""Trains a network: `python train.py --config configs/quickstart.py`."""

import sys

from cnn_jax.__main__ import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
