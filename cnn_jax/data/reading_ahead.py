"""Image files in batches, read and decoded by threads while the last batch is computed."""

import itertools
import struct
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cnn_jax.data.image_files import find_images, read_image
from cnn_jax.errors import UserError

AHEAD = 2
"""Batches that are read while one is computed."""

AT_ONCE = 16
"""Files that a thread reads one after the other: for a small image, asking it costs as much."""

PNG, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
PNG_PIXELS = {b"IHDR", b"IDAT", b"IEND", b"pHYs"}
PNG_COLOURS = {1: 0, 3: 2}
"""What a PNG's header says of grey and of RGB pixels."""


class FileBatch(NamedTuple):
    """Some files in order, what is wrong with each, and their images.

    `images` is uint8 [batch_size, h, w, c]; the image of a file that cannot be read is black, and
    so are those after the last file.
    """

    paths: list[Path]
    errors: list[str | None]
    images: np.ndarray


def read_batches(
    paths: Iterable[str],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int,
    num_threads: int,
) -> Generator[FileBatch, None, None]:
    """Gives the images that `paths` name, in order; see `cnn_jax.data.image_files`."""
    files = find_images(paths)
    ahead: deque[tuple[list[Path], np.ndarray, list[Future[list[str | None]]]]] = deque()

    def read(paths: list[Path], images: np.ndarray) -> list[str | None]:
        return [_read(path, into) for path, into in zip(paths, images, strict=True)]

    with ThreadPoolExecutor(num_threads) as threads:
        try:
            while True:
                while len(ahead) <= AHEAD and (chunk := list(itertools.islice(files, batch_size))):
                    images = np.zeros((batch_size, *image_shape), np.uint8)
                    parts = (slice(n, n + AT_ONCE) for n in range(0, len(chunk), AT_ONCE))
                    readings = [
                        threads.submit(read, chunk[part], images[: len(chunk)][part])
                        for part in parts
                    ]
                    ahead.append((chunk, images, readings))
                if not ahead:
                    return
                chunk, images, readings = ahead.popleft()
                errors = [error for each in readings for error in each.result()]
                yield FileBatch(chunk, errors, images)
        finally:
            threads.shutdown(cancel_futures=True)


def _read(path: Path, into: np.ndarray) -> str | None:
    """Writes the image of a file into an array; returns what is wrong with the file, if anything.

    It is `read_image`, but quicker for what needs no change: a plain PNG of the very size.
    """
    try:
        pixels = _plain_png(path, into.shape)
        into[:] = read_image(path, into.shape) if pixels is None else pixels
    except UserError as error:
        return str(error)
    return None


def _plain_png(path: Path, image_shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns the pixels of a whole PNG of 8 bits, that shape and no more; None for any other."""
    height, width, channels = image_shape
    try:
        data = path.read_bytes()
    except OSError:  # `read_image` says what it is
        return None
    header = struct.pack(">4sIIBB", b"IHDR", width, height, 8, PNG_COLOURS[channels])
    if not data.startswith(PNG) or data[12:26] != header or not data.endswith(PNG_ENDS):
        return None
    if not _is_pixels_alone(data):
        return None
    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), colour)
    return None if pixels is None else pixels.reshape(image_shape)


def _is_pixels_alone(png: bytes) -> bool:
    """Whether it has no chunk but those of pixels, and their checksums are right.

    Others may turn the image or make pixels transparent, and of damage libpng writes to stderr.
    """
    start = len(PNG)
    while start < len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] not in PNG_PIXELS:
            return False
        if png[end : end + 4] != zlib.crc32(png[start + 4 : end]).to_bytes(4):
            return False
        start = end + 4
    return True
