"""Image files of any size, as the uint8 pixels that a network takes."""

import glob
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cnn_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files that are taken from a folder."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of what such files hold."""

MODES = {1: "L", 3: "RGB"}

_OPENING = threading.Lock()  # the filters of warnings are those of the whole process


class TooManyPixelsError(UserError):
    """An image that is larger than is allowed; nothing of it has been decoded."""


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


def read_image(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the image in a file as uint8 of `image_shape`, (height, width, channels).

    See `decode_image`. Raises UserError where there is no such file, it is no image, is cut short,
    or has more than Pillow's limit of pixels.
    """
    try:
        with path.open("rb") as file:
            return decode_image(file, image_shape)
    except IsADirectoryError as error:
        raise UserError(f"{path}: holds no image") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def decode_image(
    file: BinaryIO,
    image_shape: tuple[int, int, int],
    *,
    max_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> np.ndarray:
    """Returns an encoded image as uint8 of `image_shape`, (height, width, channels).

    It is turned as its EXIF tag says, made grey (`0.299 R + 0.587 G + 0.114 B`) or RGB, transparent
    parts as they are below, scaled without distortion until it just covers `image_shape`, by
    Pillow's antialiased bilinear filter, and cut to its middle. An image of that size is not
    changed. Of an animation it is the first frame.

    Args:
      file: the encoded image.
      image_shape: of the result; one channel or three.
      max_pixels: a larger image is refused before it is decoded; at most Pillow's own limit, which
        is the default.
      formats: names that Pillow has for kinds of images; others are refused. By default all.

    Raises TooManyPixelsError, and UserError for what is no whole image.
    """
    from PIL import Image, ImageOps

    height, width, channels = image_shape
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=formats)
        with opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                size = f"{opened.width} x {opened.height}"
                raise TooManyPixelsError(f"is {size} pixels; at most {max_pixels:,} are allowed")
            image = ImageOps.exif_transpose(opened).convert(MODES[channels])
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooManyPixelsError(f"cannot be read: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise UserError("is no image that can be read") from error
    except Exception as error:  # Pillow's decoders raise whatever the bytes led them into
        raise UserError(f"cannot be read: {error}") from error
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_shape)
