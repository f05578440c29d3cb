"""The tables of a report on how experts can be chosen: rules, best experts, and what a choice by task is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.results import PGD, result, write_lines

from scripts.expert_choice import GAIN, choice, choice_gains, choice_tables, spread_text
from vismt.jobs.fewshot.config import EvaluateConfig, FewShotConfig, PoolConfig, SelectConfig
from vismt.report.tables import interval_text
from vismt.uncertainty.intervals import CLEAN, Measure, Score, mean_interval

MODELS = ["frozen", "expert:a", "expert:b", "merged", "merged:tsv", "average", "merged+finetune"]
CONFIG = FewShotConfig(
    pool=PoolConfig(folder="somewhere"), select=SelectConfig(data=["x"]), evaluate=EvaluateConfig(models=MODELS)
)


def records(
    folder: Path,
    arm: str,
    answers: list[str],
    data: str = "digits",
    seed: int = 3,
    *,
    texts: bool = True,
    queries: int = 2,
) -> None:
    """Write the records of an arm. answers: of each episode, with 1 for a right query; texts: whether the records have them."""
    name = f"{data}-5-way-1-shot-{arm.replace(':', '-').replace('+', '-')}.jsonl"
    lines = [
        {"episode": i, "clean": text.count("1") / len(text), **({"clean right": text} if texts else {})}
        for i, text in enumerate(answers)
    ]
    header = {"protocol": {"sampler": {"queries": queries}}}
    write_lines(folder / "episodes" / f"seed-{seed}" / name, [header, *lines])


A, B = ["1111", "1000", "1101", "1101"], ["0000", "1110", "0111", "0110"]  # means 0.6875 and 0.5


def filled(folder: Path, data: str = "digits", seed: int = 3, **options: object) -> None:
    records(folder, "expert:a", A, data, seed, **options)
    records(folder, "expert:b", B, data, seed, **options)
    records(folder, "merged", ["1110", "1100", "1000", "1100"], data, seed, **options)
    for arm in ("merged:tsv", "average"):
        records(folder, arm, ["1100"] * 4, data, seed, **options)


def rows(data: str = "digits") -> list:
    return [result(data, arm, n=4) for arm in MODELS]


def bits(*experts: list[str]) -> torch.Tensor:
    return torch.tensor([[[int(bit) for bit in text] for text in answers] for answers in experts])


def test_the_tables_have_the_rules_and_the_best_experts(tmp_path: Path) -> None:
    filled(tmp_path)
    (table, note), (worth, meaning) = choice_tables(
        tmp_path, CONFIG, [3], [*rows(), result(arm="merged", condition=PGD, n=4)]
    )
    cells = {row[2]: row[3:] for row in table.rows}
    best = ["best expert of the other tasks", "best expert of each task"]
    assert list(cells) == ["merged", "merged:tsv", "average", *best]
    assert cells["merged"][1:] == ["–", "4"] and cells["merged"][0].startswith("50.0 ± ")
    # On the other tasks a has .58, .83, .67 and .67, b .67, .42, .42 and .5: a, but for the first task.
    assert cells[best[0]][0].startswith("43.8 [") and "“best expert of each task”" in note
    found = choice(bits(A, B), torch.tensor([0, 0, 1, 1]).expand(4, 4))
    assert cells[best[1]][0].startswith(f"{100 * float(found.halves.mean()):.1f} ")
    ((data, condition, bracket, spread, n),) = worth.rows
    assert (data, condition, n) == ("digits", "clean", "4")
    assert bracket == f"[{100 * float(found.folds.mean()):.1f}, {100 * float(found.optimistic.mean()):.1f}]"
    assert spread.startswith("not resolved, at most ") and "does" not in spread and "chance in the support" in meaning


def test_episodes_in_parts_are_averaged_by_part(tmp_path: Path) -> None:
    """Episodes i and i + 3 share images: the experts are compared over three parts, and no part judges itself."""
    first, second = A + B[:2], B + A[:2]
    filled(tmp_path)
    for arm, answers in (("expert:a", first), ("expert:b", second), ("merged", A + A[:2])):
        records(tmp_path, arm, answers)
    wanted = [result("digits", arm, n=6, parts=3) for arm in ("merged", "expert:a", "expert:b")]
    (table, _), (worth, _) = choice_tables(tmp_path, CONFIG, [3], wanted)
    found = choice(bits(first, second), torch.tensor([0, 0, 1, 1]).expand(6, 4), torch.arange(6) % 3)
    assert len(found.folds) == 3
    assert worth.rows[0][2] == f"[{100 * float(found.folds.mean()):.1f}, {100 * float(found.optimistic.mean()):.1f}]"
    merged = [float(bits(A + A[:2]).double().mean(2)[0, part::3].mean()) for part in range(3)]
    mean, half = mean_interval(merged)
    assert table.rows[0][3] == interval_text(mean, mean - half, mean + half, "share")


def test_the_gain_of_a_choice_is_a_score_of_merged(tmp_path: Path) -> None:
    """By set and seed, with an interval over the parts; missing where an expert lacks the answers."""
    first, second = A + B[:2], B + A[:2]
    for seed, (a, b) in {3: (first, second), 5: (second, [*first[:5], "1111"])}.items():
        for arm, answers in (("expert:a", a), ("expert:b", b), ("merged", A + A[:2])):
            records(tmp_path, arm, answers, seed=seed)
    values = dict.fromkeys(map(str, range(6)), 0.5)
    parts = {name: str(int(name) % 3) for name in values}
    accuracy = Measure("accuracy", values, chance=0.2, covers="images", groups=parts)
    scores = {
        arm: [Score("few-shot", "digits", "5-way 1-shot", measure, CLEAN, "episodes") for measure in measures]
        for arm, measures in (("merged", [accuracy, replace(accuracy, metric="Brier")]), ("expert:a", [accuracy]))
    }
    by_seed = [choice_gains(tmp_path, CONFIG, [seed], scores)["merged"] for seed in (3, 5)]
    (gain,) = choice_gains(tmp_path, CONFIG, [3, 5], scores)["merged"]
    measure = gain.measure
    assert (measure.metric, measure.scale, measure.chance, measure.covers) == (GAIN, "number", None, "images")
    found = choice(bits(first, second), torch.tensor([0, 0, 1, 1]).expand(6, 4), torch.arange(6) % 3)
    assert by_seed[0][0].measure.score == pytest.approx(100 * float((found.halves - found.fixed).mean()))
    assert by_seed[0][0].measure.score != pytest.approx(by_seed[1][0].measure.score)
    assert measure.score == pytest.approx(sum(of.measure.score for (of,) in by_seed) / 2)
    middle, half = mean_interval(found.halves - found.fixed)
    assert by_seed[0][0].measure.interval() == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    assert choice_gains(tmp_path, CONFIG, [3], {"expert:a": scores["expert:a"]}) == {}
    records(tmp_path, "expert:b", second, texts=False)
    assert choice_gains(tmp_path, CONFIG, [3, 5], scores) == {} != choice_gains(tmp_path, CONFIG, [5], scores)


def test_the_spread_is_a_root_or_not_resolved() -> None:
    assert spread_text(0.0049, 0.0024) == "7.0 [5.0, 8.5]"  # roots of .0049, .0025 and .0073
    assert spread_text(0.0009, 0.0016) == "not resolved, at most 5.0"
    assert spread_text(-0.0016, 0.0009) == "not resolved"


def test_records_without_answers_have_the_rules_alone(tmp_path: Path) -> None:
    filled(tmp_path, texts=False)
    ((table, _),) = choice_tables(tmp_path, CONFIG, [3], rows())
    assert [row[2] for row in table.rows] == ["merged", "merged:tsv", "average"]


def test_seeds_are_averaged_and_sets_weigh_the_same(tmp_path: Path) -> None:
    for seed in (3, 5):
        filled(tmp_path, seed=seed)
        filled(tmp_path, "birds", seed)
    records(tmp_path, "expert:a", ["1111"] * 4, "birds", 5)
    records(tmp_path, "expert:b", ["1111"] * 4, "birds", 5)
    (table, _), (worth, _) = choice_tables(tmp_path, CONFIG, [3, 5], [*rows(), *rows("birds")])
    fixed = {row[0]: (row[3].split()[0], row[5]) for row in table.rows if row[2] == "best expert of the other tasks"}
    assert list(fixed) == ["average", "digits", "birds"]
    assert fixed == {"average": ("57.8", "8"), "digits": ("43.8", "4"), "birds": ("71.9", "4")}
    assert [row[0] for row in worth.rows] == ["average", "digits", "birds"]


def test_the_spread_of_the_seeds_is_in_the_intervals(tmp_path: Path) -> None:
    """Every episode of one seed is 1/8 better than of the other: over episodes alone, "merged" would have the same interval."""
    for seed, ridge in ((3, "11111000"), (5, "11110000")):
        filled(tmp_path, seed=seed)
        records(tmp_path, "merged:tsv", [ridge] * 4, seed=seed)
        records(tmp_path, "merged", ["1000"] * 4, seed=seed)
    (table, note), _ = choice_tables(
        tmp_path, CONFIG, [3, 5], [replace(row, interval="sampler+seeds") for row in rows()]
    )
    ridge = next(row for row in table.rows if row[2] == "merged:tsv")
    # t at one degree of freedom 12.7062, standard error .0625: 79.4 points
    assert ridge[3] == "56.2 [0.0, 100.0]" and ridge[4] == "+31.2 [−48.2, +100.0]"
    assert note.endswith("Intervals: 95 % over new episodes of the same images and training seeds.")


def test_nothing_without_records_experts_or_merged(tmp_path: Path) -> None:
    assert choice_tables(tmp_path, CONFIG, [3], rows()) == []
    filled(tmp_path)
    assert choice_tables(tmp_path, CONFIG, [3, 5], rows()) == []
    assert choice_tables(tmp_path, CONFIG, [3], [result(arm="expert:a", n=4)]) == []
    alone = FewShotConfig(pool=PoolConfig(), evaluate=EvaluateConfig(models=["merged", "expert:a"]))
    assert choice_tables(tmp_path, alone, [3], rows()) == []
