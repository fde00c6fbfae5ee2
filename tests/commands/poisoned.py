"""`train.py` with poison: `python poisoned.py [gradient:]EPOCH,EXAMPLE[;...] FLAGS OF TRAIN.PY`.

The pixels of that example are NaN in that epoch, between augmentation and normalisation; or, with
`gradient:`, the gradient at the output of the layer `LAYER` is, in the step that has the example.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import plan
from cnn_jax.__main__ import run
from cnn_jax.training.augment import make_augment, normalize
from cnn_jax.training.steps import make_train_step

LAYER = ("stage1_block1", "conv1")


def is_hit(poison, epoch, index):
    """Returns which of the examples are poisoned, bool [n]; NumPy alone until it is traced."""
    epochs, examples = np.array(poison, np.int32).T
    return ((epoch[:, None] == epochs[None]) & (index[:, None] == examples[None])).any(-1)


def poisoning(poison):
    """Returns what takes the place of `make_augment` and of `normalize`."""

    def make(**options):
        augment = make_augment(**options)

        def poisoned(images, key, epoch, index):
            hit = is_hit(poison, epoch, index)
            images = augment(images, key, epoch, index).astype(jnp.float32)
            return jnp.where(hit[:, None, None, None], jnp.nan, images)

        return poisoned

    def normalize_any(images, **options):
        clean = normalize(jnp.nan_to_num(images).astype(jnp.uint8), **options)
        return jnp.where(jnp.isnan(images.astype(jnp.float32)), jnp.nan, clean)

    return make, normalize_any


@jax.custom_vjp
def with_bad_gradient(value, hit):
    """Returns the value; its gradient is NaN where `hit` is not 0."""
    return value


with_bad_gradient.defvjp(
    lambda value, hit: (value, hit),
    lambda hit, cotangent: (jnp.where(hit > 0, jnp.nan, cotangent), jnp.zeros_like(hit)),
)


def poisoning_gradients(poison):
    """Returns what takes the place of `make_train_step`."""

    def make(*arguments, **options):
        step = make_train_step(*arguments, **options)

        def poisoned(state, batch, key):
            hit = is_hit(poison, batch["epoch"], batch["index"]).any().astype(jnp.float32)

            def intercept(call, args, kwargs, context):
                value = call(*args, **kwargs)
                here = context.module.path == LAYER and context.method_name == "__call__"
                return with_bad_gradient(value, hit) if here else value

            with nn.intercept_methods(intercept):
                return step(state, batch, key)

        return poisoned

    return make


if __name__ == "__main__":
    pixels, gradients = [], []
    for pair in sys.argv[1].split(";"):
        kind, _, numbers = pair.rpartition(":")
        place = gradients if kind == "gradient" else pixels
        place.append(tuple(map(int, numbers.split(","))))
    if pixels:
        plan.make_augment, plan.normalize = poisoning(pixels)
    if gradients:
        plan.make_train_step = poisoning_gradients(gradients)
    run(["train", *sys.argv[2:]])
