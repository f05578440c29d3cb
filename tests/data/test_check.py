"""check, prepare and listing: each defect of a copy has its state."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torchvision
from PIL import Image

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.cards import list_cards, load_card
from vismt.data.check import check, listing, prepare, record
from vismt.data.copies import digest_files
from vismt.data.fetching import fetch
from vismt.data.formats.folder import FolderSource
from vismt.data.images import open_images


@pytest.fixture
def recorded(pets):
    """The pets set with a manifest that its card names."""
    pets.write_text(pets.read_text().replace("test: 2}}", "test: 2}, manifest: manifest.json}"))
    record(pets)
    return pets


def test_record_needs_a_copy_and_a_manifest(home, pets, capsys):
    assert main(["data", "record", str(pets)]) == 2 and "names no manifest" in capsys.readouterr().err
    pets.write_text(pets.read_text().replace("test: 2}}", "test: 2}, manifest: manifest.json}"))
    assert main(["data", "record", str(pets)]) == 0 and check(pets).ok
    shutil.rmtree(home / "data" / "pets")
    assert main(["data", "record", str(pets)]) == 2 and "pets" in capsys.readouterr().err
    assert main(["data", "record"]) == 2 and "data record: name a card" in capsys.readouterr().err


def test_digest_by_hand(tmp_path):
    (tmp_path / "a").write_bytes(b"A")
    (tmp_path / "b").write_bytes(b"B")
    lines = "".join(f"{n}\t{hashlib.sha256(c).hexdigest()}\n" for n, c in (("x/a", b"A"), ("x/b", b"B")))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    group = digest_files([("x/b", tmp_path / "b"), ("x/a", tmp_path / "a")])
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


def test_a_copy_that_states_to_be_a_part(home, recorded):
    base = home / "data" / "pets"
    (base / "train" / "cat" / "b.png").unlink()
    assert not check(recorded).ok
    (base / "subset.yaml").write_text("train: 2\n")
    report = check(recorded)
    assert report.ok and report.images == 4 and str(report).split(": ")[-1].startswith("4 images, 2 classes, no hashes")
    assert len(open_images(recorded, "train").ids) == 2 and len(open_images(recorded).ids) == 4
    (base / "subset.yaml").write_text("train: 1\n")  # what is stated is verified
    with pytest.raises(UserError, match=r"2 of 1 images found .*split 'train'"):
        open_images(recorded, "train")


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("trian: 2", "pets/subset.yaml': no split 'trian'. Near: 'train'"),
        ("train: 4", "train: 4; give the number of images, at least 1 and at most 3."),
        ("train: 0", "train: 0; give"),
        ("train: null", "train: None; give"),
        ("[train]", "subset.yaml'"),
    ],
)
def test_a_statement_that_cannot_be(home, recorded, stated, words):
    (home / "data" / "pets" / "subset.yaml").write_text(stated)
    with pytest.raises(UserError) as caught:
        open_images(recorded)
    assert words in str(caught.value) and "\n" not in str(caught.value)


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


def test_prepare_checks_what_cannot_be_downloaded_but_is_here(recorded):
    assert prepare(recorded).ok


def test_manifest_of_another_shape(recorded):
    (recorded.parent / "manifest.json").write_text('{"train/cat": 3}')
    with pytest.raises(UserError, match=r"manifest.json: must map a group to \[count, sha256\]"):
        check(recorded)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "truncated", "cut"])
def test_decoding_finds_what_counts_do_not(home, pets, content):
    path = home / "data" / "pets" / "train" / "cat" / "b.png"
    path.write_bytes(path.read_bytes()[:45] if content is None else content)
    report = check(pets)
    assert not report.ok and [(row.group, row.state) for row in report.damaged] == [("train/cat/b.png", "damaged")]
    assert "5 of 5 images found" in str(report) and "damaged 'train/cat/b.png'" in str(report)
    assert check(pets, decode=False).ok


class Downloaded:
    """Stands for torchvision's EuroSAT: an archive whose checksum is its text, and a file for each image from it."""

    classes = ("cat", "dog")
    archive = "whole"
    fetched: ClassVar[list[str]] = []

    def __init__(self, root, transform=None, target_transform=None, download=False):
        self.root, self.targets = Path(root), [0, 1, 1]
        archive = self.root / "images.zip"
        if download and not (archive.is_file() and archive.read_text() == "whole"):
            self.fetched.append(str(self.root))
            archive.write_text(self.archive)
        if download:
            for i in range(3):
                Image.new("L", (2, 2), i).save(self.root / f"{i}.png")
        if not archive.is_file():
            raise RuntimeError("Dataset not found or corrupted.")
        if archive.read_text() != "whole":
            self.targets.pop()

    def __getitem__(self, i):
        return Image.open(self.root / f"{i}.png"), self.targets[i]


@pytest.fixture
def eurosat(monkeypatch, write_card):
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Downloaded)
    monkeypatch.setattr(Downloaded, "fetched", [])
    return write_card("  - {kind: torchvision, dataset: EuroSAT, root: e, splits: {all: 3}}")


def test_prepare_mends_half_a_set(home, eurosat, monkeypatch):
    root = home / "cache" / "torchvision"
    base = root / "e"
    assert prepare(eurosat).ok and len(Downloaded.fetched) == 1
    assert base != Path(Downloaded.fetched[0]) and not list(root.glob(".e.part-*"))  # fetched beside, then moved
    (base / "mine.txt").write_text("mine")
    (base / "1.png").unlink()
    (base / "2.png").write_bytes(b"")
    (root / ".e.part-killed").mkdir()
    (root / ".e.part-killed" / "images.zip").touch()
    assert not check(eurosat).ok
    assert prepare(eurosat).ok and check(eurosat).ok
    assert len(Downloaded.fetched) == 1  # the archive was whole
    assert not list(root.glob(".e.part-*")) and (base / "mine.txt").read_text() == "mine"
    (base / "images.zip").write_text("ha")
    assert not check(eurosat).ok and prepare(eurosat).ok and len(Downloaded.fetched) == 2
    # A complete set is not fetched again, not even opened for it.
    monkeypatch.setattr(Downloaded, "archive", "none")
    (root / ".e.part-killed").mkdir()
    assert prepare(eurosat).ok and len(Downloaded.fetched) == 2 and not list(root.glob(".e.part-*"))


def test_prepare_of_a_set_that_stays_incomplete_exits_1(home, eurosat, monkeypatch, capsys):
    monkeypatch.setattr(Downloaded, "archive", "half")
    assert main(["data", "prepare", str(eurosat)]) == 1
    assert "`vismt data prepare" in capsys.readouterr().out
    monkeypatch.setattr(Downloaded, "archive", "whole")
    assert main(["data", "prepare", str(eurosat)]) == 0


def test_a_download_that_breaks_off_leaves_the_copy_as_it_was(home, eurosat, monkeypatch):
    base = home / "cache" / "torchvision" / "e"
    assert prepare(eurosat).ok
    (base / "2.png").write_bytes(b"")
    before = {path.name: path.read_bytes() for path in base.iterdir()}

    def save(self, path):
        raise OSError("the connection was reset")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match=r"could not download EuroSAT .*connection was reset"):
        prepare(eurosat)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert sorted(path.name for path in base.parent.iterdir()) == [".e.lock", "e"]


def test_prepare_adds_to_a_folder_of_the_user_and_replaces_nothing(home, tmp_path, monkeypatch, write_card):
    source = MineSource(splits={"all": 2}, root="mine")
    base = home / "data" / "mine"
    base.mkdir()
    (base / "a.txt").write_text("the user's")
    fetch(load_card(write_card(CARD)), source, base, lambda: False)
    assert {path.name: path.read_text() for path in base.iterdir()} == {"a.txt": "the user's", "b.txt": "fetched"}


CARD = '  - {kind: folder, root: mine, layout: "{class}", splits: {all: 2}}'


class MineSource(FolderSource):
    """Two files, downloaded."""

    def __init__(self, **values):
        super().__init__(layout="{class}", **values)

    def download(self, card, base):
        for name in ("a.txt", "b.txt"):
            (base / name).write_text("fetched")


def test_listing_has_a_row_per_card(home):
    rows = {row.name: row for row in listing()}
    assert sorted(rows) == list_cards()
    assert rows["cifar100"].where == "-" and rows["cifar100"].images == 60000 and rows["cifar100"].classes == 100
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
