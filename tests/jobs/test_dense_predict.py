"""What is drawn and written of predictions, with a net whose answers are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vismt.config import typed
from vismt.engine.arms import Unit
from vismt.jobs.dense import predict as dense_predict
from vismt.jobs.dense.config import DenseConfig
from vismt.multitask.tasks import make_task
from vismt.multitask.tasks.depth import InverseDepth

CARD = (
    "name: rooms\ntitle: Made\nsource: own\nlicence: own\nclasses: 2\nsources:\n"
    "  - {kind: dense, root: rooms, image: rgb, maps: {MAPS}, splits: {all: 2}}\n"
)
CANVAS = (32, 48)


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """answers(maps, task, channels, images, **how): the .npz of each image of a run whose net says 2.0 everywhere."""
    seen: dict[str, list] = {"flip": [], "texts": []}
    written = dense_predict.write
    monkeypatch.setattr(dense_predict, "loaded", lambda *given: SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(dense_predict, "fold", lambda net, unit: net)
    monkeypatch.setattr(
        dense_predict,
        "write",
        lambda figure, x, y, text, **how: seen["texts"].append(text) or written(figure, x, y, text, **how),
    )

    def predicted(net, tasks, images, *, overlap, flip):
        seen["flip"].append(flip)
        return {name: torch.full((1, task.channels, *images.shape[-2:]), 2.0) for name, task in tasks.items()}

    monkeypatch.setattr(dense_predict, "predict", predicted)

    def run(maps: str, sizes: list[tuple[int, int]], evaluate: dict | None = None, **how: bool) -> list[dict]:
        card = tmp_path / "rooms"
        card.mkdir(exist_ok=True)
        (card / "card.yaml").write_text(CARD.replace("{MAPS}", maps))
        raw = {"data": {"train": [str(card)], "test_share": 0.5}, "tasks": ["depth"], "size": list(CANVAS)}
        config = typed({**raw, "evaluate": evaluate or {}}, DenseConfig, "made")
        images = []
        for number, (height, width) in enumerate(sizes):
            images.append(tmp_path / f"{number}.png")
            Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(images[-1])
        dense_predict.predict_images(config, Unit("adapted", 1e-3, 0, tmp_path), images, tmp_path, maps=True, **how)
        return [dict(np.load(path.with_suffix(".npz"))) for path in images]

    return SimpleNamespace(run=run, seen=seen)


@pytest.mark.parametrize(
    ("maps", "values"),
    [
        # Fitted into 32 x 48: an image of 64 x 60 by 1/2, of 20 x 144 by 1/3, of 16 x 24 by 2.
        ("{depth_m: depth}", (4.0, 6.0, 1.0)),
        ("{inverse_depth: depth}", (1.0, 2 / 3, 4.0)),
    ],
)
def test_depth_at_an_images_own_size_is_in_the_unit_of_the_fitted_one(answers, maps, values) -> None:
    sizes = [(64, 60), (20, 144), (16, 24)]
    for found, size, value in zip(answers.run(maps, sizes, own_size=True), sizes, values):
        assert found["depth"].shape == size and np.allclose(found["depth"], value)
    assert answers.seen["texts"].count(f"near {values[0]:.2f} to far {values[0]:.2f}") == 1  # the picture says it, too
    assert all(np.allclose(found["depth"], 2.0) for found in answers.run(maps, sizes))


def test_the_mirrored_image_is_averaged_as_in_the_runs_evaluation(answers) -> None:
    for evaluate, how, flip in (({}, {}, False), ({"flip": True}, {}, True), ({}, {"flip": True}, True)):
        answers.seen["flip"].clear()
        answers.run("{depth_m: depth}", [(32, 48)], evaluate, **how)
        assert answers.seen["flip"] == [flip]


def test_the_ends_of_the_range_are_near_and_far(answers) -> None:
    values = torch.linspace(0, 100, 101)[None, None].flip(-1)
    depth = make_task("depth")
    assert dense_predict._range(depth, values) == "near 1.00 to far 99.00"
    assert dense_predict._range(InverseDepth.of(depth), values) == "near 99.00 to far 1.00"
    assert dense_predict._range(make_task("normals"), values) == ""


def test_pictures_of_any_number_of_pixels_have_a_range() -> None:
    values = torch.arange(2**24 + 2).remainder(1000).float()[None, None]  # torch.quantile ends at 2^24
    assert dense_predict._range(make_task("depth"), values) == "near 9.00 to far 989.00"


def test_parts_are_called_by_their_names(answers, tmp_path: Path) -> None:
    config = typed({"tasks": ["parts"], "size": list(CANVAS)}, DenseConfig, "made")
    tasks = {"parts": make_task("parts")}
    names = dense_predict.class_names(config, tasks)
    torso = torch.eye(7)[2].reshape(7, 1, 1).expand(7, *CANVAS)
    dense_predict.picture(torch.zeros(3, *CANVAS), {"parts": torso}, tasks, names, tmp_path / "a.png")
    assert "torso" in answers.seen["texts"] and not any(text.startswith("class ") for text in answers.seen["texts"])
    assert dense_predict.class_names(config, {"parts": make_task({"name": "parts", "classes": 5})}) == {}
