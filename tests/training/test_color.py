"""Changes of colour against float64 NumPy, Python's own colorsys for the hues."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.training.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    jitter_color,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEYS = jax.random.split(jax.random.key(5), 8)


def draw_images(channels=3, examples=8):
    """Few values, so that channels are often equal: hues have their corners there."""
    rng = np.random.default_rng(0)
    values = np.array([0, 30, 31, 128, 200, 255])
    return rng.choice(values, size=(examples, 6, 5, channels)).astype(np.uint8)


def gray(image):
    if image.shape[-1] == 1:
        return image
    return (image @ [0.2989, 0.587, 0.114])[..., None]


def brightness(image, factor):
    return np.clip(factor * image, 0, 255)


def contrast(image, factor):
    return np.clip(factor * image + (1 - factor) * gray(image).mean(), 0, 255)


def saturation(image, factor):
    return np.clip(factor * image + (1 - factor) * gray(image), 0, 255)


def hue(image, turn):
    def pixel(rgb):
        if len(rgb) == 1:
            return rgb
        h, s, v = colorsys.rgb_to_hsv(*rgb / 255)
        return 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))

    return np.apply_along_axis(pixel, -1, image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("adjust", "oracle", "factors"),
    [
        (adjust_brightness, brightness, (0.0, 0.6, 1.0, 1.7)),
        (adjust_contrast, contrast, (0.0, 0.6, 1.0, 1.7)),
        (adjust_saturation, saturation, (0.0, 0.6, 1.0, 1.7)),
        (adjust_hue, hue, (-0.5, -0.1, 0.0, 0.3, 0.5)),
    ],
)
def test_each_change_equals_the_oracle(adjust, oracle, factors, channels):
    for image in draw_images(channels)[:3]:
        for factor in factors:
            changed = adjust(jnp.asarray(image, jnp.float32), jnp.float32(factor))
            np.testing.assert_allclose(changed, oracle(image.astype(float), factor), atol=2e-3)


def test_factors_are_drawn_by_example_and_applied_in_order():
    widths = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]
    images = draw_images()
    changed = jax.jit(functools.partial(jitter_color, **widths))(jnp.asarray(images), KEYS)
    assert changed.dtype == jnp.float32
    for image, key, actual in zip(images.astype(float), KEYS, changed, strict=True):
        for number, (low, high) in enumerate(ranges):
            drawn = jax.random.fold_in(key, number)
            factor = float(jax.random.uniform(drawn, (), minval=low, maxval=high))
            assert low <= factor <= high
            image = (brightness, contrast, saturation, hue)[number](image, factor)
        np.testing.assert_allclose(actual, image, atol=5e-3)


def test_what_is_zero_changes_nothing():
    images = draw_images()
    np.testing.assert_array_equal(jitter_color(jnp.asarray(images), KEYS), images)
    alone = jitter_color(jnp.asarray(images), KEYS, saturation=0.5)
    factors = jax.vmap(
        lambda key: jax.random.uniform(jax.random.fold_in(key, 2), (), minval=0.5, maxval=1.5)
    )(KEYS)
    expected = [saturation(*pair) for pair in zip(images.astype(float), factors, strict=True)]
    np.testing.assert_allclose(alone, expected, atol=2e-3)


def test_images_without_colours_are_refused():
    with pytest.raises(ValueError, match="images of 2 channels: colours need 1 or 3"):
        jitter_color(jnp.zeros((8, 2, 2, 2)), KEYS, hue=0.1)
