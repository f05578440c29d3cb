"""Tiny image sets in a temporary folder that VISMT_DATA names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty data and cache folders, named by the environment; the cards that ship with the package stay visible."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("VISMT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def paint():
    """paint(path, value, size): a flat grey image file, its folders made on the way."""

    def write(path: Path, value: int = 100, size: tuple[int, int] = (6, 5)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def write_card(home: Path):
    """write_card(sources, **keys): a user's card; returns its path."""

    def write(sources: str, name: str = "mine", classes: int = 2, extra: str = "") -> Path:
        folder = home / "cards" / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "card.yaml"
        path.write_text(
            f"name: {name}\ntitle: Mine\nsource: own\nlicence: own\nclasses: {classes}\n{extra}\nsources:\n{sources}\n"
        )
        return path

    return write


@pytest.fixture
def pets(home: Path, paint, write_card) -> Path:
    """A card over {split}/{class} with 2 + 1 cats and 1 + 1 dogs; the grey value of an image is its own."""
    data = home / "data" / "pets"
    for value, name in enumerate(
        ["train/cat/a.png", "train/cat/b.png", "train/dog/a.png", "test/cat/a.png", "test/dog/a.png"]
    ):
        paint(data / name, 10 * (value + 1))
    return write_card(
        '  - {kind: folder, root: pets, layout: "{split}/{class}", splits: {train: 3, test: 2}}', name="pets"
    )
