"""Smaller images, against the triangle filter written as a matrix in float64."""

import jax
import numpy as np
import pytest

from cnn_jax.training.augment import make_augment
from cnn_jax.training.resizing import resize, resized_first


def triangles(size, side):
    """The weights of each pixel of `size` in each of `side`, rows that sum to 1."""
    scale = size / side
    centres = (np.arange(side) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - abs(np.arange(size)[None] - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("size", "side", "channels"), [(28, 14, 1), (32, 20, 3), (9, 7, 3)])
def test_pixels_are_means_under_a_triangle(size, side, channels):
    images = np.random.default_rng(0).integers(256, size=(4, size, size, channels)).astype(np.uint8)
    found = np.asarray(resize(images, side))
    rows = triangles(size, side)
    expected = np.einsum("ih,bhwc,jw->bijc", rows, images.astype(np.float64), rows)
    assert found.dtype == np.uint8
    assert abs(found - expected).max() <= 0.5 + 1e-3
    whites = np.full((1, size, size, channels), 255, np.uint8)
    assert (np.asarray(resize(whites, side)) == 255).all()


def test_images_shrink_before_they_are_changed():
    images = np.random.default_rng(0).integers(256, size=(4, 12, 12, 1)).astype(np.uint8)
    names = jax.random.key(0), np.zeros(4, np.int32), np.arange(4, dtype=np.int32)
    augment = make_augment(crop_padding=2, flip=True)
    np.testing.assert_array_equal(
        resized_first(augment, 8)(images, *names), augment(resize(images, 8), *names)
    )
