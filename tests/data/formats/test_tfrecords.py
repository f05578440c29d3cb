"""TFRecord files: messages of every kind, and files of another writer."""

from __future__ import annotations

import sys

import pytest
from helpers.tfrecords import example, record

from vismt.base.errors import UserError
from vismt.data.formats.tfrecords import read_example, scan

tfrecord = pytest.importorskip("tfrecord")


def test_features_of_every_kind(tmp_path):
    path = tmp_path / "a.tfrecords"
    features = {"image": [b"\x00" * 300, b""], "label": [0, 127, 128, 2**63 - 1, -5], "weight": [1.5, 2.5], "empty": []}
    path.write_bytes(record(example(features)) + record(example(features, packed=False)) + record(b""))
    positions = scan(path)
    for number in (0, 1):
        read = read_example(path, positions[number], number)
        assert read == {**features, "weight": []}
    assert len(positions) == 3 and read_example(path, positions[2], 2) == {}
    (tmp_path / "none").write_bytes(b"")
    assert len(scan(tmp_path / "none")) == 0


def test_a_file_of_the_writer_of_the_library(tmp_path):
    path = tmp_path / "a.tfrecords"
    writer = tfrecord.TFRecordWriter(str(path))
    for number in range(3):
        writer.write({"image": (bytes([number]) * 40, "byte"), "label": (number, "int")})
    writer.close()
    found = [read_example(path, position, number) for number, position in enumerate(scan(path))]
    assert found == [{"image": [bytes([number]) * 40], "label": [number]} for number in range(3)]


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.tfrecords"
    path.write_bytes(record(b""))
    monkeypatch.setitem(sys.modules, "crc32c", None)
    with pytest.raises(UserError, match=r'TFRecord files need tfrecord: pip install "vismt\[tfrecord\]"'):
        scan(path)
