"""The metric and the dense task of docs/extending.md: short, right, and found by the module that a configuration names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.pages import ROOT, blocks

from vismt.base.errors import UserError
from vismt.base.registry import import_own
from vismt.config.typed import build
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.multitask.tasks import TASKS, make_task

PAGE = ROOT / "docs" / "extending.md"
LINES = 40


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module `mine` in the working folder with the code of the page."""
    parts = [blocks(PAGE, "python", heading)[0].code for heading in ("A metric in the report", "A dense task")]
    assert all(len(part.strip().splitlines()) < LINES for part in parts)
    (tmp_path / "mine.py").write_text("\n".join(parts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TASKS, "_items", dict(TASKS._items))  # what is registered here is not known to other tests
    yield "mine"
    sys.modules.pop("mine", None)


def test_the_page_shows_a_metric_and_a_task_that_are_right(mine: str) -> None:
    import_own(mine, "module")
    near = make_task({"name": "near", "below": 1.5})
    metric = near.metric()
    target = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])  # the last pixel has no value
    near.update(metric, torch.tensor([[[[1.0, -1.0], [1.0, 5.0]]]]), target)
    assert near.values(metric.compute()) == pytest.approx({"miou": (1 / 3 + 0) / 2, "pixel_accuracy": 1 / 3})
    assert near.headline.name == "mIoU" and near.below == 1.5
    assert float(near.constant(torch.tensor([1.0, 1.0, 1.0, 2.0])).sigmoid()) == pytest.approx(0.75)
    picture = near.picture(torch.tensor([[[1.0, -1.0]]]))
    assert picture[0].tolist() == [[255, 0]] and near.picture(target[0])[0].tolist() == [[255, 255], [0, 64]]
    close = make_task("close_depth")
    metric = close.metric()
    close.update(metric, torch.tensor([[[[1.05, 1.5], [2.0, 9.0]]]]), target)
    values = close.values(metric.compute())
    assert values["close"] == pytest.approx(2 / 3) and values["delta1"] == pytest.approx(2 / 3)
    assert close.numbers["close"].name == "within 10 cm"


def test_a_module_is_named_at_the_top_of_the_file() -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: module: cannot import 'no_such_module'"):
        build(FewShotConfig, {"module": "no_such_module"}, "mine.yaml")
    with pytest.raises(UserError, match="task: module: name the module at the top of the file"):
        make_task({"name": "near", "module": "mine"})
    with pytest.raises(UserError, match=r"unknown key 'adapt.module'. Name the module at the top of the file"):
        build(FewShotConfig, {"adapt": {"module": "mine"}}, "mine.yaml")
