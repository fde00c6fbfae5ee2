"""`train.py` with poison: `python poisoned.py EPOCH,EXAMPLE[;...] FLAGS OF TRAIN.PY`.

The pixels of that example are NaN in that epoch, between augmentation and normalisation.
"""

import sys

import jax.numpy as jnp

from cnn_jax import plan
from cnn_jax.__main__ import run
from cnn_jax.training.augment import make_augment, normalize


def poisoning(poison):
    """Returns what takes the place of `make_augment` and of `normalize`."""
    epochs, examples = jnp.array(poison, jnp.int32).T

    def make(**options):
        augment = make_augment(**options)

        def poisoned(images, key, epoch, index):
            hit = ((epoch[:, None] == epochs[None]) & (index[:, None] == examples[None])).any(-1)
            images = augment(images, key, epoch, index).astype(jnp.float32)
            return jnp.where(hit[:, None, None, None], jnp.nan, images)

        return poisoned

    def normalize_any(images, **options):
        clean = normalize(jnp.nan_to_num(images).astype(jnp.uint8), **options)
        return jnp.where(jnp.isnan(images.astype(jnp.float32)), jnp.nan, clean)

    return make, normalize_any


if __name__ == "__main__":
    pairs = [tuple(map(int, pair.split(","))) for pair in sys.argv[1].split(";")]
    plan.make_augment, plan.normalize = poisoning(pairs)
    run(["train", *sys.argv[2:]])
