"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A file is a sequence of records (tensorflow/core/lib/io/record_writer.h):

    uint64 length, uint32 masked CRC of the length, byte data[length], uint32 masked CRC of the data    (little-endian)
    masked CRC = rotate right by 15 bits (CRC-32C) + 0xa282ead8

The data is an Example in the wire format of Protocol Buffers (tensorflow/core/example/example.proto, feature.proto):

    Example {1: Features {1: repeated entry {1: key, 2: Feature {1: BytesList | 2: FloatList | 3: Int64List {1: values}}}}}

Floats are skipped: no reader here needs them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from vismt.base.errors import UserError
from vismt.data.copies import shown_path

HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")
MASK = 0xFFFFFFFF
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
Value = list[bytes] | list[int]


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of `data`."""
    value = MASK
    for byte in data:
        value = value >> 8 ^ CRC_TABLE[(value ^ byte) & 0xFF]
    return value ^ MASK


def masked_crc(data: bytes) -> int:
    """Return the checksum of `data` as TFRecord files hold it."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & MASK


def scan(path: Path) -> array[int]:
    """Return the position of every record of a file; only lengths and their checksums are read. Raises UserError for damage."""
    positions = array("Q")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            position = 0
            while position < size:
                length = _length(file.read(HEAD.size), path, len(positions))
                end = position + HEAD.size + length + FOOT.size
                if end > size:
                    raise _damaged(path, len(positions), f"{end - position:,} bytes, {size - position:,} are there")
                positions.append(position)
                position = end
                file.seek(position)
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read: {error.strerror or error}.") from error
    return positions


def read_example(path: Path, position: int, number: int) -> dict[str, Value]:
    """Return the features of the record at `position`, the bytes or whole numbers of each; `number` is for errors."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            length = _length(file.read(HEAD.size), path, number)
            data, foot = file.read(length), file.read(FOOT.size)
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read: {error.strerror or error}.") from error
    if len(data) < length or len(foot) < FOOT.size:
        raise _damaged(path, number, f"{length:,} bytes, {len(data):,} are there")
    if FOOT.unpack(foot)[0] != masked_crc(data):
        raise _damaged(path, number, "the data does not fit its checksum")
    try:
        return dict(_features(data))
    except (ValueError, IndexError) as error:
        raise _damaged(path, number, f"not a tf.train.Example ({error})") from error


def _length(head: bytes, path: Path, number: int) -> int:
    if len(head) < HEAD.size:
        raise _damaged(path, number, "the file ends within its length")
    length, checksum = HEAD.unpack(head)
    if checksum != masked_crc(head[:8]):
        raise _damaged(path, number, "its length does not fit its checksum")
    return length


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(
        f"{shown_path(path)}: record {number}: {what}. Replace the file: it is damaged or no TFRecord file."
    )


def _features(data: bytes) -> Iterator[tuple[str, Value]]:
    for features in _delimited(data, 1):
        for entry in _delimited(features, 1):
            (key,) = _delimited(entry, 1)
            for feature in _delimited(entry, 2):
                yield key.decode(), _values(feature)


def _values(feature: bytes) -> Value:
    for values in _delimited(feature, 1):
        return _delimited(values, 1)
    for values in _delimited(feature, 3):
        return [_signed(number) for value in _fields(values, 1) for number in _numbers(value)]
    return []


def _numbers(value: int | bytes) -> Iterator[int]:
    """Yield the numbers of one field: itself, or all of a packed one."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _delimited(data: bytes, wanted: int) -> list[bytes]:
    """Return the values of the field `wanted` of a message; each must be text, bytes or a message."""
    values = _fields(data, wanted)
    if any(isinstance(value, int) for value in values):
        raise ValueError(f"field {wanted} is a number")
    return [value for value in values if isinstance(value, bytes)]


def _fields(data: bytes, wanted: int) -> list[int | bytes]:
    """Return the values of the field `wanted` of a message in order; other fields are passed over."""
    values: list[int | bytes] = []
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == VARINT:
            value, position = _varint(data, position)
        elif wire in (DELIMITED, FIXED64, FIXED32):
            length = {FIXED64: 8, FIXED32: 4}.get(wire)
            if length is None:
                length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError("a field ends beyond its message")
        else:
            raise ValueError(f"wire type {wire}")
        if number == wanted:
            values.append(value)
    return values


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position`, seven bits a byte from the lowest, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")
