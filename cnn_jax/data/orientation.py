"""The EXIF orientation of encoded images, read without a decoder: it is asked of every image."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

SIDEWAYS = (5, 6, 7, 8)
"""Orientations whose pixels lie with rows for columns."""

_TAG = 0x0112
_SHORT = 3  # the type of its value: 2 bytes
_EXIF, _APP1 = b"Exif\0\0", b"\xe1"
_NAMES = (_APP1, b"eXIf", b"EXIF")  # of what holds EXIF in a JPEG, a PNG and a WEBP
_PIXELS_FOLLOW = (b"\xc0", b"\xc1", b"\xc2", b"\xd9", b"\xda")  # markers that end a JPEG's head

Part = tuple[bytes, int, int]
"""Of a file: its name, and where its contents begin and end."""

_TURNS: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns pixels [h w c] as a person should see them, of those that lie as `orientation` says.

    The result is contiguous; with orientation 1 it is `pixels` itself.
    """
    return np.ascontiguousarray(_TURNS[orientation](pixels))


def orientation_of(data: bytes) -> int:
    """Returns the EXIF orientation of a JPEG, a PNG or a WEBP, 1 to 8.

    It is 1 where none is said, or what says it is damaged. EXIF 2.32 (CIPA DC-008), 4.6.4.
    """
    if data.startswith(b"\xff\xd8"):
        parts = _jpeg_segments(data)
    elif data.startswith(b"\x89PNG"):
        parts = png_chunks(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        parts = _riff_chunks(data)
    else:
        return 1
    for name, start, end in parts:
        if name in _NAMES and (name != _APP1 or data.startswith(_EXIF, start)):
            return _orientation_in(data[start:end].removeprefix(_EXIF))
    return 1


def _jpeg_segments(data: bytes) -> Iterator[Part]:
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) > at + 4:
        marker = data[at + 1 : at + 2]
        if marker in _PIXELS_FOLLOW:
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        at = end


def png_chunks(data: bytes) -> Iterator[Part]:
    """Yields the chunks of a PNG, behind its signature; of one cut short the last ends too late."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4  # a checksum


def _riff_chunks(data: bytes) -> Iterator[Part]:
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, end
        at = end + end % 2


def _orientation_in(tiff: bytes) -> int:
    order = "little" if tiff.startswith(b"II*\0") else "big"
    if order == "big" and not tiff.startswith(b"MM\0*"):
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    start = number(4, 4)
    entries = range(start + 2, min(start + 2 + 12 * number(start, 2), len(tiff) - 11), 12)
    for at in entries:
        if number(at, 2) == _TAG and number(at + 2, 2) == _SHORT:
            found = number(at + 8, 2)
            return found if found in _TURNS else 1
    return 1
