"""A dense run whose test images lack things: a class, every label of a task, the right size."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import pyramids  # noqa: F401  registers short_vit
from helpers.tiny_runs import written
from PIL import Image

from vismt.cli import main
from vismt.jobs import open_run
from vismt.jobs.multitask.figures import read_numbers
from vismt.multitask.tasks.base import DARK
from vismt.report.panels import read_panel
from vismt.report.results import EXAMPLE, RECORDS, Result, read_results
from vismt.storage.lines import read_lines

CARD = """name: rooms
title: Rooms
source: tests
licence: none
classes: 4
sources:
  - kind: dense
    root: rooms
    image: "{split}/rgb"
    maps: {label: "{split}/label", depth_mm: "{split}/depth"}
    splits: {train: 4, test: 4}
    void: 255
"""
SIZE = (32, 48)


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the test maps. Left and right differ in colour, class and depth; class 2 is a stripe, class 3 is nowhere."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("rgb", "label", "depth"):
            (tmp_path / "data" / "rooms" / split / name).mkdir(parents=True)
        for number in range(4):
            label = np.repeat(np.arange(SIZE[1])[None] // (20 + number), SIZE[0], 0).astype(np.uint8)
            image = 60 + 60 * label[..., None] + generator.integers(0, 40, (*SIZE, 3))
            folder = tmp_path / "data" / "rooms" / split
            Image.fromarray(image.astype(np.uint8)).save(folder / "rgb" / f"{number}.png")
            Image.fromarray(label).save(folder / "label" / f"{number}.png")
            Image.fromarray(1000 + 500 * label.astype(np.uint16)).save(folder / "depth" / f"{number}.png")
    (tmp_path / "cards" / "rooms").mkdir(parents=True)
    (tmp_path / "cards" / "rooms" / "card.yaml").write_text(CARD)
    monkeypatch.setenv("VISMT_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "rooms" / "test"


def run(folder: Path, **changes: object) -> int:
    card = folder / "cards" / "rooms" / "card.yaml"
    config = {
        "task": "dense",
        "model": {"name": "short_vit", "pretrained": False},
        "adapt": None,
        "size": list(SIZE),
        "data": {"train": [f"{card}:train"], "test": [f"{card}:test"]},
        "head": {"name": "linear"},
        "batch": 2,
        "tasks": [{"name": "semseg", "classes": 4}, "depth"],
        "augment": {"strength": 0, "scales": [1.0, 1.0]},
        "train": {"steps": 12, "lr": 3e-2, "checkpoint_every": 12},
        **changes,
    }
    path = written(folder / "rooms.yaml", config)
    return main(["run", str(path), "--out", str(folder / "runs")])


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def only_training(folder: Path) -> dict:
    """Return what the metrics compute by task of the only training of a run; NaN and the like are not JSON."""
    (path,) = folder.glob("arms/*/*/records/test.numbers.json")
    return json.loads(path.read_text(), parse_constant=refuse)["numbers"]


def rows_by_task(folder: Path) -> dict[tuple[str, str], Result]:
    """Return the scores of trained arms by arm and task."""
    rows = [row for row in read_results(folder / "results.jsonl") if not row.further and row.arm != "constant"]
    return {(row.arm, row.task): row for row in rows}


def test_a_class_that_is_nowhere(rooms: Path, tmp_path: Path) -> None:
    scored = {}
    for absent in ("zero", "skip", "nan"):
        tasks = [{"name": "semseg", "classes": 4, "absent": absent}, "depth"]
        assert run(tmp_path, tasks=tasks, train={"steps": 30, "lr": 3e-2, "checkpoint_every": 30}) == 0
        (folder,) = (tmp_path / "runs").iterdir()  # `absent` belongs to the scores, not to the training
        rows = {task: row for (_, task), row in rows_by_task(folder).items()}
        assert ("semseg" in rows) == (absent != "nan")
        if absent != "nan":
            scored[absent] = only_training(folder)["semseg"]
            assert rows["semseg"].metric == "mIoU" and rows["semseg"].value == pytest.approx(scored[absent]["miou"])
    zero, skip = scored["zero"], scored["skip"]
    classes = skip["iou"][:3]
    assert min(classes) > 0 and skip["iou"] == zero["iou"] == [*classes, None]
    assert zero["miou"] == pytest.approx(sum(classes) / 4) and skip["miou"] == pytest.approx(sum(classes) / 3)
    text = (folder / "report.md").read_text()
    assert "Undefined scores" in text and "a class that is nowhere takes the whole mean along" in text


def test_an_image_without_a_valid_pixel_of_a_task(rooms: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(rooms / "label" / "1.png")
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(rooms / "depth" / "2.png")
    assert run(tmp_path, arms={"slow": {"train.lr": 3e-3}, "fast": {}}, baseline="slow") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    rows = rows_by_task(folder)
    assert {key: row.n for key, row in rows.items()} == {
        ("slow", "semseg"): 3,
        ("slow", "depth"): 3,
        ("fast", "semseg"): 3,
        ("fast", "depth"): 3,
        ("fast", "delta_m"): 4,
    }
    psi = {
        key: {line[EXAMPLE]: line["clean"] for line in read_lines(folder / RECORDS / f"{row.stem}.jsonl")}
        for key, row in rows.items()
    }
    names = [f"rooms:test/rgb/{number}.png" for number in range(4)]
    assert list(psi["fast", "semseg"]) == [names[0], names[2], names[3]] and names[2] not in psi["slow", "depth"]
    # Image 1 has a depth alone: psi - delta_m = -100 / 2 * 4 / 3 * d(M / B), four images, three of them with a depth.
    score, base = (rows[arm, "depth"].value for arm in ("fast", "slow"))
    change, base_change = psi["fast", "depth"][names[1]] - score, psi["slow", "depth"][names[1]] - base
    effect = psi["fast", "delta_m"][names[1]] - rows["fast", "delta_m"].value
    assert effect == pytest.approx(-100 / 2 * 4 / 3 * (change / base - score * base_change / base**2))
    panel = read_panel(folder / "dense_panels.npz")
    assert panel["ids"].tolist() == names and panel["tasks"].tolist() == ["semseg", "depth"]
    lacking = {(0, 1), (1, 2)}
    for task in (0, 1):
        for image in range(4):
            assert bool((panel["truth"][task, image] == DARK).all()) == ((task, image) in lacking)
            assert all(math.isnan(score) == ((task, image) in lacking) for score in panel["scores"][:, task, image])
    assert not any((picture == DARK).all() for picture in panel["predictions"].reshape(-1, 3, *SIZE))
    report = (folder / "report.md").read_text()
    assert "### test images at 32 x 48, rooms" in report
    head = next(line for line in report.splitlines() if line.startswith("| Model | semseg mIoU in % ↑, n = 3 |"))
    assert re.findall(r"n = (\d+)", head) == ["3", "3", "4"]


def test_depth_is_compared_tuned_and_reported_by_its_measure(rooms: Path, tmp_path: Path) -> None:
    """Rows, delta_m and the choice of the rate, each by the relative error and none by the RMSE."""
    card = tmp_path / "cards" / "rooms" / "card.yaml"
    changes = {
        "tasks": [{"name": "depth", "measure": "abs_rel"}],
        "tune": {"rates": [1e-6, 3e-2]},
        "baseline": "base",
        "data": {"train": [f"{card}:train"], "validation_share": 0.5, "test": [f"{card}:test"]},
        "arms": {"base": {}, "longer": {"train.steps": 24}},
    }
    assert run(tmp_path, **changes) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    rows = rows_by_task(folder)
    assert {(arm, row.task, row.metric) for (arm, _), row in rows.items()} == {
        ("base", "depth", "mean relative error"),
        ("longer", "depth", "mean relative error"),
        ("longer", "delta_m", "over base in per cent"),
    }
    assert rows["base", "depth"].better == "lower"
    job = open_run(folder).job
    for arm in ("base", "longer"):
        (training,) = job.study.trainings(arm)
        numbers = read_numbers(training.folder / "records" / "test.numbers.json")["numbers"]["depth"]
        assert numbers["abs_rel"] != pytest.approx(numbers["rmse"], rel=0.01)
        assert rows[arm, "depth"].value == pytest.approx(numbers["abs_rel"])
    longer, base = (rows[arm, "depth"].value for arm in ("longer", "base"))
    assert rows["longer", "delta_m"].value == pytest.approx(100 * (base - longer) / base)
    chosen = json.loads((folder / "arms" / "base" / "chosen.json").read_text())
    for rate, score in chosen["validation"].items():
        training = job.study.training("base", float(rate), 0)
        numbers = read_numbers(training.folder / "records" / "validation.numbers.json")["numbers"]["depth"]
        assert score == pytest.approx(1 / numbers["abs_rel"])
    assert chosen["lr"] == 3e-2


def test_too_few_images_with_a_value(rooms: Path, tmp_path: Path, capsys) -> None:
    for number in (0, 1, 3):
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(rooms / "label" / f"{number}.png")
    assert run(tmp_path) == 2
    assert "1 image(s) with a value for semseg; an interval needs two or more" in capsys.readouterr().err


def test_a_label_map_of_another_size(rooms: Path, tmp_path: Path, capsys) -> None:
    """Named in one line before anything is trained, and the same command goes on once the file is right."""
    good = (rooms / "label" / "2.png").read_bytes()
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(rooms / "label" / "2.png")
    assert run(tmp_path) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "rooms/test/label/2.png: the map is (16, 24), its image is (32, 48)" in message
    assert "bring the file to the size of its image" in message
    (rooms / "label" / "2.png").write_bytes(good)
    assert run(tmp_path) == 0
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 1


def test_inverse_depth_has_a_delta_m(rooms: Path, tmp_path: Path) -> None:
    card = tmp_path / "cards" / "rooms" / "card.yaml"
    card.write_text(CARD.replace("depth_mm", "inverse_depth"))
    for path in rooms.parent.glob("*/depth/*.png"):
        np.save(path.with_suffix(".npy"), 1000 / np.asarray(Image.open(path), np.float32))
        path.unlink()
    assert run(tmp_path, arms={"slow": {"train.lr": 3e-3}, "fast": {}}, baseline="slow") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    rows = rows_by_task(folder)
    assert rows["slow", "depth"].metric == "RMSE"  # without a unit
    assert open_run(folder).job.graph("fast", "torch").outputs["depth"]["task"] == "InverseDepth"
    gains = [
        rows["fast", "semseg"].value / rows["slow", "semseg"].value - 1,
        1 - rows["fast", "depth"].value / rows["slow", "depth"].value,
    ]
    assert rows["fast", "delta_m"].value == pytest.approx(100 * sum(gains) / 2)
