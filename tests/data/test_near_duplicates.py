"""Near-duplicates: what counts as one, and that no division of a set puts them in two parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_runs import refused
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.typed import build
from vismt.data import image_set
from vismt.data.division import divide
from vismt.data.images import open_images
from vismt.data.near_duplicates import MARGIN, TILE, near_duplicates
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.maps_data import DenseData


def picture(seed: int, size: int = 48) -> Tensor:
    """Return a random image of coarse shapes, uint8 (3, size, size)."""
    coarse = torch.randint(40, 200, (3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return vision.resize(coarse, [size, size], interpolation=vision.InterpolationMode.BILINEAR)


def groups(given: list[Tensor], labels: list[int] | None = None) -> list[int]:
    return near_duplicates(given.__getitem__, torch.tensor(labels or [0] * len(given)), "made").tolist()


def test_another_exposure_size_or_a_little_noise_is_a_near_duplicate_and_another_picture_is_not() -> None:
    first, other = picture(0), picture(1)
    noise = torch.randint(-9, 10, first.shape, generator=torch.Generator().manual_seed(2))
    changed = [
        (first * 0.5 + 20).to(torch.uint8),
        vision.resize(first, [30, 36]),
        (first.int() + noise).clamp(0, 255).to(torch.uint8),
        first.roll(1, 2),
    ]
    far = [picture(seed) for seed in range(3, 8)]
    assert groups([first, other, *changed, first.flip(2), 255 - first, *far]) == [0, 1, 0, 0, 0, 0, *range(6, 13)]
    assert groups([picture(seed) for seed in range(40)]) == list(range(40))


def chain() -> list[Tensor]:
    """Return six images, of which neighbours are near-duplicates and the ends are not, in another order."""
    first, last = picture(0).float(), picture(1).float()
    drawn = [first.lerp(last, share).to(torch.uint8) for share in torch.linspace(0, 1, 6)]
    assert groups([drawn[0], drawn[5], picture(2)]) == [0, 1, 2]
    return [drawn[i] for i in (4, 0, 5, 2, 1, 3)]


def test_a_chain_is_one_group_and_classes_stay_apart() -> None:
    others = [picture(seed) for seed in range(2, 12)]
    assert groups(chain() + others) == [0] * 6 + list(range(6, 16))
    assert groups(chain()[:2] + others, [0, 1] * 6) == list(range(12))
    assert groups([picture(0)] * 2 + others) == [0, 0, *range(2, 12)]


def test_a_class_that_is_one_chain_has_no_groups(capsys: pytest.CaptureFixture) -> None:
    assert groups(chain()) == list(range(6))
    assert "made: the images of 1 classes are too alike to tell near-duplicates" in capsys.readouterr().out
    other = [picture(2), picture(3), picture(2), picture(4)]
    assert groups(chain() + other, [0] * 6 + [1] * 4) == [*range(6), 6, 7, 6, 9]


def test_copies_are_a_group_also_if_they_are_most_of_a_class() -> None:
    copies = [picture(seed) for seed in range(4)] + [picture(4)] * 6
    assert groups(copies) == [0, 1, 2, 3, *[4] * 6]
    index = divide(torch.zeros(10, dtype=torch.int64), {"test": 0.4}, "made", torch.tensor(groups(copies)))
    assert index["train"].tolist() == [0, 1, 2, 3] and index["test"].tolist() == [4, 5, 6, 7, 8, 9]


def test_one_picture_under_two_classes_is_a_group_and_another_colour_is_not() -> None:
    others = [picture(seed) for seed in range(1, 9)]
    assert groups([picture(0), *others, picture(0)], [0] * 5 + [1] * 5) == [0, *range(1, 9), 0]
    assert groups([picture(0), *others, picture(0).flip(0)], [0] * 5 + [1] * 5) == list(range(10))
    blank = [torch.full((3, 9, 9), 7 * number, dtype=torch.uint8) for number in range(4)]
    assert groups(blank, [0, 0, 1, 1]) == list(range(4))


@pytest.fixture
def frames(home: Path, write_card):
    """write(key): a card of two classes of 5 objects each, 4 frames of every object, interleaved; `key` is a line of the card."""
    for label in range(2):
        for number in range(20):
            path = home / "data" / "frames" / "ab"[label] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = picture(100 * label + number % 5).int() + number  # the frames of an object differ in brightness
            Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)).save(path)

    def write(key: str = "") -> Path:
        return write_card('  - {kind: folder, root: frames, layout: "{class}"}', name="frames", extra=key)

    return write


def objects(ids: list[str]) -> set[tuple[str, int]]:
    return {(Path(name.rpartition(":")[2]).parts[-2], int(Path(name).stem) % 5) for name in ids}


def parts(card: Path | str, **shares: float) -> dict[str, set[tuple[str, int]]]:
    """Return the objects of each part of a classification."""
    task = {"name": "frames", "train": [str(card)], "test_share": 0.4, **shares}
    data = TaskData(build(MultitaskConfig, {"tasks": [task]}, "made"), 32)
    gathered = {name: data.part(0, name) for name in ("validation", "test") if data.has_part(0, name)}
    return {name: objects(part.ids) for name, part in {"train": data.training(), **gathered}.items()}


@pytest.mark.parametrize("kind", ["card", "folder", "file"])
def test_frames_of_one_object_are_in_one_part_of_a_classification(home: Path, frames, kind: str) -> None:
    card: Path = frames("groups: groups.json" if kind == "file" else "")
    if kind == "file":
        names = {f"{label}/{number:02d}.png": f"object {number % 5}" for label in "ab" for number in range(20)}
        (card.parent / "groups.json").write_text(json.dumps(names))
    found = parts(home / "data" / "frames" if kind == "folder" else card, validation_share=0.2)
    train, validation, test = (found[name] for name in ("train", "validation", "test"))
    assert not (train & test or train & validation or validation & test)
    assert [len(train), len(validation), len(test)] == [4, 2, 4]


def test_neighbours_are_parts_where_the_card_has_no_groups(frames) -> None:
    found = parts(frames("groups: none"))
    assert len(found["train"] & found["test"]) == 10  # every object is everywhere


def test_frames_of_one_object_are_in_one_part_of_a_dense_set(frames) -> None:
    raw = {"data": {"train": [str(frames())], "test_share": 0.4}, "tasks": [{"name": "classify", "classes": 2}]}
    data = DenseData(build(MultitaskConfig, {**raw, "size": [32, 32]}, "made"))
    train, test = objects(data.parts["train"].ids), objects(data.parts["test"].ids)
    assert not train & test and [len(train), len(test)] == [6, 4]


@pytest.mark.parametrize("largest", [40, 39])
def test_a_set_of_many_images_is_decoded_on_request_alone(frames, monkeypatch, largest: int) -> None:
    monkeypatch.setattr(image_set, "DECODED", largest)
    assert open_images(frames("groups: near-duplicates")).groups is None
    assert open_images(frames("groups: none")).groups == {}
    assert (open_images(frames()).groups is None) == (largest == 40)


@pytest.mark.parametrize(
    ("sources", "groups", "words"),
    [
        ("{kind: text, root: ., files: {all: a.csv}, form: csv}", "none", "'groups' is for images; leave it out"),
        ('{kind: folder, root: frames, layout: "{class}"}', "twins.json", "twins.json: cannot be read"),
        ('{kind: folder, root: frames, layout: "{class}"}', "list.json", "list.json: must map images to groups"),
    ],
)
def test_groups_that_cannot_be_read(frames, write_card, sources: str, groups: str, words: str) -> None:
    frames()
    card = write_card(f"  - {sources}", extra=f"groups: {groups}", name="other")
    (card.parent / "list.json").write_text("[]")
    with pytest.raises(UserError, match=words):
        open_images(card)


def test_check_lists_near_duplicates_and_writes_a_sheet_and_a_file_of_groups(
    home: Path, frames, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(home)
    card = frames()
    assert main(["data", "check", str(card), "--duplicates"]) == 0
    shown = capsys.readouterr().out
    assert "frames: 40 of 40 images are near-duplicates, in 10 groups" in shown
    assert "   2  a/01.png, a/06.png, a/11.png, a/16.png" in shown
    sheet = Image.open(home / "frames-near-duplicates.png").convert("RGB")
    assert sheet.size == (MARGIN + 4 * TILE, 10 * TILE)
    first, second = (
        np.asarray(sheet.crop((MARGIN, row * TILE, MARGIN + TILE - 2, (row + 1) * TILE - 2))) for row in (0, 1)
    )
    assert first.std() > 10 and abs(first.astype(float) - second).mean() > 10  # another object in the next row
    written = json.loads((home / "frames-groups.json").read_text())
    assert len(written) == 40 and written["a/01.png"] == written["a/16.png"] != written["a/02.png"]
    (home / "frames-near-duplicates.png").unlink()
    (home / "frames-groups.json").write_text("corrected by hand")
    error = refused(capsys, "data", "check", card, "--duplicates")
    assert "frames-groups.json' exists and would be overwritten; give another working folder" in error
    assert (home / "frames-groups.json").read_text() == "corrected by hand"


def test_check_counts_the_groups_across_splits(home: Path, paint, write_card, capsys, monkeypatch) -> None:
    monkeypatch.chdir(home)
    for split, seeds in (("train", range(6)), ("test", range(5, 9))):
        for seed in seeds:
            path = paint(home / "data" / "two" / split / "a" / f"{seed}.png")
            Image.fromarray(picture(seed).permute(1, 2, 0).numpy()).save(path)
    card = write_card('  - {kind: folder, root: two, layout: "{split}/{class}", splits: {train: 6, test: 4}}', "two", 1)
    assert main(["data", "check", str(card), "--duplicates"]) == 0
    text = "two: 2 of 10 images are near-duplicates, in 1 groups; 1 groups lie in several splits"
    assert text in capsys.readouterr().out


def test_check_lists_one_picture_under_two_classes(home: Path, paint, write_card, capsys, monkeypatch) -> None:
    monkeypatch.chdir(home)
    for label, seeds in (("a", range(5)), ("b", range(4, 9))):
        for seed in seeds:
            path = paint(home / "data" / "noisy" / label / f"{seed}.png")
            Image.fromarray(picture(seed).permute(1, 2, 0).numpy()).save(path)
    card = write_card('  - {kind: folder, root: noisy, layout: "{class}", splits: {all: 10}}', "noisy", 2)
    assert main(["data", "check", str(card), "--duplicates"]) == 0
    shown = capsys.readouterr().out
    assert "noisy: 2 of 10 images are near-duplicates, in 1 groups; 1 groups lie in several classes" in shown
    assert "   1  a/4.png, b/4.png" in shown
