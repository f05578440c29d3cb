"""Three tiny sets of images, and the configuration of a dense run on two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.tiny_runs import TRAIN  # and short_vit

CARD = "name: {name}\ntitle: Made\nsource: tests\nlicence: none\nclasses: {classes}\nsources:\n  - {source}\n"
SCENES = '{kind: dense, root: scenes, image: "{split}/rgb", maps: {label: "{split}/label"}, splits: {train: 4, val: 2, test: 2}}'
TONES = '{kind: folder, root: NAME, layout: "{split}/{class}", splits: {train: 8, val: 24, test: 12}}'
MAPS = [{"name": "semseg", "classes": 3}]
# Name of the set -> its colour and the least grey level of each class; the first class of one is the second of the other.
TONES_OF = {"tones": ([1, 1, 1], {"bright": 100, "dark": 0}), "reds": ([1, 0, 0], {"gloom": 0, "shine": 100})}


def save(path: Path, values: np.ndarray) -> None:
    """Write an image of bytes and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def write_cards(home: Path, *cards: tuple[str, str, int]) -> None:
    """Write cards of a name, a source whose folder is the name, and a number of classes."""
    for name, source, classes in cards:
        (home / name).mkdir()
        text = CARD.format(name=name, classes=classes, source=source.replace("NAME", name))
        (home / name / "card.yaml").write_text(text)


def made_room(home: Path) -> Path:
    """Write scenes of three label bands, grey and red images of two tones, each with its card; return `home`."""
    data, generator = home / "data", np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number in range(count):
            label = np.sort(generator.integers(0, 3, (20, 30)), axis=0)
            save(data / f"scenes/{split}/label/{number}.png", label)
            save(data / f"scenes/{split}/rgb/{number}.png", np.stack([80 * label] * 3, axis=-1))
    for root, (color, levels) in TONES_OF.items():
        for split, count in (("train", 4), ("val", 12), ("test", 6)):
            for name, level in levels.items():
                for number in range(count):
                    grey = generator.integers(0, 150, (20, 16, 1)) + level
                    save(data / root / split / name / f"{name}{number}.png", grey * color)
    write_cards(home, ("scenes", SCENES, 3), ("tones", TONES, 2), ("reds", TONES, 2))
    return home


def parts(room: Path, *names: str) -> dict[str, list[str]]:
    """Return the sets of each part."""
    splits = {"train": "train", "validation": "val", "test": "test"}
    return {part: [f"{room}/{name}:{split}" for name in names] for part, split in splits.items()}


def dense(room: Path, **changes: Any) -> dict[str, Any]:
    """Return a configuration of maps of scenes and classes of grey images, with changes."""
    return {
        "task": "dense",
        "model": {"name": "short_vit", "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "data": parts(room, "scenes", "tones"),
        "tasks": [*MAPS, {"name": "classify", "classes": 2}],
        "size": [32, 48],
        "head": {"name": "linear"},
        "augment": {"strength": 0},
        "batch": 4,
        "train": TRAIN,
        **changes,
    }
