"""Trains a network: `python train.py --config configs/quickstart.py`."""

import sys

from cnn_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
