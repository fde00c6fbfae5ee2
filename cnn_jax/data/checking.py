"""What can be wrong with an encoded image, and what is odd about it."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from cnn_jax.data.images import EXTENSIONS, JPEG, PNG, decode, size_of

EXIF_ORIENTATION = 0x0112
_KINDS = {JPEG: ("JPEG", (".jpg", ".jpeg")), PNG: ("PNG", (".png",))}
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
    suffix = os.path.splitext(name)[1].lower()
    for magic, (kind, suffixes) in _KINDS.items():
        if data.startswith(magic) and suffix in EXTENSIONS and suffix not in suffixes:
            yield f"a {kind} named {suffix}: read as what it is"
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in _MODES:
            yield _MODES[image.mode]
        if image.mode.startswith("I") or image.mode == "F":
            yield "16 bits or more: the upper 8 are taken"
        if getattr(image, "n_frames", 1) > 1:
            yield "animated: the first frame is taken"
        turned = image.getexif().get(EXIF_ORIENTATION, 1)
        if turned != 1:
            yield f"EXIF orientation {turned}: ignored, the pixels are taken as they lie"
    height, width = size_of(data)
    if min(height, width) < 32:
        yield f"small: {width} x {height} pixels"


def strays(root: Path, files: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yields the path of each of the `files` below `root` that is passed over, and why."""
    for path in files:
        if not path.lower().endswith(EXTENSIONS):
            full = os.path.join(root, path)
            yield full, f"not read: its name must end with one of {', '.join(EXTENSIONS)}"


def bad_links(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the path of each link below `root` that is not followed, and why."""
    for directory, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            path = Path(directory, name)
            if path.is_symlink() and not path.exists():
                yield str(path), "a link to nothing: not read"
            elif path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
                yield str(path), "a link to a folder that holds it: not followed"
