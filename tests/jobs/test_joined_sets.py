"""Sets that are joined in one dense run hold the same things: depth or inverse depth, and one class by one number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.jobs.multitask.config import MultitaskConfig, check
from vismt.jobs.multitask.maps_data import DenseData

SIZE = (8, 12)


@pytest.fixture
def make_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """make_card(name, names, inverse): the path of a card of two images with labels and depth, and its data."""
    monkeypatch.setenv("VISMT_DATA", str(tmp_path / "data"))

    def make(name: str, names: list[str] | None = None, inverse: bool = False) -> Path:
        folder, card = tmp_path / "data" / name, tmp_path / name
        depth = "inverse_depth" if inverse else "depth_m"
        for what in ("rgb", "label", "depth"):
            (folder / what).mkdir(parents=True)
        for number in range(2):
            grey = 16 * len([*(tmp_path / "data").iterdir()])  # of this set alone
            Image.fromarray(np.full((*SIZE, 3), grey, np.uint8)).save(folder / "rgb" / f"{number}.png")
            Image.fromarray(np.full(SIZE, number, np.uint8)).save(folder / "label" / f"{number}.png")
            np.save(folder / "depth" / f"{number}.npy", np.full(SIZE, 2.0, np.float32))
        card.mkdir()
        names_line = "" if names is None else "names: names.json\n"
        (card / "names.json").write_text(json.dumps(names))
        (card / "card.yaml").write_text(
            f"name: {name}\ntitle: Made\nsource: own\nlicence: own\nclasses: 2\n{names_line}sources:\n  - kind: dense\n"
            f"    root: {name}\n    image: rgb\n    maps: {{label: label, {depth}: depth}}\n    splits: {{all: 2}}\n"
        )
        return card

    return make


def joined(*cards: Path, tasks: list) -> DenseData:
    *train, test = (str(card) for card in cards)
    return DenseData(
        build(MultitaskConfig, {"data": {"train": train, "test": [test]}, "tasks": tasks, "size": list(SIZE)}, "made")
    )


SEMSEG = {"name": "semseg", "classes": 2}


def test_depth_and_inverse_depth_are_not_one_task(make_card) -> None:
    metric, inverse, other = make_card("metric"), make_card("inverse", inverse=True), make_card("other", inverse=True)
    more = make_card("more")
    for cards in ((metric, metric, inverse), (inverse, metric, more), (inverse, inverse, metric)):
        with pytest.raises(UserError, match="data: 'inverse' has inverse depth, 'metric' depth; take sets of one kind"):
            joined(*cards, tasks=["depth"])
    assert (
        not joined(metric, inverse, tasks=[SEMSEG]).tasks["semseg"].headline.lower_is_better
    )  # nothing of them is mixed
    task = joined(inverse, other, tasks=[SEMSEG, {"name": "depth", "max_depth": 9.0}]).tasks["depth"]
    assert task.inverse and task.max_depth == 9.0 and task.name == "depth"
    assert not joined(metric, more, tasks=["depth"]).tasks["depth"].inverse


def test_one_class_of_maps_has_one_name(make_card) -> None:
    road, same, swapped, silent = (
        make_card("road", ["road", "sky"]),
        make_card("same", ["road", "sky"]),
        make_card("swapped", ["sky", "road"]),
        make_card("silent"),
    )
    for cards in ((road, swapped), (road, same, swapped), (silent, road, swapped)):
        with pytest.raises(UserError, match="data: one class is 'road' in 'road' and 'sky' in 'swapped'; give both"):
            joined(*cards, tasks=[SEMSEG])
    for cards in ((road, same), (road, silent), (silent, silent, swapped)):
        joined(*cards, tasks=[SEMSEG])
    joined(road, swapped, tasks=["depth"])


def test_parts_of_two_sets_of_one_name_are_refused() -> None:
    """Their records are by the name of the set: an image would take the place of the other's."""
    values = {"data": {"train": ["a/rooms", "b/rooms"], "test_share": 0.5}, "tasks": [SEMSEG], "size": list(SIZE)}
    with pytest.raises(UserError, match="data: train: 'a/rooms' and 'b/rooms' are both called 'rooms' in results"):
        check(build(MultitaskConfig, {**values, "train": {"steps": 1, "lr": 1e-3}}, "made"))
