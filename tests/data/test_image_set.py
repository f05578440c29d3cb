"""A format of images of one's own: what it has to say, and what it gets for nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.image_set import ImageRow, ImageSource, Listing
from vismt.data.images import open_images
from vismt.data.source_types import DATA_KINDS, Card, RootedSource, source_kind


@pytest.fixture(autouse=True)
def ini_kind() -> Iterator[None]:
    """A toy format, registered while a test runs: class and file in the lines `cat = 1.png` of a file for each split."""

    @source_kind("ini")
    @dataclass(frozen=True, kw_only=True)
    class IniSource(RootedSource, ImageSource):
        """`<split>.ini` with a line `class = image` for each image.

        Attributes:
            suffix: of the lists.
        """

        suffix: str = ".ini"

        def list_images(self, card: Card, base: Path, splits: Sequence[str]) -> Listing:
            lines = {split: (base / f"{split}{self.suffix}").read_text().splitlines() for split in splits}
            pairs = {split: [line.split(" = ") for line in part] for split, part in lines.items()}
            classes = sorted({name for part in pairs.values() for name, _ in part})
            rows = {
                split: [ImageRow(image, classes.index(name)) for name, image in part] for split, part in pairs.items()
            }
            return Listing(classes, rows)

    yield
    DATA_KINDS._items.pop("ini")


@pytest.fixture
def toy(home: Path, paint, write_card) -> Path:
    for value, name in enumerate(["1.png", "2.png", "3.png", "4.png"]):
        paint(home / "data" / "toy" / name, 10 * value)
    (home / "data" / "toy" / "train.ini").write_text("dog = 2.png\ncat = 1.png\n")
    (home / "data" / "toy" / "test.ini").write_text("cat = 3.png\ndog = 4.png\n")
    return write_card("  - {kind: ini, root: toy, splits: {train: 2, test: 2}}", name="toy")


def test_a_format_is_a_list_of_names_and_classes(home: Path, toy: Path) -> None:
    train = open_images(toy, "train")
    assert train.ids == ["2.png", "1.png"] and train.classes == ["cat", "dog"] and train.labels.tolist() == [1, 0]
    assert [int(train.read(i)[0, 0, 0]) for i in range(2)] == [10, 0] and train.where == "$VISMT_DATA/toy"
    assert open_images(toy).labels.tolist() == [1, 0, 0, 1] and open_images(toy).labels.dtype == torch.int64
    report = check(toy)
    assert report.ok and [row.actual for row in report.splits] == [2, 2]


def test_counts_files_names_and_content_are_those_of_every_format(home: Path, toy: Path, paint) -> None:
    base, before = home / "data" / "toy", open_images(toy, "train").content()
    (toy.parent / "names.json").write_text('{"cat": "Felis catus"}')
    toy.write_text(toy.read_text() + "names: names.json\n")
    assert open_images(toy, "train").classes == ["Felis catus", "dog"]
    (base / "train.ini").write_text("cat = 2.png\ndog = 1.png\n")
    assert open_images(toy, "train").content() != before
    (base / "train.ini").write_text("dog = 2.png\ncat = gone.png\n")
    with pytest.raises(UserError, match=r"1 of 2 images of split 'train' found under .*; missing 'gone.png'"):
        open_images(toy, "train")
    (base / "train.ini").write_text("dog = 2.png\n")
    with pytest.raises(UserError, match=r"toy: 1 of 2 images found under \$VISMT_DATA/toy \(split 'train'\)"):
        open_images(toy, "train")
    (base / "train.ini").write_text("dog = 2.png\neel = 1.png\n")
    with pytest.raises(UserError, match="3 of 2 classes found"):
        open_images(toy)
    paint(base / "2.png").write_bytes(b"")
    assert [row.group for row in check(toy).damaged] == ["2.png"]


@pytest.mark.parametrize(("key", "content", "message"), [
    ("superclasses", "[1]", r"must map class to superclass \(str\), holds \[1\]"),
    ("superclasses", '{"cat": "pet", "dog": ["pet"]}', r"must map class to superclass \(str\), holds {'dog': \['pet'\]}"),
    ("superclasses", '{"cat": 1, "dog": "pet"}', r"must map class to superclass \(str\), holds {'cat': 1}"),
    ("groups", '{"1.png": [1]}', r"must map images to groups \(str or int\), holds {'1.png': \[1\]}"),
    ("groups", '{"1.png": true}', r"must map images to groups \(str or int\), holds {'1.png': True}"),
])  # fmt: skip
def test_files_beside_the_card_with_other_values(toy: Path, key: str, content: str, message: str) -> None:
    (toy.parent / "j.json").write_text(content)
    toy.write_text(toy.read_text() + f"{key}: j.json\n")
    with pytest.raises(UserError, match=f"j.json: {message}"):
        open_images(toy)
