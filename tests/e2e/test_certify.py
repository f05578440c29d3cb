"""evaluate.certify in every job that classifies images: rows at each radius, abstentions, and the figure."""

from pathlib import Path

import pytest
from helpers.tiny_runs import CONFIGS, FEWSHOT, run_config, written

from vismt.base.errors import UserError
from vismt.jobs import load_config
from vismt.jobs.robustness.config import check
from vismt.report.results import read_results

CERTIFY = {"sigma": 0.5, "samples": 20, "alpha": 0.05}  # reaches 0.5 Phi^-1(0.05^(1/20)) = 0.54
ROBUSTNESS = {
    "task": "robustness",
    "classifier": {"name": "test_vit", "pretrained": False, "img_size": 32},
    "data": ["digits"],
    "evaluate": {"images": 4, "certify": CERTIFY},
}
FUNCTION = """
import torch
from torch import nn

def load():
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10)), 10
"""


def check_rows(run: Path, sets: int, arms: int) -> None:
    rows = [row for row in read_results(run / "results.jsonl") if row.kind == "certified" and row.seed is None]
    radii = {row.condition: row.level for row in rows if row.metric == "accuracy"}
    assert radii == {f"smoothed 0.5 certified l2 {radius:g}": radius for radius in (0.0, 0.25, 0.5)}
    assert len(rows) == (3 + 1) * sets * arms
    for first in (row for row in rows if row.level == 0):
        of_set = [row for row in rows if (row.arm, row.data) == (first.arm, first.data)]
        values = [row.value for row in sorted(of_set, key=lambda row: row.level or 0.0) if row.metric == "accuracy"]
        abstained = next(row.value for row in of_set if row.metric == "abstentions")
        assert values == sorted(values, reverse=True) and values[0] + abstained <= 1 + 1e-9
    assert (
        list((run / "figures").glob("certified-*.svg")) and "certified by l2 radius" in (run / "report.md").read_text()
    )


def test_robustness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear_model.py").write_text(FUNCTION)
    classifier = {"function": "linear_model:load", "size": 16}
    attacks = [{"name": "fgsm", "norm": "l2", "epsilon": 0.25}]
    evaluate = {**ROBUSTNESS["evaluate"], "images": 8, "attacks": attacks}
    run = run_config(written(tmp_path / "robust.yaml", {**ROBUSTNESS, "classifier": classifier, "evaluate": evaluate}))
    check_rows(run, 1, 1)


def test_classification(tmp_path: Path) -> None:
    config = {**CONFIGS["multitask"], "adapt": None, "fade": None}
    config["tasks"] = [{"name": "digits", "train": ["digits"], "test_share": 0.01, "limit": 20}]
    config["evaluate"] = {"batch": 64, "certify": CERTIFY}
    check_rows(run_config(written(tmp_path / "tasks.yaml", config)), 1, 1)


def test_fewshot(tmp_path: Path) -> None:
    evaluate = {**FEWSHOT["evaluate"], "models": ["frozen"], "certify": CERTIFY, "episodes": 5, "queries": 1}
    config = {"model": FEWSHOT["model"], "adapt": None, "train": None, "evaluate": evaluate}
    check_rows(run_config(written(tmp_path / "fewshot.yaml", config)), 1, 1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate": {"certify": {"sigma": 0}}}, "evaluate.certify.sigma"),
        ({"evaluate": {"certify": {"sigma": 0.25, "samples": 3}}}, "samples 3 cannot certify anything"),
        (
            {"data": [], "evaluate": {"certify": CERTIFY}, "classifier": {"run": "runs/a"}},
            "what is for cards: evaluate.certify",
        ),
    ],
)
def test_one_line_errors(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        check(load_config(written(tmp_path / "robust.yaml", {**ROBUSTNESS, **changes})))
    assert "\n" not in str(error.value)
