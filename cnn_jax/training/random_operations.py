"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): torchvision's operations, done as Pillow does.

Each example draws its own operations. One program does any of them: a warp by a matrix, a blend
with another image, a table of values; what an operation does not use is drawn as the identity.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from cnn_jax.errors import require_between
from cnn_jax.typing import RawImages

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
STRONGEST = 30
"""The largest magnitude; torchvision's 31 bins count from 0."""

Image = UInt8[Array, "h w c"]


def rand_augment(
    images: RawImages, keys: Key[Array, " b"], *, num_operations: int, magnitude: int
) -> RawImages:
    """Returns each image after `num_operations` of `OPERATIONS`, drawn with replacement.

    Those with a direction take either with probability one half. Images are uint8 and have 1
    channel or 3, the magnitude is from 0 to `STRONGEST`; raises ValueError for others.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images of {images.dtype}: RandAugment needs pixels in uint8")
    require_between(0, STRONGEST, magnitude=magnitude)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images of {images.shape[-1]} channels: RandAugment needs 1 or 3")

    def change(image: Image, key: Key[Array, ""]) -> Image:
        for number in range(num_operations):
            which, direction = jax.random.split(jax.random.fold_in(key, number))
            operation = jax.random.randint(which, (), 0, len(OPERATIONS))
            backwards = jax.random.bernoulli(direction).astype(jnp.int32)
            image = apply_operation(image, operation, backwards, magnitude=magnitude)
        return image

    return jax.vmap(change)(jnp.asarray(images), keys)


def apply_operation(
    image: Image, operation: Int[Array, ""], backwards: Int[Array, ""], *, magnitude: int
) -> Image:
    """Returns the image after one of `OPERATIONS`, by its number; `backwards` is 0 or 1.

    Equal to what torchvision does to a Pillow image, within 1 of 255, but for the single pixels
    where a warp's rounding decides between neighbours.
    """
    level = magnitude / STRONGEST
    height, width, _ = image.shape
    matrices = np.stack([_matrices(height, width, sign * level) for sign in (1, -1)])
    image = _warp(image, jnp.asarray(matrices, jnp.float32)[backwards, operation])
    image = _enhance(image, operation, jnp.where(backwards == 1, 1 - 0.9 * level, 1 + 0.9 * level))
    return _look_up(image, operation, magnitude)


def _is(operation: jax.Array, name: str) -> jax.Array:
    return operation == OPERATIONS.index(name)


def _matrices(height: int, width: int, level: float) -> np.ndarray:
    """Returns [operation, 2, 3]: from the middle of a pixel (x, y, 1) to where its colour lies."""
    angle = np.deg2rad(30 * level)
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    warps = {
        "ShearX": [[1, 0.3 * level, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [0.3 * level, 1, 0]],
        "TranslateX": [[1, 0, -int(150 / 331 * width * level)], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, -int(150 / 331 * height * level)]],
        "Rotate": [
            [cosine, -sine, x - cosine * x + sine * y],
            [sine, cosine, y - sine * x - cosine * y],
        ],
    }
    return np.array([warps.get(name, [[1, 0, 0], [0, 1, 0]]) for name in OPERATIONS], float)


def _warp(image: Image, matrix: jax.Array) -> Image:
    """Returns the nearest pixels that the matrix points to, black where it points outside."""
    height, width, _ = image.shape
    x = (jnp.arange(width) + 0.5)[None, :]
    y = (jnp.arange(height) + 0.5)[:, None]
    columns, rows = (
        jnp.floor(row[0] * x + row[1] * y + row[2]).astype(jnp.int32) for row in matrix
    )
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    moved = image[jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)]
    return jnp.where(inside[:, :, None], moved, jnp.zeros_like(moved))


def _enhance(image: Image, operation: jax.Array, factor: jax.Array) -> Image:
    """Returns the image's distance from a plainer image multiplied by `factor`."""
    pixels = image.astype(jnp.int32)
    gray = pixels
    if image.shape[-1] == 3:
        weights = jnp.asarray((19595, 38470, 7471)).reshape(1, 1, 3)
        gray = (jnp.sum(pixels * weights, axis=-1, keepdims=True) + 32768) >> 16
    count = gray.size
    plainer = jnp.select(
        [_is(operation, name) for name in ("Brightness", "Color", "Contrast", "Sharpness")],
        [
            jnp.zeros_like(pixels),
            jnp.broadcast_to(gray, pixels.shape),
            jnp.broadcast_to((2 * jnp.sum(gray) + count) // (2 * count), pixels.shape),
            _smooth(pixels),
        ],
        pixels,
    )
    blend = plainer.astype(jnp.float32) + factor * (pixels - plainer).astype(jnp.float32)
    return jnp.clip(blend, 0.0, 255.0).astype(jnp.uint8)


def _smooth(pixels: jax.Array) -> jax.Array:
    """Returns Pillow's SMOOTH: the mean of a pixel, five times, and its neighbours; edges stay."""
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    return pixels.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _look_up(image: Image, operation: jax.Array, magnitude: int) -> Image:
    """Returns the image with every value replaced by that of the operation's table."""
    channels = image.shape[-1]
    values = jnp.arange(256)[:, None]
    counts = jnp.zeros((256, channels), jnp.int32)
    counts = counts.at[image, jnp.arange(channels)[None, None, :]].add(1)
    present = counts > 0
    low = jnp.argmax(present, axis=0, keepdims=True)
    high = 255 - jnp.argmax(present[::-1], axis=0, keepdims=True)
    stretched = jnp.where(high > low, (values - low) * 255 // jnp.maximum(high - low, 1), values)

    step = (counts.sum(axis=0, keepdims=True) - jnp.take_along_axis(counts, high, axis=0)) // 255
    before = jnp.cumsum(counts, axis=0) - counts
    equalized = jnp.where(step > 0, (step // 2 + before) // jnp.maximum(step, 1), values)

    bits = 8 - round(magnitude / (STRONGEST / 4))
    threshold = 255 * (1 - magnitude / STRONGEST)
    table = jnp.select(
        [_is(operation, name) for name in ("Posterize", "Solarize", "AutoContrast", "Equalize")],
        [
            jnp.broadcast_to(values & (256 - 2 ** (8 - bits)), counts.shape),
            jnp.broadcast_to(jnp.where(values < threshold, values, 255 - values), counts.shape),
            stretched,
            equalized,
        ],
        jnp.broadcast_to(values, counts.shape),
    )
    table = jnp.clip(table, 0, 255).astype(jnp.uint8)
    return table[image, jnp.arange(channels)[None, None, :]]
