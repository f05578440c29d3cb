"""Oracles and their yardsticks by hand and by enumeration, and the table that a report shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers.results import PGD, result, write_lines
from torch import Tensor

from vismt.jobs.fewshot.choice_report import choice_tables, choose
from vismt.jobs.fewshot.config import EvaluateConfig, FewShotConfig, PoolConfig, SelectConfig
from vismt.storage.files import sealed


def test_the_oracles_by_hand() -> None:
    # Choices: the first expert, the second, both (a tie).
    values = choose(torch.tensor([[1.0, 0.2, 0.6], [0.0, 0.8, 0.6]], dtype=torch.float64))
    assert values["oracle"].tolist() == [1.0, 0.8, 0.6]
    # Episode 0 under the choices of 1 and 2: (0 + (1 + 0) / 2) / 2 = .25; 1: (.2 + (.2 + .8) / 2) / 2 = .35; 2: .6.
    assert values["oracle, choices of other episodes"].tolist() == pytest.approx([0.25, 0.35, 0.6])


def enumerated(accuracies: Tensor) -> float:
    return float(torch.tensor([max(row) for row in itertools.product(*accuracies.tolist())]).mean())


def test_the_shuffled_oracle_is_the_mean_over_all_combinations() -> None:
    accuracies = (5 * torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).round() / 5
    values = choose(accuracies)["oracle, episodes shuffled"]
    assert float(values.mean()) == pytest.approx(enumerated(accuracies), abs=1e-6)
    # The jackknife: n times the whole less n - 1 times the rest, centred.
    rest = torch.tensor([enumerated(accuracies[:, [j for j in range(6) if j != i]]) for i in range(6)])
    assert torch.allclose(values - values.mean(), -5 * (rest - rest.mean()).double(), atol=1e-5)


def test_what_the_oracles_show() -> None:
    """Experts alike but for luck: the oracle is no better than with shuffled episodes. Experts of two domains: it is."""
    generator = torch.Generator().manual_seed(1)
    task = torch.rand(400, generator=generator, dtype=torch.float64)
    luck = choose(task + 0.05 * torch.rand(2, 400, generator=generator, dtype=torch.float64))
    assert luck["oracle"].mean() < luck["oracle, episodes shuffled"].mean()
    domain = torch.arange(400) % 2
    signal = choose(torch.stack([domain, 1 - domain]) + 0.05 * torch.rand(2, 400, generator=generator).double())
    assert signal["oracle"].mean() > signal["oracle, episodes shuffled"].mean() + 0.2
    assert float(signal["oracle, choices of other episodes"].mean()) == pytest.approx(0.525, abs=0.01)


# ---- the table

MODELS = ["frozen", "expert:a", "expert:b", "merged", "merged:ridge", "average", "merged+finetune"]
CONFIG = FewShotConfig(
    pool=PoolConfig(folder="somewhere"), select=SelectConfig(data=["x"]), evaluate=EvaluateConfig(models=MODELS)
)


def records(folder: Path, arm: str, clean: list[float], data: str = "digits", seed: int = 3) -> None:
    name = f"{data}-5-way-1-shot-{arm.replace(':', '-').replace('+', '-')}.jsonl"
    lines = [{"protocol": "00"}, *({"episode": i, "clean": value} for i, value in enumerate(clean))]
    write_lines(folder / "episodes" / f"seed-{seed}" / name, lines)


def filled(folder: Path, data: str = "digits", seed: int = 3) -> None:
    records(folder, "expert:a", [1.0, 0.2, 0.6, 0.6], data, seed)
    records(folder, "expert:b", [0.0, 0.8, 0.6, 0.4], data, seed)
    records(folder, "merged", [0.8, 0.4, 0.6, 0.4], data, seed)
    for arm in ("merged:ridge", "average"):
        records(folder, arm, [0.5, 0.5, 0.5, 0.5], data, seed)


def rows(data: str = "digits") -> list:
    return [result(data, arm, n=4) for arm in MODELS]


def test_the_table_has_the_rules_and_the_yardsticks(tmp_path: Path) -> None:
    filled(tmp_path)
    ((table, note),) = choice_tables(tmp_path, CONFIG, [3], [*rows(), result(arm="merged", condition=PGD, n=4)])
    cells = {row[2]: row[3:] for row in table.rows}
    oracles = ["oracle", "oracle, choices of other episodes", "oracle, episodes shuffled"]
    assert list(cells) == ["merged", "merged:ridge", "average", *oracles]
    assert cells["merged"] == ["55.0 ± 30.5", "–", "4"] and cells["oracle"][0] == "75.0 ± 30.5"
    assert cells["oracle"][1].startswith("+20.0 [") and cells["average"][1].startswith("−5.0 [")
    assert "does not show that experts differ" in note
    # The best expert on validation is that of the file, not of the test episodes (60 against 45 %).
    (tmp_path / "pool" / "seed-3").mkdir(parents=True)
    (tmp_path / "pool" / "seed-3" / "validation.json").write_text(sealed({"all": {"a": 0.4, "b": 0.5}}))
    ((table, _),) = choice_tables(tmp_path, CONFIG, [3], rows())
    assert {row[2]: row[3] for row in table.rows}["best expert on validation"].startswith("45.0")


def test_seeds_are_averaged_and_sets_weigh_the_same(tmp_path: Path) -> None:
    for seed in (3, 5):
        filled(tmp_path, seed=seed)
        filled(tmp_path, "birds", seed)
    records(tmp_path, "expert:b", [1.0, 1.0, 1.0, 1.0], "birds", 5)
    ((table, _),) = choice_tables(tmp_path, CONFIG, [3, 5], [*rows(), *rows("birds")])
    oracle = {row[0]: (row[3].split()[0], row[5]) for row in table.rows if row[2] == "oracle"}
    assert list(oracle) == ["average", "digits", "birds"]
    assert oracle == {"average": ("81.2", "8"), "digits": ("75.0", "4"), "birds": ("87.5", "4")}


def test_the_spread_of_the_seeds_is_in_the_intervals(tmp_path: Path) -> None:
    """Every episode of one seed is 0.2 better than of the other: over episodes alone, "merged" would have the same interval."""
    for seed, gain in ((3, 0.0), (5, 0.2)):
        filled(tmp_path, seed=seed)
        records(tmp_path, "merged:ridge", [0.5 + gain] * 4, seed=seed)
        records(tmp_path, "merged", [0.5] * 4, seed=seed)
    ((table, note),) = choice_tables(tmp_path, CONFIG, [3, 5], rows())
    ridge = next(row for row in table.rows if row[2] == "merged:ridge")
    # t at one degree of freedom 12.7062, standard error .1: 127 points
    assert ridge[3] == "60.0 ± 127.1" and ridge[4] == "+10.0 [−117.1, +137.1]" and "seeds" in note


def test_nothing_without_records_experts_or_merged(tmp_path: Path) -> None:
    assert choice_tables(tmp_path, CONFIG, [3], rows()) == []
    filled(tmp_path)
    assert choice_tables(tmp_path, CONFIG, [3, 5], rows()) == []
    assert choice_tables(tmp_path, CONFIG, [3], [result(arm="expert:a", n=4)]) == []
    alone = FewShotConfig(pool=PoolConfig(), evaluate=EvaluateConfig(models=["merged", "expert:a"]))
    assert choice_tables(tmp_path, alone, [3], rows()) == []
