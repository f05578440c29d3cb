"""TFRecord files: checksums, and messages of every kind."""

from __future__ import annotations

from helpers.tfrecords import example, masked, record

from vismt.data.formats.tfrecords import crc32c, masked_crc, read_example, scan


def test_checksums_of_the_standard():
    # RFC 3720, B.4: 32 zeros, 32 ones, rising and falling bytes; and the usual check value.
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0
    for data in (b"", b"a", bytes(range(200))):
        assert masked_crc(data) == masked(data)


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
