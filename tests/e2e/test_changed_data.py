"""A run whose training examples changed is not continued, and not called done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import CONFIGS, interrupted, refused, write_config, written
from torchvision.io import write_png

from vismt.cli import main

JOBS = ("fewshot", "multitask", "lm")


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(
        torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)), str(path)
    )


def made(job: str, folder: Path) -> tuple[Path, Path]:
    """Return the configuration of a job on data of its own, and a file of its training data."""
    if job == "lm":
        config = write_config(job, folder)
        return config, next(path for path in sorted(folder.rglob("*train*")) if path.is_file())
    for number in range(24):
        noise(folder / "images" / "abc"[number % 3] / f"{number}.png", number)
    card = folder / "own.yaml"
    card.write_text(
        'name: own\nclasses: 3\nsources:\n  - {kind: folder, root: images, layout: "{class}", splits: {all: 24}}\n'
    )
    config: dict[str, Any] = {**CONFIGS[job]}
    if job == "fewshot":
        config["source"] = {**config["source"], "data": [str(card)]}
    else:
        config["tasks"] = [{"name": "own", "train": [str(card)], "test_share": 0.3, "validation_share": 0.3}]
    return written(folder / f"{job}.yaml", config), folder / "images" / "a" / "0.png"


@pytest.mark.parametrize("job", JOBS)
def test_changed_training_examples_are_named(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = made(job, tmp_path)
    command, before = ["run", str(config), "--out", str(tmp_path / "runs")], file.read_bytes()

    def change() -> None:
        noise(file, 99) if job != "lm" else file.write_text(before.decode().replace("film", "play", 1))

    interrupted(monkeypatch, 2, *command)
    change()
    error = refused(capsys, *command)
    assert "the training examples of" in error and "give another --out" in error
    file.write_bytes(before)
    assert main(command) == 0
    assert "at step 2 of 3" in capsys.readouterr().out
    assert main(command) == 0
    assert "done before" in capsys.readouterr().out
    change()
    assert "the training examples of" in refused(capsys, *command)
