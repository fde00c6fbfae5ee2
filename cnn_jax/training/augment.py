"""Random changes of the training images, inside the step.

Every example has a key of its own, made of (seed, epoch, example), so an image is changed the same
way on 1 device and on 8, and after a restart. What is switched on happens in this order: crop,
flip, RandAugment (all of uint8 pixels), colour jitter (of floats from 0 to 255), and after the
normalisation what `mixing` has: erasing, then mixup or cutmix.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from cnn_jax.training.color import jitter_color
from cnn_jax.training.random_operations import rand_augment
from cnn_jax.typing import Images, Labels

Keys: TypeAlias = Key[Array, " b"]
Augment: TypeAlias = Callable[[Images, Key[Array, ""], Labels, Labels], Images]
"""`augment(images, root key, epoch, index)`; the last two name each example."""


def example_keys(root: Key[Array, ""], epoch: Labels, index: Labels) -> Keys:
    """Returns one key an example, a function of the root key, its epoch and its number."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, index)


def fold_in(keys: Keys, number: int) -> Keys:
    """Returns a further key of each example, for one use among several."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


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


def alternating_flip(images: Images, keys: Keys, epoch: Labels) -> Images:
    """Returns each image mirrored in every other epoch; `keys` say in which it begins.

    So two epochs show both sides of every image, which random flips leave to chance
    (Jordan 2024, arXiv:2404.00498).
    """
    flip = jax.vmap(jax.random.bernoulli)(keys) ^ (epoch % 2 == 1)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def make_augment(
    *,
    crop_padding: int = 0,
    flip: bool = False,
    alternate_flips: bool = False,
    random_operations: int = 0,
    magnitude: int = 9,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Augment:
    """Returns the chosen changes as one function of images, the root key and the examples' names.

    With `alternate_flips` an image is mirrored in every other epoch, not at random. RandAugment
    does `random_operations` of `magnitude` 0 to 30, on uint8 images. The others are the arguments
    of `random_crop` and `jitter_color`.
    """
    jitters = any((brightness, contrast, saturation, hue))

    def augment(images: Images, key: Key[Array, ""], epoch: Labels, index: Labels) -> Images:
        keys = example_keys(key, epoch, index)
        crop_keys, flip_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        if crop_padding:
            images = random_crop(images, crop_keys, padding=crop_padding)
        if alternate_flips:
            first = fold_in(example_keys(key, jnp.zeros_like(epoch), index), 1)
            images = alternating_flip(images, first, epoch)
        elif flip:
            images = random_flip(images, flip_keys)
        if random_operations:
            images = rand_augment(
                images, fold_in(keys, 2), num_operations=random_operations, magnitude=magnitude
            )
        if jitters:
            images = jitter_color(
                images,
                fold_in(keys, 3),
                brightness=brightness,
                contrast=contrast,
                saturation=saturation,
                hue=hue,
            )
        return images

    return augment


def normalize(
    images: Images, *, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> Images:
    """Returns `(images / 255 - mean) / std` by channel, computed in float32, as `dtype`.

    Raises ValueError where mean and std are neither one nor one for each channel.
    """
    if len(mean) not in (1, images.shape[-1]):
        raise ValueError(
            f"mean and std of {len(mean)} channels: the images have {images.shape[-1]}"
        )
    by_channel = (1, 1, 1, -1)
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32).reshape(by_channel)
    offset = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    return (images.astype(jnp.float32) * scale - offset.reshape(by_channel)).astype(dtype)
