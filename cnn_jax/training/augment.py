"""Random changes of the training images, inside the step.

Every example has a key of its own, made of (seed, epoch, example), so an image is changed the same
way on 1 device and on 8, and after a restart.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from cnn_jax.typing import Images, Labels, RawImages

Keys: TypeAlias = Key[Array, " b"]
Augment: TypeAlias = Callable[[Images, Keys], Images]


def example_keys(root: Key[Array, ""], epoch: Labels, index: Labels) -> Keys:
    """Returns one key an example, a function of the root key, its epoch and its number."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, index)


def random_crop(images: Images, keys: Keys, *, padding: int) -> Images:
    """Returns each image shifted by up to `padding` pixels each way, zeros moving in."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, image.shape[-1]))

    return jax.vmap(crop)(padded, keys)


def random_flip(images: Images, keys: Keys) -> Images:
    """Returns each image mirrored left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def make_augment(*, crop_padding: int = 0, flip: bool = False) -> Augment:
    """Returns the chosen changes as one function of images and keys."""

    def augment(images: Images, keys: Keys) -> Images:
        crop_keys, flip_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        if crop_padding:
            images = random_crop(images, crop_keys, padding=crop_padding)
        if flip:
            images = random_flip(images, flip_keys)
        return images

    return augment


def normalize(
    images: RawImages, *, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> Images:
    """Returns `(images / 255 - mean) / std` by channel, computed in float32, as `dtype`."""
    by_channel = (1, 1, 1, -1)
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32).reshape(by_channel)
    offset = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    return (images.astype(jnp.float32) * scale - offset.reshape(by_channel)).astype(dtype)
