"""Image files in batches, read and decoded by threads while the last batch is computed."""

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_jax.data.image_files import find_images, read_image
from cnn_jax.errors import UserError

AHEAD = 2
"""Batches that are read while one is computed."""

AT_ONCE = 16
"""Files that a thread reads one after the other: for a small image, asking it costs as much."""


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
    fraction: float,
    batch_size: int,
    num_threads: int,
) -> Generator[FileBatch, None, None]:
    """Gives the images that `paths` name, in order; see `cnn_jax.data.image_files`.

    Of an image it is the part that `fraction` says.
    """
    files = find_images(paths)
    ahead: deque[tuple[list[Path], np.ndarray, list[Future[list[str | None]]]]] = deque()

    def read(paths: list[Path], images: np.ndarray) -> list[str | None]:
        return [_read(path, into, fraction) for path, into in zip(paths, images, strict=True)]

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


def _read(path: Path, into: np.ndarray, fraction: float) -> str | None:
    """Writes the image of a file into an array; returns what is wrong with the file, or None."""
    height, width, channels = into.shape
    try:
        into[:] = read_image(path, (height, width, channels), fraction=fraction)
    except UserError as error:
        return str(error)
    return None
