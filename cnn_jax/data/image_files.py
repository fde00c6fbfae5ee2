"""Image files of any size, as the uint8 pixels that a network takes."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cnn_jax.data.images import MAX_PIXELS, ImageError, crop_center, size_of
from cnn_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files that are taken from a folder."""


def find_images(paths: Iterable[str]) -> Iterator[Path]:
    """Gives the files that `paths` name: files, folders (all below, in order) and patterns.

    What names nothing is given as it is, so that reading it says so.
    """
    for text in paths:
        path = Path(text)
        if path.exists() or not glob.has_magic(text):
            matches = [path]
        else:
            matches = sorted(map(Path, glob.glob(text, recursive=True)))
        yield from dict.fromkeys(each for match in matches for each in _below(match)) or [path]


def _below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)


def read_image(path: Path, image_shape: tuple[int, int, int], *, fraction: float) -> np.ndarray:
    """Returns the image in a file as uint8 of `image_shape`, (height, width, channels).

    See `decode_image`. Raises UserError where there is no such file or it is no whole image.
    """
    try:
        return decode_image(path.read_bytes(), image_shape, fraction=fraction)
    except IsADirectoryError as error:
        raise UserError(f"{path}: holds no image") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, ImageError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def decode_image(
    data: bytes,
    image_shape: tuple[int, int, int],
    *,
    fraction: float,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Returns the pixels of an encoded image that a network is evaluated on.

    They are uint8 of `image_shape`, (height, width, channels); see `images.crop_center`, of which
    `fraction` is. Raises ImageError for what is no whole image, and TooManyPixelsError for one of
    more than `max_pixels` before it is decoded.
    """
    size_of(data, max_pixels=max_pixels)
    image = np.empty(image_shape, np.uint8)
    crop_center(data, image, fraction=fraction)
    return image
