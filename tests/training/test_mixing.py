"""Erasing, mixup and cutmix against NumPy, driven by the numbers that the same keys draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.training.augment import example_keys
from cnn_jax.training.mixing import cutmix, make_mix, mixup, random_erase

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = jax.random.key(11)
CLASSES = 5


def draw(examples=16, shape=(9, 7, 3)):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, *shape)).astype(np.float32)
    return images, rng.integers(CLASSES, size=examples, dtype=np.int32)


def keys_of(epochs, examples):
    return example_keys(ROOT, jnp.asarray(epochs, jnp.int32), jnp.asarray(examples, jnp.int32))


def further(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def erased(image, key, probability):
    """torchvision's RandomErasing with the value 0; its ten draws are made at once."""
    height, width, _ = image.shape
    coin, area_key, ratio_key, top_key, left_key = jax.random.split(key, 5)
    if not jax.random.bernoulli(coin, probability):
        return image
    areas = np.asarray(jax.random.uniform(area_key, (10,), minval=0.02, maxval=0.33), float)
    logs = jax.random.uniform(ratio_key, (10,), minval=np.log(0.3), maxval=np.log(3.3))
    for area, ratio in zip(areas * height * width, np.exp(np.asarray(logs, float)), strict=True):
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            top = int(jax.random.randint(top_key, (), 0, height - h + 1))
            left = int(jax.random.randint(left_key, (), 0, width - w + 1))
            image = image.copy()
            image[top : top + h, left : left + w] = 0
            break
    return image


def cut(image, partner, share, key):
    """torchvision's CutMix: the image, and what is left of it."""
    height, width, _ = image.shape
    y_key, x_key = jax.random.split(key)
    y = int(jax.random.randint(y_key, (), 0, height))
    x = int(jax.random.randint(x_key, (), 0, width))
    h, w = (int(0.5 * np.sqrt(1 - share) * side) for side in (height, width))
    rows, columns = slice(max(y - h, 0), y + h), slice(max(x - w, 0), x + w)
    image = image.copy()
    image[rows, columns] = partner[rows, columns]
    area = (min(y + h, height) - max(y - h, 0)) * (min(x + w, width) - max(x - w, 0))
    return image, 1 - area / (height * width)


def test_erasing_equals_the_oracle():
    images, _ = draw(64, (6, 13, 2))
    keys = jax.random.split(ROOT, 64)
    changed = jax.jit(functools.partial(random_erase, probability=0.6))(images, keys)
    expected = [erased(image, key, 0.6) for image, key in zip(images, keys, strict=True)]
    np.testing.assert_array_equal(changed, np.stack(expected))
    share = np.mean(np.any(changed == 0, axis=(1, 2, 3)))
    assert 0.3 < share < 0.9


def test_mixup_is_a_weighted_mean_with_the_example_before():
    images, labels = draw()
    targets = np.eye(CLASSES, dtype=np.float32)[labels]
    share = np.linspace(0, 1, 16, dtype=np.float32)
    mixed, shares = mixup(jnp.asarray(images), jnp.asarray(targets), jnp.asarray(share))
    for i in range(16):
        np.testing.assert_allclose(
            mixed[i], share[i] * images[i] + (1 - share[i]) * images[i - 1], atol=1e-6
        )
        expected = share[i] * targets[i] + (1 - share[i]) * targets[i - 1]
        np.testing.assert_allclose(shares[i], expected, atol=1e-6)


def test_cutmix_pastes_and_counts_the_pixels():
    images, labels = draw(64)
    targets = np.eye(CLASSES, dtype=np.float32)[labels]
    share = np.random.default_rng(1).uniform(size=64).astype(np.float32)
    keys = jax.random.split(ROOT, 64)
    mixed, shares = jax.jit(cutmix)(images, targets, share, keys)
    for i in range(64):
        expected, left = cut(images[i], images[i - 1], share[i], keys[i])
        np.testing.assert_array_equal(mixed[i], expected)
        np.testing.assert_allclose(
            shares[i], left * targets[i] + (1 - left) * targets[i - 1], atol=1e-6
        )


def test_shares_have_the_moments_of_a_beta_distribution():
    alpha = 0.2
    images, labels = jnp.zeros((4000, 1, 1, 1)), jnp.arange(4000, dtype=jnp.int32) % 2
    mix = jax.jit(make_mix(num_classes=2, mixup_alpha=alpha))
    _, targets = mix(images, labels, ROOT, 0 * labels, jnp.arange(4000))
    shares = np.asarray(targets)[np.arange(4000), labels]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / 4000)
    assert abs(shares.var() / variance - 1) < 0.1


def test_with_both_an_example_is_mixed_one_way_or_the_other():
    images, _ = draw(64, (8, 8, 1))
    labels, numbers = np.arange(64) % 2, jnp.arange(64)
    both = make_mix(num_classes=2, mixup_alpha=0.7, cutmix_alpha=3.0)
    mixed, targets = jax.jit(both)(images, labels, ROOT, numbers // 10, numbers)
    cuts = jax.vmap(jax.random.bernoulli)(further(keys_of(numbers // 10, numbers), 7))
    assert 20 < np.sum(cuts) < 44
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    for i, cut_mixed in enumerate(cuts):
        share, own, other = targets[i, labels[i]], images[i], images[i - 1]
        if cut_mixed:
            np.testing.assert_allclose(np.mean(mixed[i] == own), share, atol=1e-6)
            assert np.all((mixed[i] == own) | (mixed[i] == other))
        else:
            np.testing.assert_allclose(mixed[i], share * own + (1 - share) * other, atol=1e-5)


def test_erasing_comes_before_mixing():
    images, labels = draw()
    numbers = jnp.arange(16)
    keys = keys_of(numbers, numbers)
    mix = jax.jit(make_mix(num_classes=CLASSES, erase_probability=1.0, mixup_alpha=1.0))
    mixed, targets = mix(images, labels, ROOT, numbers, numbers)
    parts = np.stack([erased(i, k, 1.0) for i, k in zip(images, further(keys, 4), strict=True)])
    (different,) = np.nonzero(labels != np.roll(labels, 1))
    for i in different:
        share = targets[i, labels[i]]
        expected = share * parts[i] + (1 - share) * parts[i - 1]
        np.testing.assert_allclose(mixed[i], expected, atol=1e-5)


def test_without_mixing_targets_are_the_labels():
    images, labels = draw()
    numbers = jnp.arange(16)
    same, targets = make_mix(num_classes=CLASSES)(images, labels, ROOT, numbers, numbers)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(targets, np.eye(CLASSES)[labels])


def test_a_batch_on_eight_devices_is_mixed_as_on_one():
    """One image moves over each border between devices, and no batch is gathered."""
    images, labels = draw()
    mix = jax.jit(
        make_mix(num_classes=CLASSES, erase_probability=0.3, mixup_alpha=0.5, cutmix_alpha=1.0)
    )
    names = (np.zeros(16, np.int32), np.arange(16, dtype=np.int32))
    results = []
    for number in (1, 8):
        mesh = Mesh(np.asarray(jax.devices()[:number]), ("data",))
        batch = NamedSharding(mesh, PartitionSpec("data"))
        placed = jax.device_put((images, labels, *names), batch)
        key = jax.device_put(ROOT, NamedSharding(mesh, PartitionSpec()))
        arguments = (*placed[:2], key, *placed[2:])
        program = mix.lower(*arguments).compile()
        results.append(jax.device_get(program(*arguments)))
        text = program.as_text()
        assert "all-gather" not in text
        assert ("collective-permute" in text) == (number > 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *results)
