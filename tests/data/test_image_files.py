"""Images of any size as pixels of one size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.image_files import decode_image, find_images, read_image
from cnn_jax.data.images import TooManyPixelsError
from cnn_jax.data.sources import Crops, open_source
from cnn_jax.errors import UserError


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)


def test_an_image_of_that_size_is_not_changed(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (20, 28, 3), fraction=1.0), pixels)


def test_grey_is_the_weighted_sum_of_the_colours(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png", (20, 28, 1), fraction=1.0)[..., 0]
    assert np.abs(grey - pixels @ [0.299, 0.587, 0.114]).max() <= 1


def test_a_wide_image_is_halved_and_cut_to_its_middle(tmp_path):
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, 12:20] = (10, 20, 30)
    Image.fromarray(image).save(tmp_path / "a.png")
    small = read_image(tmp_path / "a.png", (4, 4, 3), fraction=1.0)
    assert small.shape == (4, 4, 3)
    np.testing.assert_array_equal(small[:, 1:3], np.broadcast_to([10, 20, 30], (4, 2, 3)))


def test_the_exif_tag_turns_the_image(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png", (28, 20, 3), fraction=1.0)
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.parametrize("fraction", [0.875, 0.5])
def test_a_file_has_the_pixels_that_evaluation_has_of_it(fraction, tmp_path):
    """Bit for bit, whatever its size, mode and orientation."""
    random, number = np.random.default_rng(1), 0
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for size in ((31, 47), (90, 40), (260, 301)):
        for mode in ("RGB", "L", "CMYK"):
            for orientation in range(1, 9):
                exif = Image.Exif()
                exif[0x0112] = orientation
                image = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
                name = ("cat", "dog")[number % 2]
                image.save(tmp_path / "train" / name / f"{number}.jpg", exif=exif)
                number += 1
    crops = Crops(image_size=32, eval_fraction=fraction)
    source = open_source("folder", "train", source_dir=str(tmp_path), crops=crops)
    images = source.batch(np.arange(number))["image"]
    for index, expected in enumerate(images):
        found = read_image(Path(source.name(index)), (32, 32, 3), fraction=fraction)
        np.testing.assert_array_equal(found, expected)


def test_files_that_are_no_images_are_named(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for path, reason in {
        cut: "cannot be read: ",
        text: "cannot be read: not an image of a kind that can be read",
        tmp_path / "nothing.png": "there is no such file",
        tmp_path: "holds no image",
    }.items():
        with pytest.raises(UserError) as caught:
            read_image(path, (20, 28, 3), fraction=1.0)
        assert str(caught.value).startswith(f"{path}: {reason}")
    whole = (tmp_path / "whole.jpg").read_bytes()
    with pytest.raises(TooManyPixelsError, match="28 x 20 pixels: must be 1 to 559 in all"):
        decode_image(whole, (20, 28, 3), fraction=1.0, max_pixels=559)


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()

    def found(*names: str) -> list[str]:
        paths = find_images([str(tmp_path / name) for name in names])
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found("") == ["a.JPG", "b.png", "sub/c.png"]
    assert found("notes.txt", "*.png") == ["notes.txt", "b.png"]
    assert found("**/*.png") == ["b.png", "sub/c.png"]
    assert found("*") == ["a.JPG", "b.png", "notes.txt", "sub/c.png"]  # a folder that matches too
    assert found("**") == ["a.JPG", "b.png", "sub/c.png", "notes.txt"]  # each file once
    assert found("none*.png", "empty", "gone") == ["none*.png", "empty", "gone"]
