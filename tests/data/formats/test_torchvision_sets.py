"""torchvision sources against stand-ins for its classes: nothing is downloaded."""

from __future__ import annotations

import inspect
import json
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from vismt.base.errors import UserError
from vismt.base.seeds import digest
from vismt.data.check import check, prepare
from vismt.data.formats.torchvision_sets import LAYOUTS, MEMBER_DIGITS
from vismt.data.images import open_images

CIFAR = "  - {kind: torchvision, dataset: CIFAR10, root: c, splits: {train: 3, test: 2}}"


class FakeCifar:
    """Behaves as torchvision's CIFAR10: `train` picks the split, RuntimeError when it is not there."""

    classes = ("cat", "dog")
    calls: ClassVar[list[bool]] = []

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        from pathlib import Path

        self.calls.append(download)
        marker = Path(root) / "files"
        if download:
            marker.touch()
        if not marker.exists():
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.targets = [1, 0, 1] if train else [0, 1]
        self.data = np.stack([np.full((4, 4, 3), value, np.uint8) for value in ((1, 2, 3) if train else (4, 5))])

    def __getitem__(self, i):
        return Image.new("RGB", (4, 4), (10 * i, 0, 0)), self.targets[i]


@pytest.fixture
def cifar(monkeypatch, write_card):
    FakeCifar.calls = []
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    return write_card(CIFAR)


def test_every_layout_matches_the_real_constructor():
    for name, layout in LAYOUTS.items():
        parameters = inspect.signature(getattr(torchvision.datasets, name).__init__).parameters
        for arguments in layout.splits.values():
            assert {"root", "download", *arguments} <= set(parameters), name


def test_download_then_found_without(home, cifar):
    with pytest.raises(
        UserError, match=r"nothing found under \$VISMT_CACHE/torchvision/c. `vismt data prepare .*` downloads it"
    ):
        open_images(cifar, "train")
    train = open_images(cifar, "train", download=True)
    assert train.labels.tolist() == [1, 0, 1] and train.classes == ["cat", "dog"]
    assert train.ids == ["train/000000", "train/000001", "train/000002"] and train.read(2)[0, 0, 0] == 20
    both = open_images(cifar)
    assert both.labels.tolist() == [1, 0, 1, 0, 1] and both.read(4)[0, 0, 0] == 10
    assert FakeCifar.calls == [True, True, False, False, False]  # both splits once, then only loaded


def test_prepare_downloads_every_split_and_checks(home, cifar):
    report = prepare(cifar)
    assert report.ok and report.images == 5 and FakeCifar.calls[:2] == [True, True]
    assert check(cifar).ok and "no hashes recorded" in str(report)


def test_folder_first_torchvision_for_the_split_it_lacks(home, paint, monkeypatch, write_card):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    paint(home / "data" / "c" / "cat" / "1.png")
    paint(home / "data" / "c" / "dog" / "1.png")
    path = write_card('  - {kind: folder, root: c, layout: "{class}", splits: {all: 2}}\n' + CIFAR, extra="images: 5")
    with pytest.raises(
        UserError, match=r"2 of 5 images found under \$VISMT_DATA/c; missing split file 'test'. `vismt data"
    ):
        open_images(path, "test")
    prepare(path)
    assert len(open_images(path, "test")) == 2 and open_images(path, "all").ids == ["cat/1.png", "dog/1.png"]


def test_a_part_of_a_published_set_is_found_by_the_pixels_of_its_members(home, monkeypatch, write_card):
    """The set is downloaded whole; the images of the part have the names, the order and the splits that its card lists."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    part = "  - {kind: torchvision, dataset: CIFAR10, root: c, splits: {small: 2, other: 1}, members: members.json}"
    path = write_card(part)
    digests = [digest(np.full((4, 4, 3), value, np.uint8).tobytes())[:MEMBER_DIGITS] for value in range(6)]
    members = {"small": {"dog/b": digests[3], "cat/a": digests[4]}, "other": {"x": digests[2]}}
    (path.parent / "members.json").write_text(json.dumps(members))
    report = prepare(path)
    assert report.ok and report.images == 3
    small = open_images(path, "small")
    assert small.ids == ["dog/b", "cat/a"] and small.labels.tolist() == [1, 0] and small.classes == ["cat", "dog"]
    assert small.read(0)[0, 0, 0] == 20 and small.read(1)[0, 0, 0] == 0
    assert open_images(path).ids == ["dog/b", "cat/a", "x"] and small.content() != open_images(path, "other").content()
    (path.parent / "members.json").write_text(json.dumps({**members, "other": {"x": "0" * 16}}))
    with pytest.raises(UserError, match=r"1 of 1 members of split 'other' are not in the copy of CIFAR10 .* first 'x'"):
        open_images(path, "other")
    with pytest.raises(UserError, match=r"'members' is for sets that are arrays; no 'GTSRB'"):
        open_images(write_card(part.replace("CIFAR10", "GTSRB")), "small")


def test_download_that_fails_says_why(home, cifar, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(UserError, match=r"could not download CIFAR10 \(split 'train'\).*no route to host.*card.yaml"):
        prepare(cifar)


def test_half_a_download_is_an_error(home, cifar):
    (home / "cache" / "torchvision" / "c").mkdir(parents=True)
    (home / "cache" / "torchvision" / "c" / "part.gz").touch()
    with pytest.raises(UserError, match=r"could not open CIFAR10.*not found or corrupted.*vismt data prepare"):
        open_images(cifar)
    assert not check(cifar).ok


def test_image_that_cannot_be_decoded(home, cifar, monkeypatch):
    images = open_images(cifar, "test", download=True)

    def broken(self, i):
        raise OSError("image file is truncated")

    monkeypatch.setattr(FakeCifar, "__getitem__", broken)
    with pytest.raises(UserError, match=r"CIFAR10 test/000001 under .*truncated"):
        images.read(1)


class FakeOmniglot:
    """Other classes in each half, labels inside (file, label) pairs."""

    def __init__(self, root, background=True, transform=None, target_transform=None, download=False):
        self._characters = ["Greek/c1", "Greek/c2"] if background else ["Latin/c1"]
        self._flat_character_images = [("1.png", 1), ("2.png", 0)] if background else [("1.png", 0)]

    def __getitem__(self, i):
        return Image.new("L", (4, 4), i), 0


def test_omniglot_unites_classes_by_name(home, monkeypatch, write_card):
    monkeypatch.setattr(torchvision.datasets, "Omniglot", FakeOmniglot)
    source = "  - {kind: torchvision, dataset: Omniglot, root: o, splits: {background: 2, evaluation: 1}}"
    path = write_card(source, classes=3, extra="superclasses: prefix")
    images = open_images(path, download=True)
    assert images.classes == ["Greek/c1", "Greek/c2", "Latin/c1"] and images.labels.tolist() == [1, 0, 2]
    assert images.superclass.tolist() == [0, 0, 1] and images.superclass_names == ["Greek", "Latin"]
    assert open_images(path, "background", download=True).labels.tolist() == [1, 0]


def test_pcam_labels_come_from_its_file_once(home, monkeypatch, write_card):
    import numpy as np

    class FakeFile(dict):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    class FakePCAM:
        _FILES: ClassVar = {"train": {"targets": ("y.h5", "", "")}}

        def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
            self._split, self._base_folder = split, home
            self.h5py = type("h5py", (), {"File": lambda path: FakeFile(y=np.array([1, 0, 1]).reshape(3, 1, 1, 1))})

    monkeypatch.setattr(torchvision.datasets, "PCAM", FakePCAM)
    path = write_card("  - {kind: torchvision, dataset: PCAM, root: p, splits: {train: 3}}")
    images = open_images(path, download=True)
    assert images.labels.tolist() == [1, 0, 1] and images.classes == ["no_tumour", "tumour"]


def test_unknown_class_and_split(home, write_card):
    path = write_card("  - {kind: torchvision, dataset: CIFAR11, root: c, splits: {train: 3}}")
    with pytest.raises(UserError, match=r"dataset: 'CIFAR11' is not known. Near: 'CIFAR10"):
        open_images(path, download=True)
    path = write_card("  - {kind: torchvision, dataset: SVHN, root: c, splits: {tests: 3}}", name="other")
    with pytest.raises(UserError, match=r"SVHN has no split 'tests'. Near: 'test'"):
        open_images(path, download=True)


def test_prepare_without_a_download_gives_the_steps(home):
    with pytest.raises(
        UserError, match=r"datasets/stanford_cars: cannot be downloaded by vismt. torchvision can no longer"
    ):
        prepare("stanford_cars")
    with pytest.raises(UserError, match=r"datasets/grocery: cannot be downloaded by vismt. Clone the repository"):
        prepare("grocery")
