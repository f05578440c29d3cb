"""The prediction panel of a dense run: a figure that can be read, and damaged files."""

import math

import numpy as np
import pytest
from helpers.readable import assert_readable, visible_texts

from vismt.jobs.multitask.config import PANELS
from vismt.jobs.multitask.figures import predictions_figure, sections
from vismt.report.panels import read_panel, write_arrays

DEPTH, EDGE = "RMSE in m", "odsF"


def panel(path, arms=("heads", "emtal"), count=2, size=(24, 32), **changes):
    generator = np.random.default_rng(0)

    def bytes_(*shape):
        return generator.integers(0, 255, (*shape, 3, *size), dtype=np.uint8)

    trained = np.ones((len(arms), 2), dtype=bool)
    trained[0, 1] = False
    scores = generator.uniform(0.1, 0.9, (len(arms), 2, count))
    scores[1, 0, 0] = math.nan
    return write_arrays(
        path,
        {
            "images": bytes_(count),
            "ids": np.array([f"rooms:test/{i}_a_name_that_is_long.png" for i in range(count)]),
            "tasks": np.array(["depth", "edge"]),
            "metrics": np.array([DEPTH, EDGE]),
            "shares": np.array([False, True]),
            "lower_is_better": np.array([True, False]),
            "truth": bytes_(2, count),
            "arms": np.array(arms),
            "trainings": np.array(list(arms)),
            "trained": trained,
            "predictions": bytes_(len(arms), 2, count),
            "scores": scores,
            "classes": np.array(["wall", "door", "floor"]),
            "colors": np.array(["#aa3377", "#112233", "#00ff00"]),
            **changes,
        },
    )


@pytest.mark.parametrize(
    ("arms", "count", "size"), [(2, 1, (24, 32)), (2, 4, (40, 32)), (7, 2, (24, 48)), (12, 2, (32, 32))]
)
def test_panels_can_be_read(drawn, tmp_path, arms, count, size):
    names = ["heads", "a_name_that_does_not_end_soon", *(f"lora-{i}" for i in range(10))][:arms]
    predictions_figure(panel(tmp_path / "a.npz", names, count, size), tmp_path / "a.png")
    assert_readable(drawn[0])
    assert drawn[0].get_size_inches()[0] <= 11.05
    # Input, truth of two tasks, and predictions but those of a task that the first arm does not train.
    assert len(drawn[0].axes) == count * (1 + 2 + 2 * arms - 1)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["wall", "door", "floor"]


def test_every_picture_stands_at_its_name_with_its_own_score(drawn, tmp_path):
    arrays = read_panel(panel(tmp_path / "a.npz"))
    predictions_figure(tmp_path / "a.npz", tmp_path / "a.png")
    figure = drawn[0]
    places = {text: box for text, box in visible_texts(figure)}
    shown = {}
    for axes in figure.axes:
        box = axes.get_window_extent()
        shown[axes.images[0].get_array().tobytes()] = box

    def box_of(pixels):
        return shown[np.ascontiguousarray(np.moveaxis(pixels, 0, -1)).tobytes()]

    emtal = box_of(arrays["predictions"][1, 1, 0])
    (score,) = (box for text, box in places.items() if text == f"{100 * arrays['scores'][1, 1, 0]:.1f}")
    assert abs(score.x0 - emtal.x0) < 4 and 0 < emtal.y0 - score.y1 < 20
    truth, heads = box_of(arrays["truth"][1, 0]), box_of(arrays["predictions"][0, 0, 0])
    assert truth.x1 < heads.x0 < emtal.x0 and truth.y0 == pytest.approx(emtal.y0)
    assert heads.y0 == pytest.approx(box_of(arrays["images"][0]).y0) and heads.y0 > emtal.y1
    texts = [text for text, _ in visible_texts(figure)]
    assert texts.count("–") == 1 and texts.count("emtal") == 2 and texts.count(f"edge {EDGE} in % ↑") == 2


def test_a_report_shows_the_panel_where_there_is_one(tmp_path):
    (section,) = sections(tmp_path)
    assert not section.pictures and section.folded
    panel(tmp_path / PANELS)
    ((picture,),) = (section.pictures for section in sections(tmp_path))
    assert picture.title == "Predictions" and picture.path == tmp_path / "figures" / "predictions.svg"
    assert picture.path.exists() and "not chosen by result" in picture.caption
