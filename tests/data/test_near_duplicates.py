"""Near-duplicates: what counts as one, and that no division of a set puts them in two parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vismt.config import typed
from vismt.data.cards import load_card
from vismt.data.near_duplicates import near_duplicates
from vismt.errors import UserError
from vismt.jobs.classification.config import MultitaskConfig
from vismt.jobs.classification.data import TaskData
from vismt.jobs.dense.config import DenseConfig
from vismt.jobs.dense.data import DenseData


def picture(seed: int, size: int = 48) -> Tensor:
    """Return a random image of coarse shapes, uint8 (3, size, size)."""
    coarse = torch.randint(40, 200, (3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return vision.resize(coarse, [size, size], interpolation=vision.InterpolationMode.BILINEAR)


def groups(images: list[Tensor], labels: list[int] | None = None) -> list[int]:
    return near_duplicates(images.__getitem__, torch.tensor(labels or [0] * len(images)), "made").tolist()


def test_another_exposure_size_or_a_little_noise_is_a_near_duplicate_and_another_picture_is_not() -> None:
    first, other = picture(0), picture(1)
    noise = torch.randint(-9, 10, first.shape, generator=torch.Generator().manual_seed(2))
    changed = [
        (first * 0.5 + 20).to(torch.uint8),
        vision.resize(first, [30, 36]),
        (first.int() + noise).clamp(0, 255).to(torch.uint8),
        first.roll(1, 2),
    ]
    assert groups([first, other, *changed, first.flip(2), 255 - first]) == [0, 1, 0, 0, 0, 0, 6, 7]
    assert groups([picture(seed) for seed in range(40)]) == list(range(40))


def test_a_chain_is_one_group_and_classes_stay_apart() -> None:
    first, last = picture(0).float(), picture(1).float()
    chain = [first.lerp(last, share).to(torch.uint8) for share in torch.linspace(0, 1, 9)]
    assert groups([chain[0], chain[8]]) == [0, 1]  # its ends are no near-duplicates
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    assert groups([chain[i] for i in order]) == [0] * 9
    assert groups([chain[i] for i in order], [0, 1, 0, 1, 0, 1, 0, 1, 0]) == [0, 1, 0, 1, 0, 1, 0, 1, 0]


@pytest.fixture
def frames(home: Path, write_card):
    """write(key): a card of two classes of 5 objects each, 4 frames of every object, interleaved; `key` is a line of the card."""
    for label in range(2):
        for number in range(20):
            path = home / "data" / "frames" / "ab"[label] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = picture(100 * label + number % 5).int() + number  # the frames of an object differ in brightness
            Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)).save(path)

    def write(key: str = "group_near_duplicates: true") -> Path:
        return write_card('  - {kind: folder, root: frames, layout: "{class}"}', name="frames", extra=key)

    return write


def objects(ids: list[str]) -> set[tuple[str, int]]:
    return {(Path(name.rpartition(":")[2]).parts[-2], int(Path(name).stem) % 5) for name in ids}


def test_frames_of_one_object_are_in_one_part_of_a_classification(frames) -> None:
    def parts(card: Path) -> list[set]:
        task = {"name": "frames", "train": [str(card)], "test_share": 0.4, "validation_share": 0.2}
        data = TaskData(typed({"tasks": [task]}, MultitaskConfig, "made"), 32)
        chosen = [[data.training()], [data.part(0, "validation")], [data.part(0, "test")]]
        return [objects([name for gathered in part for name in gathered.ids]) for part in chosen]

    train, validation, test = parts(frames())
    assert not (train & test or train & validation or validation & test)
    assert [len(train), len(validation), len(test)] == [4, 2, 4]
    train, _, test = parts(frames(""))  # neighbours are other objects, so that every object is everywhere
    assert len(train & test) == 10


def test_frames_of_one_object_are_in_one_part_of_a_dense_set(frames) -> None:
    raw = {"data": {"train": [str(frames())], "test_share": 0.4}, "tasks": [{"name": "classify", "classes": 2}]}
    data = DenseData(typed({**raw, "size": [32, 32]}, DenseConfig, "made"))
    train, test = objects(data.parts["train"].ids), objects(data.parts["test"].ids)
    assert not train & test and [len(train), len(test)] == [6, 4]


def test_no_image_is_decoded_unless_the_card_asks(frames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismt.data.folder.decode_file", lambda path: pytest.fail(f"decoded {path}"))
    task = {"name": "frames", "train": [str(frames(""))], "test_share": 0.4}
    TaskData(typed({"tasks": [task]}, MultitaskConfig, "made"), 32)


def test_texts_have_no_near_duplicates(home: Path, write_card) -> None:
    card = write_card(
        "  - {kind: text, root: ., files: {all: a.csv}, form: csv}", extra="group_near_duplicates: true", name="words"
    )
    with pytest.raises(UserError, match="'group_near_duplicates' is for images; leave it out"):
        load_card(card)
