"""TFRecord files with tf.train.Example messages, by the library tfrecord and without TensorFlow.

A file is a sequence of records (tensorflow/core/lib/io/record_writer.h):

    uint64 length, uint32 masked CRC of the length, byte data[length], uint32 masked CRC of the data    (little-endian)
    masked CRC = rotate right by 15 bits (CRC-32C) + 0xa282ead8

The library's own reader goes through a file in order and checks no CRC. Records are therefore read here, and the library reads
their messages.
"""

from __future__ import annotations

import struct
from array import array
from importlib import import_module
from pathlib import Path
from types import ModuleType

from vismt.base.errors import UserError
from vismt.data.copies import shown_path

_HEAD, FOOT = struct.Struct("<QI"), struct.Struct("<I")
_Value = list[bytes] | list[int]


def scan(path: Path) -> array[int]:
    """Return the position of every record of a file. Only lengths and their checksums are read. Raise UserError for damage."""
    positions = array("Q")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            position = 0
            while position < size:
                length = _length(file.read(_HEAD.size), path, len(positions))
                end = position + _HEAD.size + length + FOOT.size
                if end > size:
                    raise _damaged(path, len(positions), f"{end - position:,} bytes, {size - position:,} are there")
                positions.append(position)
                position = end
                file.seek(position)
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read: {error.strerror or error}.") from error
    return positions


def read_example(path: Path, position: int, number: int) -> dict[str, _Value]:
    """Return the features of the record at `position`, the bytes or whole numbers of each. `number` is for errors."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            length = _length(file.read(_HEAD.size), path, number)
            data, foot = file.read(length), file.read(FOOT.size)
    except OSError as error:
        raise UserError(f"{shown_path(path)}: cannot be read: {error.strerror or error}.") from error
    if len(data) < length or len(foot) < FOOT.size:
        raise _damaged(path, number, f"{length:,} bytes, {len(data):,} are there")
    if FOOT.unpack(foot)[0] != _masked_crc(data, path):
        raise _damaged(path, number, "the data does not fit its checksum")
    try:
        features = _library("tfrecord.example_pb2", path).Example.FromString(data).features.feature
    except Exception as error:  # protobuf has its own classes of errors
        raise _damaged(path, number, "not a tf.train.Example") from error
    return {name: [*(value.bytes_list.value or value.int64_list.value)] for name, value in sorted(features.items())}


def _length(head: bytes, path: Path, number: int) -> int:
    if len(head) < _HEAD.size:
        raise _damaged(path, number, "the file ends within its length")
    length, checksum = _HEAD.unpack(head)
    if checksum != _masked_crc(head[:8], path):
        raise _damaged(path, number, "its length does not fit its checksum")
    return int(length)


def _masked_crc(data: bytes, path: Path) -> int:
    value = _library("crc32c", path).crc32c(data)
    return int((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _library(module: str, path: Path) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f'{shown_path(path)}: TFRecord files need tfrecord: pip install "vismt[tfrecord]".') from error


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(
        f"{shown_path(path)}: record {number}: {what}. Replace the file: it is damaged or no TFRecord file."
    )
