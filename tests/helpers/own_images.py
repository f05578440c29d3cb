"""Small images of a user: classes that differ by their colour, as a folder, a table, a data set and a classifier of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

COLOURS = {"blue": (110, 110, 140), "green": (110, 140, 110), "red": (140, 110, 110)}
SIZE = 16


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """Return an image of noise around a colour."""
    noise = np.random.default_rng(seed).integers(-40, 41, (SIZE, SIZE, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, count: int = 8, splits: tuple[str, ...] = ()) -> Path:
    """Write `count` images of each class, below each split where there are any; return the folder."""
    for part, split in enumerate(splits or ("",)):
        for place, (name, colour) in enumerate(COLOURS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(colour, 1000 * part + 100 * place + number).save(folder / f"{number:02d}.png")
    return root


def write_table(root: Path, split: bool = False, suffix: str = ".csv") -> Path:
    """Write a table of the images below a folder of `write_folder`; return the file."""
    path = root / f"table{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(["path", "label", *(["split"] if split else [])])
        for number, image in enumerate(sorted(root.rglob("*.png"))):
            part = [["train", "test"][number % 2]] if split else []
            writer.writerow([image.relative_to(root).as_posix(), image.parent.name, *part])
    return path


class Pictures(Dataset):
    """The images of `write_folder` as pairs (image, label); as_tensors: images float in [0, 1], else Pillow's."""

    classes = tuple(COLOURS)

    def __init__(self, count: int = 8, as_tensors: bool = False) -> None:
        self.examples = [
            (picture(colour, 100 * place + number), place)
            for place, colour in enumerate(COLOURS.values())
            for number in range(count)
        ]
        self.as_tensors = as_tensors

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Image.Image | Tensor, int]:
        image, label = self.examples[i]
        if self.as_tensors:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, label
        return image, label


class ByColour(nn.Module):
    """A classifier of the images, right on all of them: the nearest colour to an image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor(list(COLOURS.values())) / 255)

    def forward(self, images: Tensor) -> Tensor:
        return -10 * torch.cdist(images.mean((2, 3)), self.centres)
