"""A measure of probabilities that stands in the table alone is in the records, the results and the report of the jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.blank import empty_figures
from helpers.tiny_runs import FEWSHOT, TRAIN, VIT, run_config, written

from vismt.report.results import read_results
from vismt.storage.lines import read_lines
from vismt.storage.records import Field
from vismt.uncertainty.probability_metrics import MEASURES, ProbabilityMeasure

DOUBT = ProbabilityMeasure("doubt", "doubt", lambda log_p, labels: 1 - log_p.exp().amax(1), Field(0, 1))
MULTITASK = {
    "task": "multitask",
    "model": VIT,
    "adapt": None,
    "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40}],
    "batch": 8,
    "train": TRAIN,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{**FEWSHOT, "adapt": None, "train": None, "select": None}, MULTITASK], ids=["fewshot", "multitask"]
)
def test_a_measure_of_a_user_is_in_the_results(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_figures(monkeypatch)
    MEASURES.append(DOUBT)
    try:
        run = run_config(written(tmp_path / "run.yaml", config))
    finally:
        MEASURES.remove(DOUBT)
    rows = [row for row in read_results(run / "results.jsonl") if row.metric == "doubt"]
    assert rows and all(0 < row.value < 1 and row.low < row.value < row.high for row in rows)
    kept = [line for path in run.rglob("*.jsonl") for line in read_lines(path) if "clean doubt" in line]
    assert kept and "doubt" in (run / "report.md").read_text()
