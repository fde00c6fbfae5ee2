"""Encoded images to uint8 pixels of one size: decoding, the random crop and the central one.

One rule for every decoder: 8-bit RGB, the first frame, no alpha, turned as the EXIF tag says: all
heights and widths are those that a person sees. Of an image that is evaluated, predicted or served
a network gets what `crop_center` takes.
"""

import contextlib
import functools
import io
import math
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from cnn_jax.data.orientation import SIDEWAYS, orientation_of, png_chunks, turned

cv2.setNumThreads(0)  # each of our own threads makes a whole batch
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # damage is an ImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""What a file's name must end with, in either case, to be taken for an image."""

MAX_PIXELS = 100_000_000
"""A larger image is refused before it is decoded: a few bytes can claim any size."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of the kinds of images that are read, whatever a file's name is."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_BY_LIBJPEG = ("YCbCr", "RGB", "Gray")  # what it converts to RGB, unlike CMYK
_AS_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class ImageError(ValueError):
    """Why an encoded image cannot be used."""


class TooManyPixelsError(ImageError):
    """An image that is larger than is allowed; nothing of it has been decoded."""


@contextlib.contextmanager
def decoders() -> Iterator[None]:
    """Raises ImageError for whatever the bytes of an image led a decoder into."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a kind that can be read") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged ({reason})") from error


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


BoxOf = Callable[[int, int], Box]
"""Returns the part to take of an image of this height and width."""


class _Head(NamedTuple):
    """What the head of an encoded image says of it, as it is stored."""

    height: int
    width: int
    orientation: int
    by_libjpeg: bool

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Returns a height and a width of the stored image as those of the turned, or back."""
        return (width, height) if self.orientation in SIDEWAYS else (height, width)


def size_of(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns the height and width that the header of an encoded image claims, once it is turned.

    Raises ImageError where it is not an image, and TooManyPixelsError for more than `max_pixels`.
    """
    head = _head(data, max_pixels)
    return head.seen(head.height, head.width)


def _head(data: bytes, max_pixels: int = MAX_PIXELS) -> _Head:
    by_libjpeg = False
    with decoders():
        if data.startswith(JPEG):
            told = simplejpeg.decode_jpeg_header(data)
            height, width, by_libjpeg = int(told[0]), int(told[1]), told[2] in _BY_LIBJPEG
        elif data.startswith(PNG):
            width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    if not 0 < height * width <= max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels: must be 1 to {max_pixels:,} in all")
    return _Head(height, width, orientation_of(data), by_libjpeg)


def decode(data: bytes) -> np.ndarray:
    """Returns the pixels, uint8 [h w 3].

    Raises ImageError for damage, as far as its format can tell, and for what `size_of` refuses.
    """
    return _decode(data, _head(data), (0, 0))


def _decode(data: bytes, head: _Head, least: tuple[int, int]) -> np.ndarray:
    """Returns the pixels, of a JPEG at a size of `_reduced` if `least`, as turned, allows."""
    with decoders():
        if head.by_libjpeg:
            height, width = _reduced(head, head.seen(*least))
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
        else:
            data = _pixels_of_png(data) if data.startswith(PNG) else data
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_RGB)
    if pixels is None:
        raise ImageError("damaged, cut short, or of a kind that cannot be read")
    return turned(pixels, head.orientation)


def _reduced(head: _Head, least: tuple[int, int]) -> tuple[int, int]:
    """Returns an eighth, a quarter or a half of the size, down to the least; (0, 0) is all of it.

    libjpeg has every eighth, but its fast transforms are those of 1, 2, 4 and 8 of them: 5, 6 and 7
    take longer than all 8, and 3 longer than 4.
    """
    for divisor in (8, 4, 2):
        height, width = -(-head.height // divisor), -(-head.width // divisor)
        if height >= least[0] > 0 and width >= least[1] > 0:
            return height, width
    return 0, 0


def _pixels_of_png(data: bytes) -> bytes:
    """Returns a PNG with the chunks alone that make its pixels: libpng writes to standard error.

    Raises ImageError where one of them is damaged by its checksum, or the last is not there.
    """
    kept = bytearray(PNG)
    for name, start, end in png_chunks(data):
        if name in _PNG_PIXELS:
            if data[end : end + 4] != zlib.crc32(data[start - 4 : end]).to_bytes(4, "big"):
                raise ImageError(f"damaged or cut short (a PNG's part {name.decode()})")
            kept += data[start - 8 : end + 4]
        if name == b"IEND":
            return bytes(kept)
    raise ImageError("cut short (a PNG without an end)")


def crop(data: bytes, box_of: BoxOf, out: np.ndarray) -> None:
    """Writes a part of an encoded image, resized to fill it, into `out`, uint8 [h w 1 or 3].

    Where that halves the part or more, pixels are averaged; else it is bilinear. One channel is
    grey, `0.299 R + 0.587 G + 0.114 B`.

    Raises what `decode` raises.
    """
    head = _head(data)
    height, width = head.seen(head.height, head.width)
    box = box_of(height, width)
    least = (
        math.ceil(out.shape[0] * height / box.height),
        math.ceil(out.shape[1] * width / box.width),
    )
    pixels = _decode(data, head, least)
    if out.shape[-1] == 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    top, left = int(box.top * down), int(box.left * across)
    rows, columns = max(1, round(box.height * down)), max(1, round(box.width * across))
    part = pixels[top : top + rows, left : left + columns]
    halves = part.shape[0] >= 2 * out.shape[0] and part.shape[1] >= 2 * out.shape[1]
    method = cv2.INTER_AREA if halves else cv2.INTER_LINEAR
    cv2.resize(part, (out.shape[1], out.shape[0]), dst=out, interpolation=method)


def crop_center(data: bytes, out: np.ndarray, *, fraction: float) -> None:
    """Writes the pixels of an encoded image that a network is evaluated on into `out`.

    That is the part of `central_box` in the proportions of `out`, as `crop` takes it: of an image
    of the size of `out`, with fraction 1, the image itself.

    Raises what `decode` raises.
    """
    ratio = out.shape[1] / out.shape[0]
    crop(data, functools.partial(central_box, fraction=fraction, ratio=ratio), out)


def central_box(height: int, width: int, *, fraction: float, ratio: float = 1.0) -> Box:
    """Returns the middle of an image: `fraction` of the sides of the largest part that fits.

    `ratio` is that of its width to its height: 1 is the central square, whose side is that fraction
    of the image's shorter side.
    """
    whole = min(height, width / ratio)
    rows, columns = (max(1, round(fraction * side)) for side in (whole, whole * ratio))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


RATIO = (3 / 4, 4 / 3)
TRIES = 10


def random_box(
    height: int, width: int, *, seed: int, epoch: int, index: int, min_area: float
) -> Box:
    """Returns the box of torchvision's RandomResizedCrop, a function of (seed, epoch, index).

    Its area is uniform between `min_area` and 1 of the image's, the logarithm of its width to
    height uniform between those of `RATIO`; of ten such boxes it is the first that fits, else the
    largest central one within the ratios. Szegedy et al. (2014), 1409.4842.
    """
    # A counter apart from that of the epochs' orders. NumPy keeps the raw stream for ever.
    key = np.array([seed, epoch << 32 | index], np.uint64)
    raw = np.random.Philox(key=key, counter=1 << 192).random_raw(4 * TRIES)
    uniform = ((raw >> 11) * 2.0**-53).tolist()
    low, high = (math.log(ratio) for ratio in RATIO)
    for a, r, y, x in zip(*[iter(uniform)] * 4, strict=True):
        area = height * width * (min_area + (1 - min_area) * a)
        ratio = math.exp(low + (high - low) * r)
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return Box(int(y * (height - rows + 1)), int(x * (width - columns + 1)), rows, columns)
    rows = min(height, round(width / RATIO[0]))
    columns = min(width, round(height * RATIO[1]))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def shrink(data: bytes, shorter_side: int, *, quality: int) -> bytes:
    """Returns an image whose shorter side is `shorter_side` pixels at most, as JPEG if it had more.

    Raises what `decode` raises.
    """
    height, width = size_of(data)
    pixels = decode(data)  # in any case, to meet damage here rather than in a training
    factor = shorter_side / min(height, width)
    if factor >= 1:
        return data
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    smaller = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(smaller, quality=quality)
