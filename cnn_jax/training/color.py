"""Random changes of colour, by the formulas of torchvision's ColorJitter for floats."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cnn_jax.errors import require_between
from cnn_jax.typing import Images

MAXIMUM = 255.0
GRAY = (0.2989, 0.587, 0.114)

Image = Float[Array, "h w c"]
Number = Float[Array, ""]


def adjust_brightness(image: Image, factor: Number) -> Image:
    """Returns `factor * image`, of pixels from 0 to 255, cut to that range."""
    return jnp.clip(image * factor, 0.0, MAXIMUM)


def adjust_contrast(image: Image, factor: Number) -> Image:
    """Returns the image with its distance from its mean grey multiplied by `factor`."""
    return _blend(image, jnp.mean(_gray(image)), factor)


def adjust_saturation(image: Image, factor: Number) -> Image:
    """Returns the image with its distance from its own greys multiplied by `factor`."""
    return _blend(image, _gray(image), factor)


def adjust_hue(image: Image, turn: Number) -> Image:
    """Returns the image with its hues moved by `turn` of the colour circle; greys stay."""
    if image.shape[-1] == 1:
        return image
    value, low = image.max(axis=-1), image.min(axis=-1)
    chroma = value - low
    red, green, blue = jnp.moveaxis(image, -1, 0)
    safe = jnp.where(chroma == 0, 1.0, chroma)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    sixths = sixths + 6.0 * turn

    def channel(offset: float) -> jax.Array:
        distance = (offset + sixths) % 6.0
        return value - chroma * jnp.clip(jnp.minimum(distance, 4.0 - distance), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def jitter_color(
    images: Images,
    keys: Key[Array, " b"],
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Returns float32 images of pixels from 0 to 255, changed in brightness, contrast, saturation
    and hue, in this order (torchvision draws the order as well).

    Each of the first three is multiplied by a factor from `max(0, 1 - x)` to `1 + x`, the hue moved
    by up to `hue` of the colour circle, 0.5 at most. Images have 1 channel or 3; those of 1 have
    neither saturation nor hue. Raises ValueError for others, and for a number that cannot be.
    """
    require_between(0, math.inf, brightness=brightness, contrast=contrast, saturation=saturation)
    require_between(0, 0.5, hue=hue)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images of {images.shape[-1]} channels: colours need 1 or 3")
    changes: tuple[tuple[float, float, Callable[[Image, Number], Image]], ...] = (
        (brightness, 1.0, adjust_brightness),
        (contrast, 1.0, adjust_contrast),
        (saturation, 1.0, adjust_saturation),
        (hue, 0.0, adjust_hue),
    )

    def jitter(image: Image, key: Key[Array, ""]) -> Image:
        for number, (width, centre, adjust) in enumerate(changes):
            if width:
                low = max(centre - width, 0.0) if centre else -width
                drawn = jax.random.fold_in(key, number)
                factor = jax.random.uniform(drawn, (), minval=low, maxval=centre + width)
                image = adjust(image, factor)
        return image

    return jax.vmap(jitter)(jnp.asarray(images, jnp.float32), keys)


def _gray(image: Image) -> Float[Array, "h w 1"]:
    """Returns the brightness of each pixel, [h w 1]."""
    if image.shape[-1] == 1:
        return image
    return jnp.sum(image * jnp.asarray(GRAY, image.dtype).reshape(1, 1, 3), axis=-1, keepdims=True)


def _blend(image: Image, other: jax.Array, factor: Number) -> Image:
    return jnp.clip(factor * image + (1.0 - factor) * other, 0.0, MAXIMUM)
