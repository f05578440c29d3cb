"""results.jsonl and records/: what is written is read again, and a row that is not a complete number is named."""

import math

import pytest
from helpers.results import HASH, PGD, add, measure, result, rows_of, write_lines
from helpers.run_folder import make_folder

from vismt.base.errors import UserError
from vismt.engine.log import record_stem
from vismt.jobs.fewshot.config import pooled_models
from vismt.metatune.settings import HEADS
from vismt.report.results import ValuesByExample, read_results, result_of, write_results, write_values
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import CLEAN, Condition, Estimate, Score, averaged

RIGHT = {0: [1.0, 1.0, 0.0, 1.0], 1: [1.0, 0.0, 0.0, 1.0]}  # 3 and 2 of 4, by seed


def score(values, condition=CLEAN, **settings):
    return Score("few-shot", "digits", "5-way 1-shot", measure(values, **settings), condition, "episodes")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [
        result(),
        result(arm="adapted", seed=3, chance=None),
        result(condition=PGD, value=-1.5, scale="number", better="lower", metric="NLL"),
    ]
    write_results(tmp_path, rows)
    assert read_results(tmp_path / "results.jsonl", HASH) == rows
    assert read_results(tmp_path / "none.jsonl") == []


def test_the_row_of_a_score():
    row = result_of(score([0.4, 0.5, 0.6], PGD, chance=0.2), "lora", None, "test", HASH)
    # mean 0.5, deviation 0.1, half width t(2) * 0.1 / sqrt(3)
    assert (row.value, row.n, row.half) == (pytest.approx(0.5), 3, pytest.approx(0.24841, abs=1e-5))
    assert (row.low, row.high) == (pytest.approx(0.25159, abs=1e-5), pytest.approx(0.74841, abs=1e-5))
    assert (row.condition, row.kind, row.family, row.level) == (PGD.label, "attack", "PGD linf", 4.5 / 255)
    assert (row.task, row.data, row.protocol, row.unit) == ("few-shot", "digits", "5-way 1-shot", "episodes")
    assert (row.arm, row.seed, row.split, row.config_hash, row.chance) == ("lora", None, "test", HASH, 0.2)


def test_rows_by_seed_and_the_row_of_their_mean():
    by_seed = {seed: score(values, counts=True) for seed, values in RIGHT.items()}
    first, second = (result_of(by_seed[seed], "lora", seed, "test", HASH) for seed in (0, 1))
    measures = averaged([by_seed[seed].measure for seed in (0, 1)])
    mean = result_of(
        Score("few-shot", "digits", "5-way 1-shot", measures, CLEAN, "episodes"), "lora", None, "test", HASH
    )
    assert (first.value, second.value, mean.value) == (0.75, 0.5, pytest.approx(0.625))
    # Wilson for single trainings: 3 of 4 lies in 0.3006 to 0.9544, 2 of 4 in 0.1500 to 0.8500
    assert (first.low, first.high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert (second.low, second.high) == (pytest.approx(0.1500, abs=1e-4), pytest.approx(0.8500, abs=1e-4))
    # Values of the mean 1, .5, 0, 1: an error of .2394 over four examples and .125 over two seeds exceed the range of a share.
    assert (mean.low, mean.high) == (0.0, 1.0) and (first.interval, mean.interval) == ("examples", "examples+seeds")
    assert len({first.key, second.key, mean.key}) == 3


def test_the_longer_half_counts_where_an_interval_is_not_symmetric():
    assert result_of(
        score([0.5, 0.5], error=Estimate.within(0.5, (0.4, 0.8))), "a", None, "test", HASH
    ).half == pytest.approx(0.3)


def test_rows_of_other_conditions_stay(tmp_path):
    clean, attacked = result(), result(condition=PGD, value=0.1)
    write_results(tmp_path, [clean, attacked])
    again = result(value=0.5)
    write_results(tmp_path, [again])
    assert read_results(tmp_path / "results.jsonl") == [attacked, again]


def test_values_of_other_conditions_stay(tmp_path):
    clean, attacked = score([0.1, 0.3]), score([0.0, 0.2], PGD)
    rows = {name: result_of(entry, "lora", None, "test", HASH) for name, entry in (("clean", clean), ("pgd", attacked))}
    write_values(tmp_path, [(rows["clean"], clean.measure)])
    write_values(tmp_path, [(rows["pgd"], attacked.measure)])
    path = tmp_path / "records" / f"{rows['clean'].stem}.jsonl"
    lines = read_lines(path)
    assert lines == [{"example": "0", "clean": 0.1, PGD.label: 0.0}, {"example": "1", "clean": 0.3, PGD.label: 0.2}]
    values = ValuesByExample(tmp_path)
    assert values.of(rows["clean"]) == {"0": 0.1, "1": 0.3} and values.of(rows["pgd"]) == {"0": 0.0, "1": 0.2}
    # an evaluation again replaces its own column
    again = score([0.2, 0.4])
    write_values(tmp_path, [(result_of(again, "lora", None, "test", HASH), again.measure)])
    lines = read_lines(path)
    assert [line["clean"] for line in lines] == [0.2, 0.4] and [line[PGD.label] for line in lines] == [0.0, 0.2]
    # columns of other examples go: they can no longer be paired
    more = score([0.2, 0.4, 0.6])
    write_values(tmp_path, [(result_of(more, "lora", None, "test", HASH), more.measure)])
    lines = read_lines(path)
    assert len(lines) == 3 and not any(PGD.label in line for line in lines)


def test_conditions_with_examples_of_their_own_are_read_back_whole(tmp_path):
    scores = [score(values, condition) for values, condition in (([0.2, 0.4], CLEAN), ([0.5, 0.7, 0.9], PGD))]
    pairs = [(result_of(item, "lora", None, "test", HASH), item.measure) for item in scores]
    write_values(tmp_path, pairs)
    found = ValuesByExample(tmp_path)
    assert [found.of(row) for row, _ in pairs] == [dict(each.values) for _, each in pairs]


def test_every_arm_and_metric_has_its_values(tmp_path):
    for arm in ("lora", "emtal"):
        for metric in ("accuracy", "NLL in nats"):
            add(tmp_path, score([0.1, 0.3], metric=metric), arm)
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        f"few-shot-digits-5-way-1-shot-{arm}-{metric}.jsonl"
        for arm in ("emtal", "lora")
        for metric in ("NLL-in-nats", "accuracy")
    ]


def test_values_that_are_not_numbers_are_not_used(tmp_path):
    row = add(tmp_path, score([0.1, 0.3]), "lora")
    path = tmp_path / "records" / f"{row.stem}.jsonl"
    write_lines(path, [{**line, "clean": str(line["clean"])} for line in read_lines(path)])
    assert ValuesByExample(tmp_path).of(row) is None


LINE = vars(result(data="third"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None}, "key 'n' is missing"),
        ({"low": None}, "key 'low' is missing"),
        ({"high": None}, "key 'high' is missing"),
        ({"config_hash": ""}, "config hash '' is not this run's"),
        ({"config_hash": None}, "key 'config_hash' is missing"),
        ({"value": math.nan}, "value is nan; a number must be finite"),
        ({"value": 1.01, "high": 1.2}, "1.01 is not a share, in [0, 1]"),
        ({"value": -0.01, "low": -0.2}, "-0.01 is not a share, in [0, 1]"),
        ({"high": math.inf}, "high is inf; a number must be finite"),
        ({"n": 0}, "n = 0"),
        ({"n": 2.5}, "n: expected int, got 2.5"),
        ({"low": 0.6}, "[0.6, 0.45] around 0.4"),
        ({"n": True}, "n: expected int, got True"),
        ({"seed": "first"}, "seed: expected int or null, got 'first'"),
        ({"level": math.nan}, "level is nan; a number must be finite"),
        ({"unit": 3}, "unit: expected str, got 3"),
        ({"better": "no"}, "better: expected"),
        ({"scale": "per cent"}, "scale: expected 'share' or 'number', got 'per cent'"),
        ({"lower_is_better": True}, "unknown key 'lower_is_better'"),
        ({"config_hash": "beef"}, "config hash 'beef' is not this run's 4f2a9c1e"),
    ],
)
def test_incomplete_numbers_are_refused(folder, change, message):
    line = {key: value for key, value in {**LINE, **change}.items() if value is not None or key not in change}
    write_lines(folder / "results.jsonl", [line], "a")
    with pytest.raises(UserError) as caught:
        read_results(folder / "results.jsonl", HASH)
    text = str(caught.value)
    assert message in text and "row 9" in text and "third" in text and "\n" not in text
    assert f"vismt evaluate {folder}" in text


def test_a_row_that_repeats_another_is_refused(folder):
    write_lines(folder / "results.jsonl", [rows_of(folder)[0]], "a")
    with pytest.raises(UserError, match=r"row 9 digits clean frozen: repeats an earlier row"):
        read_results(folder / "results.jsonl", HASH)
    rows = [*rows_of(folder)[:8], {**rows_of(folder)[0], "seed": 0}]
    write_lines(folder / "results.jsonl", rows)
    assert len(read_results(folder / "results.jsonl", HASH)) == 9


def test_a_missing_kind_is_a_clean_one(folder):
    line = {key: value for key, value in LINE.items() if key not in ("kind", "family", "level")}
    write_lines(folder / "results.jsonl", [line], "a")
    last = read_results(folder / "results.jsonl", HASH)[-1]
    assert Condition(last.condition, last.kind, last.family, last.level) == CLEAN


def test_a_number_of_a_lone_example_has_no_interval():
    with pytest.raises(UserError, match="interval over 1 values"):
        result_of(score([0.5]), "lora", None, "test", HASH)


def test_two_models_of_a_run_have_two_files_of_records() -> None:
    models = [f"{model}{head}" for model in pooled_models() for head in ("", *(f"+{head}" for head in HEADS))]
    stems = [record_stem("cub:test", "5-way 1-shot", model) for model in models]
    assert len(set(stems)) == len(models) and stems[models.index("merged:tsv+ridge")] == (
        "cub-test-5-way-1-shot-merged-tsv-ridge"
    )


def test_groups_are_named_where_examples_have_them():
    groups = {"0": "a", "1": "a", "2": "b"}
    grouped = result_of(score([0.1, 0.2, 0.3], groups=groups, grouped_by="signs"), "a", None, "test", HASH)
    assert (grouped.parts, grouped.grouped_by, grouped.units) == (2, "signs", "2 signs")
    alone = result_of(score([0.1, 0.2, 0.3], grouped_by="parts"), "a", None, "test", HASH)
    assert (alone.parts, alone.grouped_by, alone.units) == (0, "", "")
