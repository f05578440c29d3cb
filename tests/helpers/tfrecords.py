"""A writer of TFRecord files of tf.train.Example messages: the format written down a second time, bit by bit."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def masked(data: bytes) -> int:
    """Return the masked CRC-32C, by division of the polynomial one bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            feedback = (register ^ byte >> bit) & 1
            register = register >> 1 ^ feedback * 0x82F63B78
    register ^= 0xFFFFFFFF
    return (((register & 0x7FFF) << 17 | register >> 15) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    """Return a number in base 128, lowest digits first; negative ones as 64-bit two's complement."""
    number %= 2**64
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(number & 0x7F)
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


def field(number: int, content: bytes | int) -> bytes:
    """Return a field of a message: a number, or text, bytes or another message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Mapping[str, Sequence[bytes] | Sequence[int] | Sequence[float]], packed: bool = True) -> bytes:
    """Return an Example; a feature's list is of bytes, floats or whole numbers."""
    entries = b""
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            kind, content = 1, b"".join(field(1, value) for value in values)
        elif values and isinstance(values[0], float):
            kind, content = 2, field(1, struct.pack(f"<{len(values)}f", *values))
        elif packed:
            kind, content = 3, field(1, b"".join(varint(value) for value in values))
        else:
            kind, content = 3, b"".join(field(1, value) for value in values)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, content)))
    return field(1, entries)


def record(data: bytes) -> bytes:
    """Return a record with its length and checksums."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def encoded(value: int, size: tuple[int, int] = (6, 5), form: str = "PNG") -> bytes:
    """Return an image file of one grey value, (width, height) = size."""
    file = BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(file, form)
    return file.getvalue()


def write_class(path: Path, label: int, values: Sequence[int], **options: str) -> None:
    """Write the images of one class as Meta-Dataset's conversion does, with an id as its later versions have."""
    pytest.importorskip("tfrecord")
    path.parent.mkdir(parents=True, exist_ok=True)
    features = (
        {"image": [encoded(value, form=options.get("form", "PNG"))], "label": [label], "id": [b"name"]}
        for value in values
    )
    path.write_bytes(b"".join(record(example(item)) for item in features))
