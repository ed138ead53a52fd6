"""Test that event files are TensorBoard's: standard checksums, decoded by hand."""

import struct
from pathlib import Path

from aapt_deploy.train.scalars import Events, crc32c, record


def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def records(data: bytes) -> list[bytes]:
    found = []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        body = data[12 : 12 + length]
        assert record(body) == data[: 16 + length]
        found.append(body)
        data = data[16 + length :]
    return found


def fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protocol buffer, as written."""

    def varint() -> int:
        nonlocal data
        value = shift = 0
        while True:
            byte, data = data[0], data[1:]
            value, shift = value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    found: list[tuple[int, int | bytes]] = []
    while data:
        key = varint()
        size = {0: None, 1: 8, 2: -1, 5: 4}[key & 7]
        if size is None:
            found.append((key >> 3, varint()))
            continue
        size = varint() if size < 0 else size
        found.append((key >> 3, data[:size]))
        data = data[size:]
    return found


def inner(found: list[tuple[int, int | bytes]], number: int) -> bytes:
    (value,) = [value for field, value in found if field == number]
    assert isinstance(value, bytes)
    return value


def test_scalars_and_pictures_are_events(tmp_path: Path) -> None:
    events = Events(tmp_path / "run", 40)
    events.scalars(60, {"loss": 0.5, "margin": -3.0})
    events.picture(300, "frames", b"not really a png", 112, 192)
    (path,) = (tmp_path / "run").iterdir()
    assert ".tfevents." in path.name
    version, scalars, picture = map(fields, records(path.read_bytes()))
    assert inner(version, 3) == b"brain.Event:2"
    assert (2, 60) in scalars and (2, 300) in picture
    values = [
        fields(value)
        for field, value in fields(inner(scalars, 5))
        if field == 1 and isinstance(value, bytes)
    ]
    assert [(inner(v, 1), struct.unpack("<f", inner(v, 2))[0]) for v in values] == [
        (b"loss", 0.5),
        (b"margin", -3.0),
    ]
    shown = fields(inner(fields(inner(picture, 5)), 1))
    assert inner(shown, 1) == b"frames"
    assert fields(inner(shown, 4)) == [(1, 112), (2, 192), (3, 3), (4, b"not really a png")]
