"""What can be wrong with an encoded image, and what is odd about it."""

import io
import os
from collections.abc import Iterator

from PIL import Image

from cnn_jax.data.images import EXTENSIONS, PNG, ImageError, decode, decoders, size_of
from cnn_jax.data.orientation import orientation_of

_ENDINGS = {  # by Pillow's name of a kind; MPO is a JPEG with more behind it
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}
_MODES = {
    "CMYK": "CMYK: converted to RGB",
    "L": "greyscale: repeated to three channels",
    "LA": "greyscale with alpha: alpha is dropped, grey repeated",
    "RGBA": "alpha: dropped",
}


def damage_of(data: bytes) -> str | None:
    """Returns why an encoded image cannot be used; None if it can."""
    try:
        decode(data)
    except ValueError as error:
        return str(error)
    return None


def oddities(data: bytes, name: str) -> Iterator[str]:
    """Yields what is unusual about an image that can be used, and how it is used.

    `name` is its file's name, or anything without an ending.
    """
    try:
        yield from _seen_by_pillow(data, os.path.splitext(name)[1].lower())
    except ImageError as error:
        yield f"used, but Pillow cannot tell what is odd about it: {error}"
    height, width = size_of(data)
    if min(height, width) < 32:
        yield f"small: {width} x {height} pixels"


def _seen_by_pillow(data: bytes, suffix: str) -> Iterator[str]:
    with decoders(), Image.open(io.BytesIO(data)) as image:
        if suffix in EXTENSIONS and suffix not in _ENDINGS.get(image.format or "", ()):
            yield f"a {image.format} named {suffix}: read as what it is"
        if image.mode in _MODES:
            yield _MODES[image.mode]
        deep = data.startswith(PNG) and data[24] == 16  # in colour Pillow makes it 8 bits
        if deep or image.mode.startswith("I") or image.mode == "F":
            yield "16 bits or more: the upper 8 are taken"
        if getattr(image, "n_frames", 1) > 1:
            yield "animated: the first frame is taken"
        if (orientation := orientation_of(data)) != 1:
            yield f"EXIF orientation {orientation}: turned as it says"
