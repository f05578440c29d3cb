"""TFRecord files of Meta-Dataset's conversion: checksums, messages, and what is said of damage, with file and record."""

from __future__ import annotations

import json
import os

import pytest
from helpers.tfrecords import encoded, example, masked, record, write_class

from vismt.base.errors import UserError
from vismt.data.cards import load_card
from vismt.data.check import check
from vismt.data.formats.tfrecords import crc32c, masked_crc, read_example, scan
from vismt.data.images import open_images
from vismt.storage.paths import shipped

NAMES = ["oak", "ash", "elm", "F/A-18", "yew"]
SPEC = {
    "name": "toy", "classes_per_split": {"TRAIN": 2, "VALID": 1, "TEST": 2}, "file_pattern": "{}.tfrecords",
    "images_per_class": {str(k): 2 for k in range(5)}, "class_names": {str(k): name for k, name in enumerate(NAMES)},
}  # fmt: skip


@pytest.fixture
def domain(home, write_card):
    """A card over data/md with two images of every class, and the folder."""
    base = home / "data" / "md"
    for k in range(5):
        write_class(base / f"{k}.tfrecords", k, [10 * k, 10 * k + 1])
    (base / "dataset_spec.json").write_text(json.dumps(SPEC))
    source = "kind: meta_dataset, root: md, classes_per_split: {train: 2, valid: 1, test: 2}"
    card = write_card(f"  - {{{source}, splits: {{train: null, valid: null, test: null}}}}", classes=5, name="toy")
    return card, base


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


def test_splits_follow_the_spec_and_images_are_those_written(domain):
    card, _ = domain
    test = open_images(card, "test")
    assert test.labels.tolist() == [3, 3, 4, 4] and test.classes == NAMES
    assert test.ids == ["3.tfrecords/0", "3.tfrecords/1", "4.tfrecords/0", "4.tfrecords/1"]
    assert [int(test.read(i)[0, 0, 0]) for i in (3, 0, 2, 1)] == [41, 30, 40, 31]
    assert test.read(0).shape == (3, 5, 6)
    assert open_images(card, "train").labels.unique().tolist() == [0, 1] and len(open_images(card)) == 10


def test_jpeg_is_decoded_and_needs_no_h5py(domain, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    card, base = domain
    write_class(base / "2.tfrecords", 2, [200, 100], form="JPEG")
    valid = open_images(card, "valid")
    assert [abs(int(valid.read(i)[1, 2, 3]) - value) <= 2 for i, value in enumerate((200, 100))] == [True, True]


def test_without_the_spec_the_card_counts(domain):
    card, base = domain
    (base / "dataset_spec.json").unlink()
    write_class(base / "4.tfrecords", 4, [1, 2, 3])
    test = open_images(card, "test")
    assert test.labels.tolist() == [3, 3, 4, 4, 4] and test.classes == ["0", "1", "2", "3", "4"]


def test_check_counts_and_content_follows_the_files(domain):
    card, base = domain
    report = check(card)
    assert report.ok and report.images == 10, str(report)
    before = open_images(card, "test").content()
    write_class(base / "4.tfrecords", 4, [7, 8], form="JPEG")
    changed = open_images(card, "test").content()
    assert changed != before
    path = base / "4.tfrecords"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as unpacking an archive does
    assert open_images(card, "test").content() != changed
    path.write_bytes(content)
    source = load_card(card).sources[0]
    assert list(source.list_files(base)) == [*(f"{k}.tfrecords" for k in range(5)), "dataset_spec.json"]
    (base / "0.tfrecords").unlink()
    message = str(check(card).problem)
    assert "class 0 ('oak', split 'train') has neither '0.h5' nor '0.tfrecords' nor a folder" in message


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


GOOD = record(example({"image": [encoded(1)], "label": [3]}))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (flip(GOOD, 0), "record 1: its length does not fit its checksum"),
        (flip(GOOD, 9), "record 1: its length does not fit its checksum"),
        (GOOD[:-1], r"record 1: [\d,]+ bytes, [\d,]+ are there"),
        (GOOD[:30], r"record 1: [\d,]+ bytes, 30 are there"),
        (GOOD[:7], "record 1: the file ends within its length"),
    ],
)
def test_damaged_framing_is_seen_when_the_set_is_opened(domain, second, message):
    card, base = domain
    (base / "3.tfrecords").write_bytes(GOOD + second)
    with pytest.raises(UserError, match=rf"^\$VISMT_DATA/md/3.tfrecords: {message}") as caught:
        open_images(card, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (flip(GOOD, 40), "the data does not fit its checksum"),
        (flip(GOOD, len(GOOD) - 1), "the data does not fit its checksum"),
        (record(b"\x0a\x05abc"), r"not a tf.train.Example \(a field ends beyond its message\)"),
        (record(b"\x0b\x01"), r"not a tf.train.Example \(wire type 3\)"),
        (record(b"\x0a\x02\x0a\x80"), "not a tf.train.Example"),
        (record(b"\x80" * 12), r"not a tf.train.Example \(a number longer"),
        (record(b"\x08\x01"), r"not a tf.train.Example \(field 1 is a number"),
        (
            record(example({"img": [b"x"], "label": [3]})),
            "needs one 'image' of type bytes; its features are 'img', 'label'",
        ),
        (record(example({"image": [encoded(1)]})), "needs one 'label' of type int; its features are 'image'"),
        (record(example({"image": [encoded(1)] * 2, "label": [3]})), "needs one 'image'"),
        (record(example({"image": [5], "label": [3]})), "needs one 'image' of type bytes"),
        (record(b""), "needs one 'image' of type bytes; its features are nothing"),
        (record(example({"image": [encoded(1)], "label": [4]})), "has label 4, its file is that of class 3"),
        (record(example({"image": [b"no image"], "label": [3]})), "cannot be decoded"),
    ],
)
def test_a_damaged_record_is_named_when_it_is_read(domain, second, message):
    card, base = domain
    (base / "3.tfrecords").write_bytes(GOOD + second)
    test = open_images(card, "test")
    assert int(test.read(0)[0, 0, 0]) == 1
    with pytest.raises(UserError, match=rf"^\$VISMT_DATA/md/3.tfrecords: record 1: .*{message}") as caught:
        test.read(1)
    assert "\n" not in str(caught.value)
    kept = open_images(card, "test", on_bad_sample="skip")
    assert kept.skipped == ["3.tfrecords/1"] and kept.labels.tolist() == [3, 4, 4]


def test_another_number_of_records_than_the_spec_says(domain):
    card, base = domain
    (base / "3.tfrecords").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"3.tfrecords: holds 1 of 2 images"):
        open_images(card, "test")
    (base / "3.tfrecords").write_bytes(b"")
    with pytest.raises(UserError, match=r"3.tfrecords: holds 0 of 2 images"):
        open_images(card, "test")


@pytest.mark.parametrize("path", sorted(shipped("datasets").glob("md_*")), ids=lambda path: path.name)
def test_every_card_says_where_its_records_lie(path):
    card = load_card(path.name)
    first, second = card.sources[:2]
    assert second.root == first.root.replace("meta_dataset_h5", "meta_dataset_tfrecords")
    assert (second.splits, second.classes_per_split, second.hierarchy) == (
        first.splits,
        first.classes_per_split,
        first.hierarchy,
    )
    assert f"$VISMT_DATA/{second.root}" in " ".join(card.how_to_get.split())
