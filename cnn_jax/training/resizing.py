"""Smaller images for the first epochs of a training: fewer pixels, so quicker steps."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Key, Num

from cnn_jax.training.augment import Augment
from cnn_jax.typing import Array, Images, Labels

Resized: TypeAlias = Num[Array, "b _ _ c"]


def resize(images: Images, side: int) -> Resized:
    """Returns uint8 images as squares of `side` pixels, bilinear and antialiased, rounded."""
    batch, _, _, channels = images.shape
    shape = (batch, side, side, channels)
    pixels = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=True)
    return jnp.clip(jnp.round(pixels), 0, 255).astype(images.dtype)


def resized_first(augment: Augment, side: int) -> Augment:
    """Returns what changes images after making them smaller, so that there is less to change."""

    def smaller(images: Images, key: Key[jax.Array, ""], epoch: Labels, index: Labels) -> Resized:
        return augment(resize(images, side), key, epoch, index)

    return smaller
