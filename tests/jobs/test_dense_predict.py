"""What is drawn and written of predictions, with a net whose answers are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vismt.config.typed import build
from vismt.jobs.multitask import maps_predict as dense_predict
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.predictions import Options, image_files
from vismt.multitask.tasks import make_task
from vismt.multitask.tasks.maps import InverseDepth

CARD = (
    "name: rooms\ntitle: Made\nsource: own\nlicence: own\nclasses: 2\nsources:\n"
    "  - {kind: dense, root: rooms, image: rgb, maps: {MAPS}, splits: {all: 2}}\n"
)
CANVAS = (32, 48)


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """answers(maps, task, channels, images, **how): the .npz of each image of a run whose net says 2.0 everywhere."""
    calls: dict[str, list] = {"flip": [], "texts": []}
    written = dense_predict.write
    monkeypatch.setattr(
        dense_predict,
        "write",
        lambda figure, x, y, text, **how: calls["texts"].append(text) or written(figure, x, y, text, **how),
    )

    def predicted(net, tasks, images, *, overlap, flip, scales):
        calls["flip"].append(flip)
        return {name: torch.full((1, task.channels, *images.shape[-2:]), 2.0) for name, task in tasks.items()}

    monkeypatch.setattr(dense_predict, "predict", predicted)

    def run(maps: str, sizes: list[tuple[int, int]], evaluate: dict | None = None, **how: bool) -> list[dict]:
        card = tmp_path / "rooms"
        card.mkdir(exist_ok=True)
        (card / "card.yaml").write_text(CARD.replace("{MAPS}", maps))
        raw = {"data": {"train": [str(card)], "test_share": 0.5}, "tasks": ["depth"], "size": list(CANVAS)}
        config = build(MultitaskConfig, {**raw, "evaluate": evaluate or {}}, "made")
        images = []
        for number, (height, width) in enumerate(sizes):
            images.append(tmp_path / f"{number}.png")
            Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(images[-1])
        net = SimpleNamespace(to=lambda device: None)
        options = Options(maps=True, **how)
        files = image_files(images, tmp_path / "to")
        named = dense_predict.named_tasks(config, dense_predict.names_in_sets(config))
        dense_predict.predict_images(config, net, *named, "adapted", files, tmp_path, options, {})
        return [dict(np.load(path.with_suffix(".npz"))) for path in images]

    return SimpleNamespace(run=run, calls=calls)


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
    for arrays, size, value in zip(answers.run(maps, sizes, own_size=True), sizes, values):
        assert arrays["depth"].shape == size and np.allclose(arrays["depth"], value)
    assert answers.calls["texts"].count(f"near {values[0]:.2f} to far {values[0]:.2f}") == 1  # the picture says it, too
    assert all(np.allclose(arrays["depth"], 2.0) for arrays in answers.run(maps, sizes))


def test_the_mirrored_image_is_averaged_as_in_the_runs_evaluation(answers) -> None:
    for evaluate, how, flip in (({}, {}, False), ({"flip": True}, {}, True), ({}, {"flip": True}, True)):
        answers.calls["flip"].clear()
        answers.run("{depth_m: depth}", [(32, 48)], evaluate, **how)
        assert answers.calls["flip"] == [flip]


def test_the_ends_of_the_range_are_near_and_far(answers) -> None:
    values = torch.linspace(0, 100, 101)[None, None].flip(-1)
    depth = make_task("depth")
    assert depth.caption(values[0]) == "near 1.00 to far 99.00"
    assert InverseDepth.of(depth).caption(values[0]) == "near 99.00 to far 1.00"
    assert make_task("normals").caption(values[0]) == ""


def test_pictures_of_any_number_of_pixels_have_a_range() -> None:
    values = torch.arange(2**24 + 2).remainder(1000).float()[None, None]  # torch.quantile ends at 2^24
    assert make_task("depth").caption(values[0]) == "near 9.00 to far 989.00"


@pytest.mark.parametrize("names", [{"n01": "apple", "n02": "pear"}, ["apple", "pear"]])
def test_classes_of_images_have_the_readable_names(names: object, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(sources=[object()], read_names=lambda: names, sources_of=lambda kind: [])
    monkeypatch.setattr(dense_predict, "load_card", lambda _: card)
    monkeypatch.setattr(dense_predict, "open_samples", lambda *_: SimpleNamespace(image_classes=["apple", "pear"]))
    data = {"train": ["fruit:train"], "test": ["fruit:test"]}
    config = build(
        MultitaskConfig, {"tasks": [{"name": "classify", "classes": 2}], "size": list(CANVAS), "data": data}, "made"
    )
    assert dense_predict.names_in_sets(config)["classes"] == {"classify": ["apple", "pear"]}


def test_parts_are_called_by_their_names(answers, tmp_path: Path) -> None:
    config = build(MultitaskConfig, {"tasks": ["parts"], "size": list(CANVAS)}, "made")
    tasks = {"parts": make_task("parts")}
    names = dense_predict.names_in_sets(config)["classes"]
    torso = torch.eye(7)[2].reshape(7, 1, 1).expand(7, *CANVAS)
    dense_predict.draw_predictions(torch.zeros(3, *CANVAS), {"parts": torso}, tasks, names, tmp_path / "a.png")
    assert "torso" in answers.calls["texts"] and not any(text.startswith("class ") for text in answers.calls["texts"])
    config.tasks = [{"name": "parts", "classes": 5}]
    assert dense_predict.names_in_sets(config)["classes"] == {}


def test_classes_of_pixels_and_of_the_image_are_named(answers, tmp_path: Path) -> None:
    tasks = {
        "semseg": make_task({"name": "semseg", "classes": 3}),
        "classify": make_task({"name": "classify", "classes": 2}),
    }
    labels = torch.zeros(CANVAS, dtype=torch.int64)
    labels[:10] = 2
    outputs = {"semseg": torch.eye(3)[labels].movedim(-1, 0), "classify": torch.tensor([0.0, 3.0])}
    names = {"classify": ["indoor", "outdoor"]}
    dense_predict.draw_predictions(torch.zeros(3, *CANVAS), outputs, tasks, names, tmp_path / "a.png")
    texts = answers.calls["texts"]
    # softmax of 3 and 0: 1 / (1 + exp(-3)) = 95 %; the commoner class comes first, one that is nowhere not at all
    assert "outdoor 95 %" in texts and "class 1" not in texts
    assert texts.index("class 0") < texts.index("class 2")


def test_maps_are_pictures_alone_and_over_the_image(answers, tmp_path: Path) -> None:
    answers.run("{depth_m: depth}", [(20, 30)])
    alone, over = (np.asarray(Image.open(tmp_path / f"0-depth{ending}.png")) for ending in ("", "-overlay"))
    assert alone.shape == over.shape == (*np.load(tmp_path / "0.npz")["depth"].shape, 3)
    assert (over == np.round(alone / 2)).all() and alone.any()  # the image is black


def test_the_names_of_all_files_are_known_before_anything_is_written() -> None:
    tasks = {"depth": make_task("depth"), "classify": make_task({"name": "classify", "classes": 2})}
    images = {Path("a.png"): Path("a.png"), Path("b/..png"): Path("..png"), Path("b/c/a.png"): Path("c/a.png")}
    names = [name for name, _ in dense_predict.output_names(images, tasks, maps=True)]
    maps = [
        f"{stem}{ending}"
        for stem in ("a", ".", "c-a")
        for ending in (".png", ".npz", "-depth.png", "-depth-overlay.png")
    ]
    assert names == [*maps, "predictions.csv"]
    assert [name for name, _ in dense_predict.output_names(images, tasks, maps=False)] == [
        *("a.png", "..png", "c-a.png", names[-1])
    ]


def test_images_that_cannot_be_drawn_have_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    assert dense_predict.drawable(path).shape == dense_predict.drawable(path, 16).shape == (3, 4, 4)
    most = dense_predict.drawable(path, 15)["error"]
    assert "4 x 4 pixels; at their own size this run takes up to 15 pixels" in most
    for size in ((300, 1), (1, 300), (68, 4)):
        Image.fromarray(np.zeros(size, np.uint8)).save(path)
        assert (
            f"{size[1]} x {size[0]} pixels; one side may be 16 times the other" in dense_predict.drawable(path)["error"]
        )
    path.write_bytes(b"not an image")
    assert dense_predict.drawable(path)["error"].startswith(f"{path}: cannot be decoded (12 bytes: it is none of BMP")
