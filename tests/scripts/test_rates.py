"""The page of learning rates: chosen rates over LoRA's rate, good ranges, the rates of `vismt init`, and what is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import committed, rates
from scripts.study_rows import About, StudyRows

GRID = [1e-4, 3e-4, 1e-3, 3e-3]


def study(
    validation: dict[str, dict[str, float | None]] | None = None, factor_of_full: float = 1.0, **chosen: float
) -> StudyRows:
    costs = {arm: {"lr": lr, "trained": 1.0} for arm, lr in chosen.items()} | {"frozen": {"trained": 0.0}}
    settings = {"tune": {"rates": GRID}, "arms": {"full": {"train.rates": {".": factor_of_full}}}}
    about = About("t", "c", "hash", settings, [], "", "CPU", {}, "", "", 1.0, costs=costs)
    about.validation.update(validation or {})
    return StudyRows(about, [])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, rates.Choice]]:
    """Choices of two studies, of which one keeps the validation scores."""
    scores: dict[str, dict[str, float | None]] = {
        "lora": {"0.0001": 0.5, "0.0003": 0.79, "0.001": 0.8, "0.003": 0.6},
        "full": {"0.0001": 0.7, "0.0003": 0.35, "0.001": 0.7, "0.003": None},
    }
    of = {
        "race_fewshot": study(scores, lora=1e-3, full=1e-4),
        "starts": study(None, 0.3, lora=3e-3, full=1e-3, ipm=1e-3),
    }
    monkeypatch.setattr(rates, "studies", lambda: of)
    monkeypatch.setattr(committed, "study", of.__getitem__)
    return rates.choices()


def test_rates_are_in_units_of_the_rate_of_lora_of_the_same_study(found: dict[str, dict[str, rates.Choice]]) -> None:
    texts = {family: {method: choice.text for method, choice in of.items()} for family, of in found.items()}
    # 3e-3 and 1e-4 are ends of the grid; the second `full` tried 0.3 times the rates
    # `ipm` is an arm of CorDA, and an arm without training has no rate
    assert texts == {
        "few-shot": {"lora": "1", "full": "0.1*"},
        "language modelling": {"lora": "1*", "full": "0.1", "corda": "0.3"},
    }
    table = rates.page(found)
    assert "| Method | few-shot, LoRA at 1.0e-3 | language modelling, LoRA at 3.0e-3 |" in table
    assert "| `corda` | – | 0.3 |" in table


def test_good_range_ends_at_the_first_rate_below_the_share(found: dict[str, dict[str, rates.Choice]]) -> None:
    lora, full = found["few-shot"]["lora"], found["few-shot"]["full"]
    assert lora.good() == [3e-4, 1e-3]
    assert full.good() == [1e-4]  # 1e-3 is as good, but 3e-4 lies between
    assert (lora.beside(1), lora.beside(-1)) == ("75 %", "99 %")
    assert (full.beside(1), full.beside(-1)) == ("50 %", "–")
    assert not found["language modelling"]["lora"].scores


def test_init_begins_with_the_mean_rate_of_full_fine_tuning(
    found: dict[str, dict[str, rates.Choice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "JOBS", {"fewshot": "few-shot", "lm": "language modelling"})
    # the ratios 0.1 and 0.1 have the mean 0.1
    assert rates.starts(found).splitlines()[1:] == [
        "methods:",
        "  full: 0.1",
        "jobs:",
        "  fewshot: 1.0e-3",
        "  lm: 3.0e-3",
    ]
    found["few-shot"]["full"] = rates.Choice(1e-5, 1e-3, tuple(GRID), {})  # 0.01 and 0.1: the mean is 0.03
    assert rates.starts(found).splitlines()[2] == "  full: 0.03"


def test_a_picture_is_drawn(found: dict[str, dict[str, rates.Choice]], tmp_path: Path) -> None:
    rates.draw(found, tmp_path / "rates.svg")
    assert "<svg" in (tmp_path / "rates.svg").read_text()


def test_committed_rates_are_up_to_date() -> None:
    assert rates.main(["--check"]) == 0
