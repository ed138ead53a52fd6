"""Write curves and pictures for TensorBoard, without TensorBoard.

Its event files are simple, and the package brings 40 MB of others.

A file is a row of records (TFRecord, little-endian):

    length u64 | masked crc32c of it | data | masked crc32c of that

The data is a protocol buffer:

    Event   {1: wall_time double, 2: step int64, 3: file_version string, 5: Summary}
    Summary {1: repeated Value}
    Value   {1: tag string, 2: float, 4: Image}
    Image   {1: height, 2: width, 3: channels, 4: encoded bytes}

A record is written at once, and a resumed run opens another file, so a killed one loses nothing.
"""

import struct
import time
from collections.abc import Mapping
from pathlib import Path

POLYNOMIAL = 0x82F63B78  # CRC-32C, reflected


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


class Events:
    """One event file of a run, in folder `run`, from update `step` on."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / f"events.out.tfevents.{step:010d}.{time.time_ns()}"
        self._write(0, _bytes(3, b"brain.Event:2"))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """A point on each curve."""
        values = [
            _bytes(1, name.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", figure)
            for name, figure in figures.items()
        ]
        self._write(step, _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def picture(self, step: int, name: str, png: bytes, height: int, width: int) -> None:
        """A PNG of three channels."""
        image = _integer(1, height) + _integer(2, width) + _integer(3, 3) + _bytes(4, png)
        self._write(step, _bytes(5, _bytes(1, _bytes(1, name.encode()) + _bytes(4, image))))

    def _write(self, step: int, content: bytes) -> None:
        event = _varint(1 << 3 | 1) + struct.pack("<d", time.time()) + _integer(2, step) + content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(record(event))
