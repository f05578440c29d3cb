"""The lines of an export's README, run as they stand, answer as `vismt predict` does; the run's best arm is the default."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pyramids
from helpers.own_images import COLOURS, write_folder
from helpers.tiny_runs import refused, written
from PIL import Image

import vismt
from vismt.cli import main
from vismt.engine.study import CHOSEN
from vismt.storage.files import read_sealed, sealed

IMAGES, FORMATS = 300, {"timm": 2, "onnx": 1, "torch": 1, "peft": 1}  # code blocks of each README


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("own") / "my_images", 12)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory) -> Path:
    """Two arms on own images, of which the second is better on validation images by its rate."""
    config: dict[str, Any] = {
        "task": "multitask",
        "model": {"name": "short_vit", "img_size": 32, "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [{"name": "mine", "train": [str(pictures)], "validation_share": 0.3, "test_share": 0.2}],
        "batch": 8,
        "arms": {"heads": {"adapt": None, "train.lr": 1.0e-6}, "lora": {"train.lr": 1.0e-3}},
        "train": {"steps": 30},
        "seeds": [0, 1],
    }
    return trained(tmp_path_factory.mktemp("run") / "mine.yaml", config)


def trained(path: Path, config: dict[str, Any]) -> Path:
    """Train a configuration without its evaluation; return the run folder."""
    assert main(["train", str(written(path, config)), "--out", str(path.parent / path.stem), "--quiet"]) == 0
    (run,) = (path.parent / path.stem).iterdir()
    return run


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def executed(code: str, folder: Path, photo: Path | None = None, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run lines of a README in its folder; return their names. photo: in the place of photo.jpg."""
    names = {} if names is None else names
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        exec(code if photo is None else code.replace('"photo.jpg"', repr(str(photo))), names)
    return names


def odd_images(folder: Path) -> list[Path]:
    """Write coarse images of many sizes, every third as wide as it is high, and turned ones as a phone writes them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        height, width = (int(side) for side in random.integers(20, 150, 2))
        coarse = random.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((height if number % 3 == 0 else width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 10 == 0 else 1
        image.save(folder / f"{number:03d}.png", exif=exif)
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_every_format_answers_as_the_run_by_the_lines_of_its_readme(run: Path, tmp_path: Path, monkeypatch) -> None:
    for library in ("onnxruntime", "onnxscript", "transformers", "peft"):
        pytest.importorskip(library)
    images = odd_images(tmp_path / "odd")
    rows = vismt.predict(run, images, arm="lora", to=tmp_path / "predictions").rows
    assert len({row["label"] for row in rows}) == 3 and len(rows) == IMAGES
    load = torch.export.load
    graph = cache(lambda file: SimpleNamespace(module=cache(load(file).module)))
    monkeypatch.setattr(torch.export, "load", graph)  # read once for all images
    for form, count in FORMATS.items():
        folder = tmp_path / form
        assert main(["export", str(run), "--format", form, "--arm", "lora", "--to", str(folder), "--quiet"]) == 0
        assert len(blocks(folder)) == count
        for code in blocks(folder):
            if form == "peft":
                assert executed(code, folder)["model"].peft_config
                continue
            start = code.index("image = ")
            names = executed(code[:start], folder)
            for path, row in zip(images, rows, strict=True):
                executed(code[start:], folder, path, names)
                if form == "timm":
                    probabilities = names["probabilities"]
                    labels = list(COLOURS)
                else:
                    probabilities = torch.as_tensor(np.asarray(names["outputs"][0])).softmax(-1)[0]
                    labels = names["labels"]
                assert labels[int(probabilities.argmax())] == row["label"], (form, path)
                # Pillow and torch round up to a tenth of the pixels otherwise, by 1 of 255.
                assert float(probabilities.max()) == pytest.approx(row["probability"], abs=1e-3), (form, path)


@pytest.mark.parametrize("job", ["fewshot", *(pytest.param(job, marks=pytest.mark.slow) for job in ("dense", "lm"))])
def test_the_lines_of_other_jobs_run(job: str, finished, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = finished(job)
    Image.new("RGB", (60, 45), (200, 30, 30)).save(tmp_path / "photo.png")
    for form in (["transformers"] if job == "lm" else ["timm"]) + ["torch", "peft"]:
        assert main(["export", str(run), "--format", form, "--to", str(tmp_path / form), "--quiet"]) == 0
        (code,) = blocks(tmp_path / form)
        names = executed(code, tmp_path / form, tmp_path / "photo.png")
        if job == "dense" and form == "torch":
            shape, top = names["pixels"].shape, names["pixels"][0, :, :32, :43]
            assert shape == (1, 3, 32, 48) and names["pixels"][0, 0, 0, 43] == 0.5
            assert np.allclose(top, np.array([200, 30, 30]).reshape(3, 1, 1) / 255)
        if job == "fewshot" and form == "timm":
            assert "(block 0, pool of the model)" in (tmp_path / form / "README.md").read_text()


def test_the_arm_that_is_best_on_validation_is_taken_and_named(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["merge", str(run)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^arm +lora   the best on validation   heads 0\.\d+   lora (1|0\.\d+)$", text, re.M), text
    assert (run / "merged-lora-seed-0" / "README.md").exists()
    assert main(["export", str(run), "--arm", "best:1", "--format", "torch", "--quiet"]) == 0
    assert (run / "export-torch-lora-seed-1").is_dir()
    error = refused(capsys, "merge", run, "--arm", "best:7", "--quiet")
    assert "arm 'lora' has no seed '7'" in error
    # The scores that chose the rates are taken as they are; the first of equal ones counts.
    copied = tmp_path / run.name
    shutil.copytree(run, copied)
    for arm, score in (("heads", 0.5), ("lora", 0.5)):
        file = copied / "arms" / arm / CHOSEN
        lr = read_sealed(file, "", {"lr": float, "validation": dict[str, float | None]})["lr"]
        file.write_text(sealed({"lr": lr, "validation": {f"{lr:g}": score}}))
    assert main(["merge", str(copied)]) == 0
    assert (
        "heads   the first of 2 that are equally good on validation   heads 0.5   lora 0.5" in capsys.readouterr().out
    )


def test_a_run_without_validation_names_its_arms(pictures: Path, tmp_path: Path, capsys) -> None:
    task = {"name": "mine", "train": [str(pictures)], "test_share": 0.2}
    config = {
        "task": "multitask",
        "model": {"name": "short_vit", "img_size": 32, "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "batch": 8,
        "tasks": [task, {**task, "name": "other", "train": ["digits"], "limit": 20}],
        "arms": {"heads": {"adapt": None}, "lora": {}},
        "train": {"steps": 1},
    }
    run = trained(tmp_path / "mine.yaml", config)
    for command in (["merge", run], ["export", run, "--arm", "best"], ["predict", run, pictures / "red"]):
        error = refused(capsys, *command, "--quiet")
        assert "no validation score tells its arms apart; name one with --arm" in error
        assert "heads, lora" in error and "nothing to validate on" in error
    arms = {"mine": {"trained_tasks": ["mine"]}, "other": {"trained_tasks": ["other"]}}
    apart = trained(tmp_path / "apart.yaml", {**config, "arms": arms})
    assert "trained on different tasks" in refused(capsys, "merge", apart, "--quiet")
    arms = {**arms, "all": {}}
    together = trained(tmp_path / "together.yaml", {**config, "arms": arms})
    assert main(["merge", str(together)]) == 0
    assert "all   the only one that is trained on every task" in capsys.readouterr().out


def test_a_folder_of_class_folders_has_an_accuracy(run: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    own = tmp_path / "test" / "deep"
    shutil.copytree(pictures, own)
    shutil.copytree(pictures / "red", own / "rad")
    (own / ".hidden").mkdir()
    shutil.copy(pictures / "red" / "00.png", own / ".hidden")
    found = vismt.predict(run, tmp_path / "test", arm="lora", to=tmp_path / "out")
    text = capsys.readouterr().out
    assert len(found.rows) == 48 and "12 images are not counted: the model has no class 'rad'. Near: 'red'" in text
    counted = [row for row in found.rows if "true_label" in row]
    assert {row["true_label"] for row in counted} == set(COLOURS) and len(counted) == 36
    right = sum(row["label"] == row["true_label"] for row in counted)
    assert right > 12 and found.accuracy is not None and found.accuracy["n"] == 36
    assert found.accuracy["value"] == pytest.approx(right / 36)
    assert found.accuracy["low"] < right / 36 < found.accuracy["high"] or right == 36
    assert f"accuracy {100 * right / 36:.1f}" in text and "n = 36 images" in text and "trained on" not in text
    # The images of the run itself have been trained on, which is said.
    vismt.predict(run, pictures, arm="lora", to=tmp_path / "again")
    assert "has images that the run was trained on" in capsys.readouterr().out
    flat = vismt.predict(run, pictures / "red", arm="lora", to=tmp_path / "flat")
    assert flat.accuracy is None and "true_label" not in flat.rows[0] and "accuracy" not in capsys.readouterr().out
    # Also an exported folder, and a few-shot classifier of a folder of examples.
    assert main(["export", str(run), "--arm", "lora", "--to", str(tmp_path / "timm"), "--quiet"]) == 0
    exported = vismt.predict(tmp_path / "timm", own, to=tmp_path / "of export")
    assert exported.accuracy == found.accuracy


def test_readmes_name_no_path_of_the_machine(run: Path) -> None:
    assert main(["export", str(run), "--arm", "lora", "--quiet"]) == 0
    text = (run / "export-timm-lora-seed-0" / "README.md").read_text()
    assert os.fspath(run.parent) not in text and run.name in text
    assert pyramids.ABOUT  # registers short_vit
