"""RandAugment against Pillow, whose functions are what torchvision's RandAugment calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnn_jax.training.random_operations import OPERATIONS, apply_operation, rand_augment

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZES = {"colour": (24, 31, 3), "grey": (28, 28, 1)}

ROUNDED = ("Brightness", "Color", "Contrast", "Sharpness", "AutoContrast")
"""Operations in which Pillow rounds fractions down that its own rounding may have put below."""


def draw_images(shape, examples=1, seed=0):
    """Smooth images in part of the range, some of few values, as photographs and drawings are."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(examples):
        coarse = rng.integers(0, 256, size=(6, 7, shape[-1]), dtype=np.uint8)
        smooth = Image.fromarray(coarse.squeeze()).resize(shape[1::-1], Image.Resampling.BICUBIC)
        image = np.asarray(smooth, float).reshape(shape) * 0.7 + 20
        images.append(image // 40 * 40 if number % 3 == 2 else image)
    return np.stack(images).astype(np.uint8)


def pillow(image, name, magnitude, backwards):
    """What torchvision 0.24's `RandAugment` does to a PIL image, written with Pillow alone."""
    height, width, channels = image.shape
    picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    level = magnitude / 30 * (-1 if backwards else 1)

    def affine(*matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    changed = {
        "Identity": lambda: picture,
        "ShearX": lambda: affine(1, 0.3 * level, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, 0.3 * level, 1, 0),
        "TranslateX": lambda: affine(1, 0, -int(150 / 331 * width * level), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -int(150 / 331 * height * level)),
        "Rotate": lambda: picture.rotate(30 * level),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * level),
        "Color": lambda: ImageEnhance.Color(picture).enhance(1 + 0.9 * level),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * level),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * level),
        "Posterize": lambda: ImageOps.posterize(picture, 8 - round(magnitude / 7.5)),
        "Solarize": lambda: ImageOps.solarize(picture, 255 - 255 * magnitude / 30),
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
    }[name]()
    return np.asarray(changed).reshape(image.shape)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_every_operation_is_pillow_s(magnitude, shape):
    operate = jax.jit(
        jax.vmap(functools.partial(apply_operation, magnitude=magnitude), in_axes=(0, None, None))
    )
    images = draw_images(shape, examples=6)
    for number, name in enumerate(OPERATIONS):
        for backwards in (0, 1):
            ours = np.asarray(operate(images, jnp.int32(number), jnp.int32(backwards)), int)
            theirs = [pillow(image, name, magnitude, backwards) for image in images]
            off = np.abs(ours - np.stack(theirs))
            if name in ("ShearX", "ShearY", "Rotate"):
                assert np.mean(off.max(axis=-1) > 0) < 0.005, name
            else:
                assert off.max() <= (name in ROUNDED), name
                assert np.mean(off > 0) < 0.02, name


def test_corners_of_the_tables():
    """One value, two, one far more often than others, a ramp of all."""
    ramp = np.arange(60 * 25 * 3).reshape(60, 25, 3) % 256
    often = np.where(ramp < 40, ramp, 90)
    images = np.stack([ramp * 0, ramp * 0 + 255, 7 + 2 * (ramp < 99), often, ramp, ramp // 2 + 90])
    images = images.astype(np.uint8)
    operate = jax.jit(
        jax.vmap(functools.partial(apply_operation, magnitude=15), in_axes=(0, None, None))
    )
    for name in ("AutoContrast", "Equalize", "Contrast", "Solarize"):
        ours = operate(images, jnp.int32(OPERATIONS.index(name)), jnp.int32(0))
        theirs = np.stack([pillow(image, name, 15, 0) for image in images])
        assert np.abs(np.asarray(ours, int) - theirs).max() <= (name in ROUNDED), name


def test_each_example_draws_its_own_operations():
    images, keys = draw_images((9, 8, 3), examples=12), jax.random.split(jax.random.key(0), 12)
    changed = jax.jit(functools.partial(rand_augment, num_operations=2, magnitude=20))(images, keys)
    assert changed.dtype == jnp.uint8
    operate = jax.jit(functools.partial(apply_operation, magnitude=20))
    draw = jax.jit(jax.random.randint, static_argnums=(1, 2, 3))
    for image, key, actual in zip(images, keys, changed, strict=True):
        for number in range(2):
            which, direction = jax.random.split(jax.random.fold_in(key, number))
            operation = draw(which, (), 0, len(OPERATIONS))
            image = operate(image, operation, jnp.int32(jax.random.bernoulli(direction)))
        np.testing.assert_array_equal(actual, image)


def test_operations_and_directions_are_drawn_equally_often():
    """A picture of two halves tells five of them apart."""
    image = np.zeros((12, 12, 1), np.uint8)
    image[:, 6:] = 90
    images = np.repeat(image[None], 1400, axis=0)
    keys = jax.random.split(jax.random.key(1), 1400)
    augment = jax.jit(functools.partial(rand_augment, num_operations=1, magnitude=30))
    changed = np.asarray(augment(images, keys))

    def count(name, backwards=0):
        expected = pillow(image, name, 30, backwards)
        return np.count_nonzero(np.all(changed == expected, axis=(1, 2, 3)))

    for name in ("TranslateX", "Rotate", "Brightness"):
        for backwards in (0, 1):
            assert abs(count(name, backwards) - 50) < 4 * np.sqrt(50), name
    for name in ("AutoContrast", "Solarize"):
        assert abs(count(name) - 100) < 4 * np.sqrt(100), name


def test_images_without_colours_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="images of 4 channels: RandAugment needs 1 or 3"):
        rand_augment(np.zeros((2, 3, 3, 4), np.uint8), keys, num_operations=1, magnitude=9)
