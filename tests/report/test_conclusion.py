"""The answer of a report: which model it takes, and whether the number of examples that it asks for is the one that is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest
import torch
from helpers.results import PGD, cell, comparison

from vismt.report.comparison import CONSTANT, JOINT, Comparison, key_comparisons
from vismt.report.conclusion import conclude, needed
from vismt.uncertainty.intervals import CLEAN, Condition, Estimate, estimate, student_quantile


def compared(
    scores: Mapping[str, float],
    error: float | None,
    n: int = 100,
    condition: Condition = CLEAN,
    seeds: int = 0,
    of_seeds: float = 0.0,
    data: str = "digits",
    **changes: object,
) -> Comparison:
    """Models whose differences have a standard error over the examples, and one over the seeds; None for no records."""
    cells = {name: cell(value, 0.05, n, seeds=seeds) for name, value in scores.items()}
    found = comparison(data, cells, condition, **{"chance": None, **changes})
    if error is None:
        return found

    def pair(first: str, second: str) -> Estimate:
        sources = [(error**2, n - 1.0)]
        sources += [(of_seeds**2, seeds - 1.0)] if seeds else []
        return Estimate(scores[first] - scores[second], tuple(sources))

    return Comparison(found.row, found.data, cells, "", {}, True, pair)


def text(*comparisons: Comparison, **sizes: float) -> str:
    return conclude(comparisons, sizes).text


def test_without_a_difference_it_takes_the_smallest_within_one_standard_error() -> None:
    c = compared({"head": 0.70, "lora": 0.79, "full": 0.80}, 0.05)
    assert text(c, head=10, lora=1000, full=100_000).startswith(
        "Take lora. No model is shown to be better than another in accuracy. lora is the smallest model within one standard "
        "error of the best score (1,000 trained parameters). About "
    )
    # head is two standard errors behind, though that is not shown
    assert "Take head" in text(compared({"head": 0.76, "lora": 0.79, "full": 0.80}, 0.05), head=10, lora=1000, full=1e5)
    # of two that are equally small, the better one
    assert "Take full" in text(compared({"lora": 0.79, "full": 0.80}, 0.05), lora=1000, full=1000)
    assert "nothing is trained" in text(compared({"frozen": 0.79, "lora": 0.80}, 0.05), frozen=0, lora=1000)
    assert "full has the best score, which may be chance." in text(c, lora=1000)
    assert "Only lora lies within one standard error of the best score (5 trained parameters)." in text(
        compared({"head": 0.7, "lora": 0.8}, 0.06), head=1, lora=5
    )


def test_a_difference_that_is_shown() -> None:
    c = compared({"head": 0.5, "lora": 0.6, "full": 0.8}, 0.02)
    half = 100 * 0.02 * student_quantile((1 + JOINT ** (1 / 3)) / 2, 99)
    assert text(c, head=1, lora=2, full=3) == (
        "Take full. full is shown to be better than every other model in accuracy: "
        f"+20.0 [+{20 - half:.1f}, +{20 + half:.1f}] points against lora, the next."
    )
    some = text(compared({"head": 0.5, "lora": 0.79, "full": 0.8}, 0.02), head=1, lora=2, full=3)
    assert some.startswith("Take lora. head is shown to be worse than full in accuracy, lora is not. lora is the")
    # without records of the same examples, intervals that do not overlap show a difference
    assert text(compared({"a": 0.5, "b": 0.8}, None)) == "Take b. b is shown to be better than a in accuracy."
    assert "b and a are not shown to differ in accuracy" in text(compared({"a": 0.5, "b": 0.55}, None))


def test_several_models_need_a_larger_difference() -> None:
    """A difference of two models at 2.2 standard errors is shown for two models, and not for the ten pairs of five."""
    two = {"a": 0.5, "b": 0.544}
    assert "b is shown to be better than a" in text(compared(two, 0.02))
    five = {**two, "c": 0.53, "d": 0.531, "e": 0.532}
    assert "No model is shown to be better than another" in text(compared(five, 0.02))


def test_lower_is_better_where_the_measure_says_so() -> None:
    depth = {"metric": "RMSE in m", "scale": "number", "better": "lower", "task": "depth"}
    assert text(compared({"a": 2.0, "b": 1.0}, 0.1, **depth)).startswith(
        "Take b. b is shown to be better than a in RMSE: −1.00 [−1.20, −0.80] m."
    )


def test_every_task_and_the_strongest_attack_count() -> None:
    attacked = compared({"a": 0.1, "b": 0.5}, 0.02, condition=PGD)
    worse = compared({"a": 0.8, "b": 0.6}, 0.02)
    told = text(worse, attacked)
    assert f"b is shown to be better than a in accuracy under {PGD.label}: " in told
    assert told.startswith(
        f"Take a for clean accuracy or b for accuracy under {PGD.label}: no model is among the best in everything."
    )
    alike = compared({"a": 0.61, "b": 0.6}, 0.02)
    assert text(alike, attacked).endswith("a and b are not shown to differ in clean accuracy.")
    depth = compared({"a": 2.0, "b": 1.0}, 0.6, metric="RMSE in m", scale="number", better="lower", task="depth")
    assert text(alike, depth).startswith(
        "Take b. a and b are not shown to differ in accuracy of few-shot or RMSE of depth. b has the best score, which may be"
    )


def test_a_model_without_a_score_is_named() -> None:
    number = {"metric": "RMSE in m", "scale": "number", "better": "lower", "task": "depth"}
    told = text(compared({"a": 0.1, "b": 0.5}, 0.02), compared({"c": 2.0}, 1.0, **number))
    assert told.startswith("Take b. b is shown to be better") and told.endswith(
        "c is not trained for accuracy, or not scored."
    )
    # of four models one lacks the depth, and is the best in accuracy
    scores = {"lora": 0.8, "full": 0.6, "head": 0.5, "single": 0.95}
    depth = compared({"lora": 1.0, "full": 2.0, "head": 3.0}, 0.1, **number)
    told = text(compared(scores, 0.01), depth)
    assert told.startswith(
        "For few-shot, take single. single is shown to be better than every other model in accuracy of few-shot:"
    )
    assert "For depth, take lora. lora is shown to be better than every other model in RMSE of depth:" in told
    assert told.endswith("single is not trained for RMSE of depth, or not scored.")


def test_every_number_of_shots_counts() -> None:
    one, five = ({"protocol": f"5-way {shots}-shot"} for shots in (1, 5))
    told = text(compared({"a": 0.5, "b": 0.6}, 0.02, **one), compared({"a": 0.8, "b": 0.6}, 0.02, **five))
    assert told.startswith(
        "Take b for accuracy in 5-way 1-shot or a for accuracy in 5-way 5-shot: no model is among the best in everything."
    )


def test_the_sentence_on_one_standard_error_is_said_where_it_holds() -> None:
    """Clean against robust accuracy: each model is 1.5 standard errors behind in one, which is not shown."""
    attacked = compared({"a": 0.3, "b": 0.33}, 0.02, condition=PGD)
    told = text(compared({"a": 0.8, "b": 0.77}, 0.02), attacked, a=1, b=2)
    assert told.startswith("Take a. No model") or told.startswith("Take a. a and b are not shown to differ")
    assert (
        "No model lies within one standard error of the best score in each of these. a is the best of these in clean"
        in told
    )
    assert "smallest" not in told


def test_a_model_is_not_taken_if_it_is_not_told_from_a_constant_answer() -> None:
    guess = {"chance": 0.5}
    none = conclude([compared({"a": 0.5, "b": 0.53}, 0.02, **guess)], {})
    assert none.text == "Take no model: none is told from a constant answer in accuracy." and none.take == ""
    assert none.model == "b"  # which is shown first
    # b is smaller and within one standard error, and its interval holds 0.5
    some = text(compared({"a": 0.56, "b": 0.545}, 0.02, **guess), a=2, b=1)
    assert some.startswith("Take a.") and "b is not told from a constant answer in accuracy." in some
    # of two runs, each with its constant answer, the better constant answer decides
    runs = {"one: constant": 0.5, "two: constant": 0.7, "a": 0.72, "b": 0.6}
    assert text(compared(runs, 0.05)).startswith("Take no model: none is told from a constant answer in accuracy.")
    assert text(compared(runs | {"a": 0.9}, 0.05)).startswith("Take a.")
    # the constant answer of the same examples, which is no model to take
    for error, told in ((0.02, True), (0.1, False)):
        found = conclude([compared({CONSTANT: 0.5, "a": 0.6}, error)], {})
        assert found.text.startswith("There is one model. a: accuracy in % 60.0 ± 5.0.") and found.differences == 0
        assert ("No model is told from a constant answer in accuracy." in found.text) is not told
    three = conclude([compared({CONSTANT: 0.5, "a": 0.6, "b": 0.7}, 0.02)], {})
    assert three.take == "b" and three.differences == 1
    # an attack under which all are worse than a guess decides nothing
    attacked = compared({"a": 0.1, "b": 0.3}, 0.01, condition=PGD, **guess)
    told = text(compared({"a": 0.9, "b": 0.7}, 0.01, **guess), attacked)
    assert told.startswith("Take a.") and told.endswith(
        f"No model is told from a constant answer in accuracy under {PGD.label}."
    )


def test_no_model_is_taken_if_all_are_at_chance() -> None:
    """Ten classes, of which a model that answers one class always finds a tenth."""
    clean = compared({CONSTANT: 0.1, "head": 0.099, "lora": 0.101}, 0.034)
    attacked = compared({"head": 0.02, "lora": 0.09}, 0.02, condition=PGD)  # of which nobody has a constant answer
    for found in (conclude([clean], {"head": 1, "lora": 2}), conclude([clean, attacked], {"head": 1, "lora": 2})):
        assert found.take == "" and found.answers[0].needed is None
        assert found.text.startswith("Take no model: none is told from a constant answer in ")
    assert found.text.startswith("Take no model: none is told from a constant answer in clean accuracy.")
    worse = conclude([compared({CONSTANT: 0.5, "head": 0.1, "lora": 0.2}, 0.01)], {})
    assert worse.take == ""


def test_scores_without_spread_show_nothing() -> None:
    told = text(compared({"a": 0.5, "b": 0.6}, 0.0))
    assert told == "Take b. b and a are not shown to differ in accuracy. b has the best score, which may be chance."


def test_tasks_that_an_arm_did_not_train_have_answers_of_their_own() -> None:
    """Heads of other tasks give an average that looks as if the arm of both tasks were better."""
    tasks = {
        "leaves": {"both": 0.69, "only_leaves": 0.73, "only_signs": 0.26},
        "signs": {"both": 0.25, "only_leaves": 0.09, "only_signs": 0.48},
    }
    sets = []
    for data, scores in tasks.items():
        c = compared(scores, 0.05, data=data)
        cells = {name: replace(cell, trained=name in ("both", f"only_{data}")) for name, cell in c.cells.items()}
        sets.append(replace(c, cells=cells))
    average = compared({"both": 0.47}, 0.03, data="average")
    found = conclude([*sets, average], {})
    assert [(answer.subject, answer.take) for answer in found.answers] == [
        ("leaves", "only_leaves"),
        ("signs", "only_signs"),
    ]
    assert (
        "For leaves, take only_leaves. only_leaves and both are not shown to differ in accuracy on leaves."
        in found.text
    )
    assert (
        "For signs, take only_signs. only_signs is shown to be better than both in accuracy on signs: +23.0"
        in found.text
    )
    assert "only_leaves is not trained for accuracy on signs, or not scored." in found.text


def test_a_conclusion_is_plain_data() -> None:
    found = conclude(
        [compared({"a": 0.5, "b": 0.8}, 0.02), compared({"a": 0.1, "b": 0.1}, 0.02, condition=PGD)], {"a": 1, "b": 2}
    )
    assert json.loads(json.dumps(asdict(found)))["answers"][0]["findings"][0]["worse"] == ["a"]


def test_of_several_sets_the_one_with_the_most_models_counts() -> None:
    """In a comparison of runs an average may have the models of one run alone."""
    average = replace(compared({"a": 0.1}, 0.02), data="average")
    sets = [compared({"a": 0.1}, 0.02), compared({"a": 0.1, "b": 0.5}, 0.02)]
    assert text(*sets, average).startswith("Take b.")
    average = replace(compared({"a": 0.7, "b": 0.5}, 0.02), data="average")
    assert text(*sets, average).startswith("Take a.")


def test_a_single_model() -> None:
    assert text(compared({"lora": 0.5}, 0.1)) == "There is one model. lora: accuracy in % 50.0 ± 5.0."
    other = compared({"head": 0.5}, 0.1, protocol="another")
    assert text(compared({"lora": 0.5}, 0.1), other).startswith("The models have no measure in common. lora: ")
    attacked = compared({"lora": 0.3}, 0.1, condition=PGD)
    assert text(compared({"lora": 0.78}, 0.1), attacked) == (
        f"There is one model. lora: clean accuracy in % 78.0 ± 5.0. lora: accuracy under {PGD.label} in % 30.0 ± 5.0."
    )


def test_the_sentence_on_the_examples() -> None:
    c = compared({"a": 0.50, "b": 0.51}, 0.05)
    # (1.96 + 0.84)^2 100 0.05^2 / 0.03^2 = 2,180, and 1.96^2 / 2 = 2
    assert text(c, a=1, b=2).endswith("About 2,200 episodes would show a difference of 3 points between a and b.")
    seen = text(compared({"a": 0.50, "b": 0.59}, 0.05), a=1, b=2)
    assert seen.endswith("About 240 episodes would show a difference of 9 points between b and a, the one seen here.")
    many = text(compared({"a": 0.50, "b": 0.5001}, 0.001), a=1, b=2)
    assert many.endswith("These 100 episodes would have shown a difference of 3 points between a and b.")


def test_numbers_that_nobody_can_collect_are_cut_off() -> None:
    number = {"metric": "gain", "scale": "number"}
    assert " would " not in text(compared({"a": 0.0, "b": 0.0}, 0.05, **number))  # no difference to ask for
    tiny = text(compared({"a": 0.0, "b": 1e-12}, 0.05, **number))
    assert "At least 1,000,000 episodes would show a difference of 1e-12 between b and a" in tiny
    seeds = text(compared({"a": 0.5, "b": 0.501}, 0.05, seeds=3, of_seeds=0.5))
    assert "episodes and at least 1,000 training seeds would show a difference of 3 points" in seeds
    assert needed(Estimate(0.0, ((0.1, 9.0), (0.1, 2.0))), cell(0.0, 1.0, 10, seeds=3), 1e-200, JOINT) == (10**6, 1000)


def test_models_without_records_of_the_same_examples_can_be_near() -> None:
    near = text(compared({"a": 0.599, "b": 0.6}, None), a=1, b=2)
    assert "a is the smallest model within one standard error of the best score (1 trained parameters)." in near
    far = text(compared({"a": 0.56, "b": 0.6}, None), a=1, b=2)  # the standard error is 0.05 sqrt(2) / 1.96 = 0.036
    assert "Only b lies within one standard error of the best score" in far


def test_too_few_seeds_are_named() -> None:
    c = compared({"a": 0.50, "b": 0.55}, 0.001, seeds=3, of_seeds=0.03)
    # of (0.05 / 2.8)^2 = 0.000319 the seeds may take half: 3 * 0.0009 / 0.000159 = 17
    assert "episodes and 17 training seeds would show a difference of 5 points between b and a" in text(c)


@pytest.mark.parametrize("seeds", [0, 4])
def test_so_many_examples_show_the_difference_with_a_power_of_80_percent(seeds: int) -> None:
    """Simulated: pairs of right and wrong answers whose true difference is known, and seeds whose differences vary."""
    generator = torch.Generator().manual_seed(0)
    difference, level, n = 0.06, JOINT ** (1 / 3), 200
    better, worse, of_seeds = 0.15, 0.09, 0.035 if seeds else 0.0

    def draw(examples: int, trainings: int) -> Estimate:
        uniform = torch.rand(examples, generator=generator, dtype=torch.float64)
        found = estimate((uniform < better).double() - (uniform > 1 - worse).double())
        if not trainings:
            return found
        shifts = of_seeds * torch.randn(trainings, generator=generator, dtype=torch.float64)
        ((error, freedom),) = found.sources
        mean = found.mean + float(shifts.mean())
        return Estimate(mean, ((error, freedom),)).with_seeds((shifts + mean - float(shifts.mean())).tolist())

    true = (better + worse - difference**2) / n  # variance of the mean difference of n examples
    sources = [(true, n - 1.0)] + ([(of_seeds**2 / seeds, seeds - 1.0)] if seeds else [])
    examples, trainings = needed(Estimate(0.0, tuple(sources)), cell(0.5, 0.1, n, seeds=seeds), difference, level)
    assert trainings > seeds if seeds else trainings == 0
    draws = [draw(examples, trainings) for _ in range(1500)]
    power = sum(found.mean > found.half_at(level) for found in draws) / len(draws)
    # The standard error of the simulation is 0.01. With seeds, Student's t at few degrees of freedom costs some power.
    assert abs(power - 0.8) < (0.07 if seeds else 0.035), power
    # a quarter of the examples does not do
    fewer = [draw(examples // 4, trainings) for _ in range(500)]
    assert sum(found.mean > found.half_at(level) for found in fewer) / len(fewer) < 0.6


def test_groups_of_examples_keep_their_size() -> None:
    """200 examples in 50 groups: the term for Student's t counts groups."""
    found = Estimate(0.0, ((0.01**2, 49.0),))
    examples, _ = needed(found, cell(0.5, 0.1, 200), 0.03, 0.95)
    assert examples == math.ceil(200 * 0.01**2 * (1.959964 + 0.841621) ** 2 / 0.03**2 + 4 * 1.959964**2 / 2)


def test_the_key_scores_are_of_three_tasks_and_the_first_under_attack() -> None:
    clean = [compared({"a": 0.5, "b": 0.6}, 0.02, task=task) for task in ("first", "second", "third", "fourth")]
    attacked = [compared({"a": 0.1, "b": 0.2}, 0.02, condition=PGD, task=task) for task in ("first", "second")]
    chosen = [(c.row.task, c.condition) for c in key_comparisons([*clean, *attacked])]
    assert chosen == [("first", "clean"), ("first", PGD.label), ("second", "clean"), ("third", "clean")]
