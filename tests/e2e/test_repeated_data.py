"""Training examples that are also test examples, by their content, are found in every job with parts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import CONFIGS, SHORT, refused, write_config, written
from torchvision.io import write_png

from vismt.cli import main


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    write_png(pixels, str(path))


def config_of(folder: Path) -> Path:
    """Return a configuration of classes that trains on `train` and tests on `test`."""
    tasks = [{"name": "own", "train": [str(folder / "train")], "test": [str(folder / "test")]}]
    config: dict[str, Any] = {**CONFIGS["multitask"], "model": SHORT, "adapt": None, "fade": None, "tasks": tasks}
    return written(folder / "own.yaml", config)


def test_test_images_are_left_out_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        noise(tmp_path / ("test" if number < 6 else "train") / "ab"[number % 2] / f"{number}.png", number)
    for number in range(3):
        shutil.copy(
            tmp_path / "test" / "ab"[number % 2] / f"{number}.png", tmp_path / "train" / "a" / f"copy{number}.png"
        )
    assert main(["run", str(config_of(tmp_path)), "--out", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "train   3 of 17 training images left out" in printed and "train 14   test 6" in printed


def test_a_test_set_that_is_the_training_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        noise(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", number)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    error = refused(capsys, "run", config_of(tmp_path), "--out", tmp_path / "runs")
    assert "train: all 6 training examples are also in validation or test, by their content" in error


def test_rows_of_text_that_train_and_test_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config("lm", tmp_path)
    train, test = (next(path for path in tmp_path.rglob(f"*{part}*") if path.is_file()) for part in ("train", "test"))
    rows = test.read_text().splitlines()
    test.write_text("\n".join(train.read_text().splitlines()[: len(rows)]) + "\n")
    assert main(["run", str(config), "--out", str(tmp_path / "runs")]) == 0
    assert "24 training rows are also in validation or test, with every field" in capsys.readouterr().out
