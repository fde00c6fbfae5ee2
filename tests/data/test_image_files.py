"""Images of any size as pixels of one size."""

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.image_files import find_images, read_image
from cnn_jax.errors import UserError


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)


def test_an_image_of_that_size_is_not_changed(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (20, 28, 3)), pixels)


def test_grey_is_the_weighted_sum_of_the_colours(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png", (20, 28, 1))[..., 0]
    assert np.abs(grey - pixels @ [0.299, 0.587, 0.114]).max() <= 1


def test_a_wide_image_is_halved_and_cut_to_its_middle(tmp_path):
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, 12:20] = (10, 20, 30)
    Image.fromarray(image).save(tmp_path / "a.png")
    small = read_image(tmp_path / "a.png", (4, 4, 3))
    assert small.shape == (4, 4, 3)
    np.testing.assert_array_equal(small[:, 1:3], np.broadcast_to([10, 20, 30], (4, 2, 3)))


def test_the_exif_tag_turns_the_image(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png", (28, 20, 3))
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


def test_files_that_are_no_images_are_named(pixels, tmp_path, monkeypatch):
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for path, reason in {
        cut: "cannot be read: ",
        text: "is no image that can be read",
        tmp_path / "nothing.png": "there is no such file",
        tmp_path: "holds no image",
    }.items():
        with pytest.raises(UserError) as caught:
            read_image(path, (20, 28, 3))
        assert str(caught.value).startswith(f"{path}: {reason}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # a bomb is one of more than this
    with pytest.raises(UserError, match="could be decompression bomb"):
        read_image(tmp_path / "whole.jpg", (20, 28, 3))


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
