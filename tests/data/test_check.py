"""check, prepare and listing: each defect of a copy has its state."""

from __future__ import annotations

import hashlib

import pytest

from vismt.data.cards import list_cards, load_card
from vismt.data.check import check, listing, prepare
from vismt.data.manifest import digest, write_manifest
from vismt.errors import UserError


def with_manifest(card_path) -> None:
    """Record the hashes of the pets set and name the manifest in its card."""
    card = load_card(card_path)
    data = card_path.parents[2] / "data" / "pets"
    write_manifest(card_path.parent / "manifest.json", card.sources[0].list_files(data))
    card_path.write_text(card_path.read_text().replace("test: 2}}", "test: 2}, manifest: manifest.json}"))


@pytest.fixture
def recorded(pets):
    with_manifest(pets)
    return pets


def test_digest_by_hand(tmp_path):
    (tmp_path / "a").write_bytes(b"A")
    (tmp_path / "b").write_bytes(b"B")
    lines = "".join(f"{n}\t{hashlib.sha256(c).hexdigest()}\n" for n, c in (("x/a", b"A"), ("x/b", b"B")))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    group = digest([("x/b", tmp_path / "b"), ("x/a", tmp_path / "a")])
    assert (group.count, group.sha256) == (2, expected)


def test_whole_copy(recorded):
    report = check(recorded)
    assert report.ok and report.images == 5 and len(report.groups) == 4
    assert str(report).endswith("pets: ok: 5 images, 2 classes, 4 hashes agree, under $VISMT_DATA/pets")


def test_short_missing_changed_extra(home, paint, recorded):
    base = home / "data" / "pets"
    (base / "train" / "cat" / "b.png").unlink()
    (base / "test" / "cat" / "a.png").unlink()
    (base / "test" / "cat").rmdir()
    paint(base / "test" / "dog" / "a.png", 99)
    paint(base / "train" / "eel" / "a.png")
    report = check(recorded)
    assert {row.group: row.state for row in report.groups} == {
        "train/cat": "short", "test/cat": "missing", "test/dog": "changed", "train/dog": "ok", "train/eel": "extra",
    }  # fmt: skip
    text = str(report)
    assert not report.ok and "4 of 5 images found under $VISMT_DATA/pets" in text and "\n" not in text
    assert "short 'train/cat' (1 of 2)" in text and "changed 'test/dog'" in text and "See " in text


def test_same_size_other_bytes_is_changed(home, recorded):
    path = home / "data" / "pets" / "test" / "dog" / "a.png"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [row.group for row in check(recorded).groups if row.state != "ok"] == ["test/dog"]


def test_opening_a_short_copy_names_the_class(home, recorded):
    from vismt.data.images import open_images

    (home / "data" / "pets" / "train" / "cat" / "b.png").unlink()
    with pytest.raises(UserError, match=r"2 of 3 images found .*\(split 'train'\); 'train/cat' has 1 of 2"):
        open_images(recorded, "train")


def test_empty_class_is_a_report_not_a_crash(home, recorded):
    (home / "data" / "pets" / "train" / "dog" / "a.png").unlink()
    report = check(recorded)
    assert not report.ok and "train/dog" in str(report) and "holds no image" in report.problem


def test_absent_set(home):
    report = check("cifar100")
    assert not report.ok and report.where is None and report.splits[0].state == "missing"
    assert "`vismt data prepare cifar100` downloads it" in str(report)


def test_prepare_checks_what_cannot_be_downloaded_but_is_here(recorded):
    assert prepare(recorded).ok


def test_manifest_of_another_shape(recorded):
    (recorded.parent / "manifest.json").write_text('{"train/cat": 3}')
    with pytest.raises(UserError, match=r"manifest.json: must map a group to \[count, sha256\]"):
        check(recorded)


def test_listing_has_a_row_per_card(home):
    rows = {row.name: row for row in listing()}
    assert sorted(rows) == list_cards()
    assert rows["cifar100"].where == "-" and rows["cifar100"].images == 8000 and rows["cifar100"].classes == 100
    assert rows["pcam"].kind == "torchvision" and rows["pcam"].images == 262144 + 2 * 32768


def test_check_of_a_dense_set(home, paint, write_card):
    import numpy as np
    from PIL import Image

    paint(home / "data" / "d" / "train" / "rgb" / "1.png")
    (home / "data" / "d" / "train" / "label").mkdir()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(home / "data" / "d" / "train" / "label" / "1.png")
    source = '  - {kind: dense, root: d, image: "{split}/rgb", maps: {label: "{split}/label"}, splits: {train: 1}}'
    path = write_card(source)
    assert check(path).ok
    (home / "data" / "d" / "train" / "label" / "1.png").unlink()
    report = check(path)
    assert not report.ok and "has no label file" in report.problem
