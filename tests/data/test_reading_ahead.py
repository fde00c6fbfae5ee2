"""Files in batches: the same pixels as one by one, whatever a PNG is like."""

import io

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.image_files import read_image
from cnn_jax.data.reading_ahead import read_batches
from cnn_jax.errors import UserError

SHAPES = {1: (12, 10, 1), 3: (12, 10, 3)}


def png(pixels, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, "png", **options)
    return file.getvalue()


def files():
    """Contents by name: plain ones, and all that must not be taken for plain."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (12, 10), np.uint8)
    rgb = random.integers(0, 256, (12, 10, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = io.BytesIO()
    Image.fromarray(rgb).save(jpeg, "jpeg")
    return {
        "grey.png": png(grey),
        "rgb.png": png(rgb),
        "palette.png": png(rgb, "P"),
        "alpha.png": png(random.integers(0, 256, (12, 10, 4), np.uint8)),
        "transparent.png": png(rgb, transparency=tuple(rgb[0, 0].tolist())),
        "deep.png": png(grey.astype(np.uint16) * 257),
        "turned.png": png(np.swapaxes(rgb, 0, 1)[:10, :12].copy(), exif=turned),
        "turned_grey.png": png(grey, exif=turned),
        "large.png": png(rgb.repeat(3, axis=0)),
        "gamma.png": png(grey, icc_profile=b"none"),
        "cut.png": png(rgb)[:-20],
        "without_end.png": png(rgb)[:-12],
        "flipped.png": png(rgb)[:60] + bytes([png(rgb)[60] ^ 255]) + png(rgb)[61:],
        "empty.png": b"",
        "photo.jpg": jpeg.getvalue(),
    }


def read_alone(path, shape):
    """The image of a file and what is wrong with it, by the function for one file."""
    try:
        return read_image(path, shape, fraction=1.0), None
    except UserError as error:
        return np.zeros(shape, np.uint8), str(error)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=["grey", "rgb"])
@pytest.mark.parametrize("batch_size", [4, 40])
def test_batches_are_the_images_one_by_one(tmp_path, shape, batch_size, capfd):
    names = [*files(), "gone.png"]
    for name, content in files().items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in names]
    batches = list(read_batches(paths, shape, fraction=1.0, batch_size=batch_size, num_threads=3))
    assert [str(path) for batch in batches for path in batch.paths] == paths
    assert {batch.images.shape for batch in batches} == {(batch_size, *shape)}
    errors = [error for batch in batches for error in batch.errors]
    found = np.concatenate([batch.images for batch in batches])
    for path, error, image in zip(paths, errors, found, strict=False):
        expected, reason = read_alone(tmp_path / path, shape)
        assert error == reason
        np.testing.assert_array_equal(image, expected, err_msg=path)
    assert sum(error is not None for error in errors) >= 3
    assert not found[len(paths) :].any()
    assert capfd.readouterr().err == ""  # libpng has a word of its own for damage
