"""Augmentation against NumPy slicing, driven by the numbers that the same keys draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.training.augment import example_keys, make_augment, normalize, random_crop, random_flip
from cnn_jax.training.color import jitter_color
from cnn_jax.training.random_operations import rand_augment

ROOT = jax.random.key(7)


def draw_images(shape=(16, 7, 5, 3)):
    return np.random.default_rng(0).integers(1, 256, size=shape, dtype=np.uint8)


def keys_of(epochs, examples, root=ROOT):
    return example_keys(root, jnp.asarray(epochs, jnp.int32), jnp.asarray(examples, jnp.int32))


def shifted(image, key, padding):
    """Where pixel (y, x) of the result was (y + top - padding, x + left - padding), or nothing."""
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[int(top) : int(top) + height, int(left) : int(left) + width]


def mirrored(image, key):
    return image[:, ::-1] if jax.random.bernoulli(key) else image


@pytest.mark.parametrize("padding", [1, 2, 6])
def test_random_crop_shifts_each_image_by_what_its_key_draws(padding):
    images, keys = draw_images(), jax.random.split(ROOT, 16)
    cropped = random_crop(jnp.asarray(images), keys, padding=padding)
    expected = [shifted(image, key, padding) for image, key in zip(images, keys, strict=True)]
    assert cropped.dtype == images.dtype
    np.testing.assert_array_equal(cropped, np.stack(expected))


def test_random_crop_draws_every_shift_equally_often():
    dot = np.zeros((900, 3, 3, 1), np.uint8)
    dot[:, 1, 1] = 1
    cropped = random_crop(jnp.asarray(dot), jax.random.split(ROOT, 900), padding=1)
    shifts = np.asarray(cropped).sum(axis=(0, 3), dtype=int)
    assert shifts.sum() == 900
    assert np.all(np.abs(shifts - 100) < 4 * np.sqrt(100))


def test_random_flip_mirrors_about_half_of_the_images():
    images, keys = draw_images((100, 2, 3, 1)), jax.random.split(ROOT, 100)
    flipped = np.asarray(random_flip(jnp.asarray(images), keys))
    is_flipped = np.asarray([bool(jax.random.bernoulli(key)) for key in keys])
    np.testing.assert_array_equal(flipped[is_flipped], images[is_flipped][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~is_flipped], images[~is_flipped])
    assert abs(is_flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(100)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_padding", [0, 2])
def test_make_augment_crops_and_flips_by_independent_keys(crop_padding, flip):
    images, keys = draw_images(), keys_of(np.arange(16) // 4, np.arange(16))
    expected = []
    for image, key in zip(images, keys, strict=True):
        crop_key, flip_key = jax.random.split(key)
        image = shifted(image, crop_key, crop_padding)
        expected.append(mirrored(image, flip_key) if flip else image)
    augment = make_augment(crop_padding=crop_padding, flip=flip)
    changed = augment(jnp.asarray(images), ROOT, jnp.arange(16) // 4, jnp.arange(16))
    np.testing.assert_array_equal(changed, np.stack(expected))
    assert np.array_equal(changed, images) == (not crop_padding and not flip)


def test_keys_differ_in_root_epoch_and_example():
    grid = [
        keys_of(epochs, examples, jax.random.key(seed))
        for seed in (0, 1)
        for epochs, examples in [np.divmod(np.arange(60), 20), np.divmod(np.arange(60) + 2**20, 20)]
    ]
    words = np.concatenate([jax.random.key_data(keys) for keys in grid])
    assert len(np.unique(words, axis=0)) == len(words) == 240


def test_alternating_flips_show_each_side_once_in_two_epochs():
    images, examples = draw_images((100, 2, 3, 1)), np.arange(100)
    augment = make_augment(alternate_flips=True)
    sides = []
    for epoch in range(4):
        changed = np.asarray(augment(jnp.asarray(images), ROOT, jnp.full(100, epoch), examples))
        mirrored = np.all(changed == images[:, :, ::-1], axis=(1, 2, 3))
        np.testing.assert_array_equal(changed[~mirrored], images[~mirrored])
        sides.append(mirrored)
    begins = [
        bool(jax.random.bernoulli(jax.random.split(k)[1])) for k in keys_of(0 * examples, examples)
    ]
    np.testing.assert_array_equal(sides, [begins, np.invert(begins)] * 2)
    assert abs(np.mean(begins) - 0.5) < 4 * 0.5 / np.sqrt(100)


def test_what_is_switched_on_happens_in_the_documented_order():
    """Crop, flip, RandAugment, jitter, each by further keys of the example."""
    images, numbers = draw_images(), jnp.arange(16)
    keys = keys_of(numbers // 4, numbers)

    def further(number):
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

    moved = [
        mirrored(shifted(image, *parts[:1], 2), parts[1])
        for image, parts in zip(images, jax.vmap(jax.random.split)(keys), strict=True)
    ]
    expected = jax.jit(functools.partial(rand_augment, num_operations=1, magnitude=20))(
        np.stack(moved), further(2)
    )
    expected = jitter_color(expected, further(3), brightness=0.4, hue=0.1)
    augment = jax.jit(
        make_augment(
            crop_padding=2, flip=True, random_operations=1, magnitude=20, brightness=0.4, hue=0.1
        )
    )
    changed = augment(jnp.asarray(images), ROOT, numbers // 4, numbers)
    np.testing.assert_allclose(changed, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_padding": 2, "flip": True},
        {"alternate_flips": True, "random_operations": 1, "saturation": 0.5},
    ],
)
def test_an_example_changes_alike_in_any_position_batch_and_sharding(arguments):
    images, epochs, examples = draw_images(), np.arange(16) % 3, 1000 + np.arange(16)
    augment = make_augment(**arguments)
    change = jax.jit(lambda images, *names: augment(images, ROOT, *names))
    alone = [change(images[[i]], epochs[[i]], examples[[i]])[0] for i in range(16)]
    order = np.random.default_rng(1).permutation(16)
    for num_devices in (1, 8):
        mesh = Mesh(np.asarray(jax.devices()[:num_devices]), ("data",))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        together = change(
            *jax.device_put((images[order], epochs[order], examples[order]), sharding)
        )
        assert len(together.sharding.device_set) == num_devices
        np.testing.assert_array_equal(together, np.stack(alone)[order])


def test_normalize():
    images = draw_images()
    images[0, 0, 0] = 0
    images[0, 0, 1] = 255
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 0.25)
    expected = (images.astype(np.float64) / 255 - mean) / std
    for name, tolerance in (("float32", 1e-6), ("bfloat16", 2**-8)):
        dtype = jnp.dtype(name)
        normalized = normalize(jnp.asarray(images), mean=mean, std=std, dtype=dtype)
        assert normalized.dtype == dtype
        actual = np.asarray(normalized, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-6)
