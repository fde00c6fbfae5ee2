"""A held-out part: disjoint, the same for ever, of all classes, and whole with what remains."""

import hashlib

import numpy as np
import pytest

from cnn_jax.data.datasets import DATASETS
from cnn_jax.data.holdout import Part
from cnn_jax.data.sources import Crops, Images, ImageSource, open_source


@pytest.mark.parametrize("percent", [0.5, 10, 33.3, 90])
def test_the_parts_are_disjoint_and_whole(percent):
    for size in (7, 1000):
        out, kept = (Part(percent, held_out=held).numbers(size) for held in (True, False))
        assert sorted([*out, *kept]) == list(range(size))
        assert len(out) == round(size * percent / 100) == Part(percent, held_out=True).size(size)
        assert (np.diff(out) > 0).all()
        assert (np.diff(kept) > 0).all()


def test_a_larger_part_holds_the_smaller():
    small, large = (set(Part(percent, held_out=True).numbers(500)) for percent in (5, 20))
    assert small < large


def test_the_part_is_the_same_for_ever():
    """NumPy keeps the raw stream of Philox."""
    numbers = Part(10, held_out=True).numbers(60_000)
    assert hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16] == "1ebfd236e3588a81"


def test_examples_in_the_order_of_their_classes_are_held_out_of_every_class():
    labels = np.arange(10).repeat(100)
    counts = np.bincount(labels[Part(10, held_out=True).numbers(1000)], minlength=10)
    assert counts.min() >= 3, "3 of 100, where 10 are expected, is more than 2 deviations off"


@pytest.mark.parametrize("memory_limit_mb", [0, 64])
def test_the_parts_of_a_source_are_its_examples(prepared_dir, memory_limit_mb):
    options = {"data_dir": str(prepared_dir), "memory_limit_mb": memory_limit_mb}
    whole = open_source("fashion_mnist_10k", "test[:200]", **options)
    for held in (True, False):
        part = Part(25, held_out=held)
        source = open_source("fashion_mnist_10k", "test[:200]", part=part, **options)
        assert len(source) == (50 if held else 150)
        assert source.split == ("25 % of test[:200]" if held else "test[:200] without 25 %")
        found = source.batch(np.arange(len(source)))
        expected = whole.batch(part.numbers(200))
        np.testing.assert_array_equal(found["image"], expected["image"])
        np.testing.assert_array_equal(found["label"], expected["label"])


class Encoded:
    def __len__(self):
        return 40

    def name(self, index):
        return f"image {index}"

    def read(self, index):
        return b"", index % 10

    def classes(self, numbers):
        return numbers % 10


def test_encoded_images_keep_their_names_and_change_their_size():
    info = DATASETS["imagenet2012"]
    whole = ImageSource(Images(info, "train", Encoded(), range(10, 40)), Crops())
    source = whole.select(np.array([3, 5]), "some")
    assert (len(source), source.split) == (2, "some")
    assert [source.name(0), source.read(1)] == ["image 13", (b"", 5)]
    assert source.resized(96).info.image_shape == (96, 96, 3)
    assert source.info.image_shape == (224, 224, 3)
