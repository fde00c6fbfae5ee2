"""TensorBoard's event files, as far as scalars need them.

A file is a sequence of records, each with its length and checksums, and a record is a protocol
buffer `Event` of tensorflow/core/util/event.proto. The packages that write them queue their
events, so that a kill takes some along, and take a second to load.
"""

import functools
import platform
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from cnn_jax.runtime.files import GrowingFile
from cnn_jax.storage import is_remote

_START = 1  # SessionLog.SessionStatus


class EventFile:
    """An event file whose rows are on their way to the disk when `write` returns."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        """Begins a file that declares void what earlier files have from `first_step` on."""
        if not is_remote(directory):
            directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}"
        self._file = GrowingFile(directory / name)
        self._add(_bytes(3, b"brain.Event:2"))  # file_version
        self._add(_integer(2, first_step) + _bytes(7, _integer(1, _START)))  # session_log

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values as scalars."""
        scalars = (
            _bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items()
        )
        self._add(_integer(2, step) + _bytes(5, b"".join(scalars)))  # summary

    def sync(self) -> None:
        """Returns when all rows survive the end of this machine."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _add(self, contents: bytes) -> None:
        event = _tag(1, 1) + struct.pack("<d", time.time()) + contents
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _integer(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    return _tag(number, 5) + struct.pack("<f", value)


@functools.cache
def _table() -> list[int]:
    """Returns the remainders of all bytes: CRC-32C, reflected."""

    def remainder(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return [remainder(value) for value in range(256)]


def _checksum(data: bytes) -> bytes:
    """Returns the CRC-32C, rotated and shifted as in tensorflow/core/lib/hash/crc32c.h."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[crc & 0xFF ^ byte]
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)
