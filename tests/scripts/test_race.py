"""The race's page: best arms and ties, arms of other runs, costs, and no page without rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.results import result
from helpers.tiny_runs import CONFIGS, written

from scripts import committed, race, tables
from scripts.reproduction import verdicts
from scripts.study_rows import ROWS, About, StudyRow, StudyRows, study_of
from vismt.cli import main
from vismt.config.yaml_text import read_yaml
from vismt.storage.paths import CHECKOUT

SPEC = {
    "race_a": {"title": "A", "config": "race/a", "columns": {"acc %": {"metric": "accuracy"}, "NLL": {"metric": "NLL"}}}
}


def row(arm: str, value: float, half: float = 0.02, **changes: Any) -> StudyRow:
    given = {"arm": arm, "value": value, "low": value - half, "high": value + half, "data": "average", **changes}
    minus = given.pop("minus", "")
    return StudyRow(**vars(result(**given, variance=(half / 1.96) ** 2, freedom=1e9)), minus=minus)


def study(*rows: StudyRow, **costs: float) -> StudyRows:
    made = {arm: {"trained": trained, "lr": 1e-3} for arm, trained in costs.items()}
    return StudyRows(About("t", "c", "hash", {}, [], "", "CPU", {}, "", "", 1.0, costs=made), list(rows))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes studies those of the checkout."""

    def put(**studies: StudyRows) -> None:
        by_name = {name.replace("__", "+"): of for name, of in studies.items()}
        monkeypatch.setattr(race, "specs", lambda: SPEC)
        monkeypatch.setattr(race, "studies", lambda: by_name)
        monkeypatch.setattr(committed, "study", by_name.__getitem__)
        monkeypatch.setattr(race, "PAGE", tmp_path / "race.md")
        monkeypatch.setattr(race, "COSTS", tmp_path / "costs.json")
        monkeypatch.setattr(tables, "CHECKOUT", tmp_path)
        monkeypatch.setattr(committed, "CHECKOUT", tmp_path)

    return put


NLL = [
    row("lora", 1.2, metric="NLL", scale="number", better="lower"),
    row("full", 1.0, metric="NLL", scale="number", better="lower"),
]


def test_without_rows_there_is_no_page(known, capsys: pytest.CaptureFixture[str]) -> None:
    known()
    assert race.main([]) == 0 and race.main(["--check"]) == 0
    assert not race.PAGE.exists() and "no page" in capsys.readouterr().out


def test_best_ties_and_costs(known) -> None:
    known(race_a=study(row("lora", 0.60), row("full", 0.61), row("ia3", 0.5), *NLL, lora=1000, full=9000))
    race.COSTS.write_text('{"race_a": {"lora": {"bytes": 2097152, "seconds": 0.25}}}')
    assert race.main([]) == 0 and race.main(["--check"]) == 0
    text = race.PAGE.read_text()
    assert "| lora | 60.0 ± 2.0 ≈ | 1.200 ± 0.020 | 0.001 | 1,000 | 2 | 250 |" in text
    assert "| full | **61.0 ± 2.0** ★ | **1.000 ± 0.020** ★ | 0.001 | 9,000 | – | – |" in text
    assert "| ia3 | 50.0 ± 2.0 | – | – | – | – | – |" in text
    assert (race.PAGE.with_name("race_a.svg")).exists() and "(race_a.svg)" in text
    race.PAGE.with_name("race_a.svg").unlink()
    race.PAGE.write_text(text.replace("60.0", "60.1"))
    assert race.main(["--check"]) == 1 and not race.PAGE.with_name("race_a.svg").exists()


@pytest.mark.parametrize("low,tie", [(0.001, False), (-0.001, True)])
def test_the_paired_difference_decides_where_it_is_kept(known, low: float, tie: bool) -> None:
    pair = row("full", 0.01, minus="lora", low=low, high=0.02)
    known(race_a=study(row("lora", 0.60), row("full", 0.61), pair, *NLL))
    assert ("60.0 ± 2.0 ≈" in race.page(draw=False)) == tie


def test_an_arm_of_another_run_stands_in_the_same_table(known) -> None:
    mine = study(row("mine", 0.7), row("lora", 0.1), mine=10)
    known(race_a=study(row("lora", 0.60), row("full", 0.61), *NLL), race_a__mine=mine)
    text = race.page(draw=False)
    assert "| mine | **70.0 ± 2.0** ★ | – | 0.001 | 10 | – | – |" in text and "| lora | 60.0 ± 2.0 |" in text


def test_a_column_of_other_examples_has_its_own_number(known) -> None:
    few = [row("lora", 0.6, metric="NLL", n=77)]
    known(race_a=study(row("lora", 0.60, n=1234), *few))
    assert "n = 1,234 episodes (NLL 77), seeds" in race.page(draw=False)


def test_a_column_without_rows_is_one_line(known, capsys: pytest.CaptureFixture[str]) -> None:
    known(race_a=study(row("lora", 0.6)))
    assert race.main([]) == 2
    assert "study 'race_a' has no row for the columns ['NLL']" in capsys.readouterr().err


def test_differences_to_lora_and_to_the_best_arm_of_each_column_are_kept(
    known, monkeypatch: pytest.MonkeyPatch
) -> None:
    known()
    rows = [row("lora", 0.62), row("full", 0.61), row("oft", 0.6)]
    monkeypatch.setattr(race, "study_of", lambda run: study(*rows, *NLL))
    expected = [("lora", "full"), ("lora", "oft"), ("full", "lora"), ("oft", "lora")]
    assert race.pairs(Path("run"), "race_a+mine") == expected
    assert race.pairs(Path("run"), "emtal_small") == []


def test_measured_costs_are_kept_beside_those_of_other_studies(known, monkeypatch: pytest.MonkeyPatch) -> None:
    known(race_a=study(row("lora", 0.6), row("full", 0.61), *NLL))
    race.COSTS.write_text('{"race_b": {}}')
    found = {"lora": {"bytes": 3 * 2**20, "seconds": 0.2}}
    monkeypatch.setattr(race, "step_costs", lambda config: found | {config: {}})
    assert race.main(["--costs", "race_a"]) == 0
    assert json.loads(race.COSTS.read_text()) == {"race_b": {}, "race_a": found | {"race/a": {}}}
    assert "| lora | 60.0 ± 2.0 ≈ | 1.200 ± 0.020 | – | – | 3 | 200 |" in race.PAGE.read_text()


@pytest.mark.parametrize("job", ["multitask", "fewshot"])
def test_memory_of_a_step_grows_with_what_is_trained(job: str, tmp_path: Path) -> None:
    arms = {
        "lora": {"adapt": {"method": "lora", "rank": 2}},
        "wide": {"adapt": {"method": "lora", "rank": 16}},
        "full": {"adapt": {"method": "lisa", "options": {"active": 2, "interval": 100}}},
    }
    config = {key: value for key, value in CONFIGS[job].items() if key not in ("adapt", "fade", "tune", "select")}
    config |= {"train": {**config["train"], "steps": 2 + race.TIMED, "checkpoint_every": 10}}
    path = str(written(tmp_path / "race.yaml", {**config, "adapt": arms["lora"]["adapt"], "arms": arms}))
    costs = race.step_costs(path)
    peaks = {arm: cost["bytes"] for arm, cost in costs.items()}
    assert 0 < peaks["lora"] < peaks["wide"] < peaks["full"] and all(cost["seconds"] > 0 for cost in costs.values())
    assert peaks == {arm: cost["bytes"] for arm, cost in race.step_costs(path).items()}


def test_the_frontier_is_what_no_arm_beats_in_both() -> None:
    points = [
        race.Point(name, cost, score, 0, 0)
        for name, cost, score in (("a", 1, 5), ("b", 2, 4), ("c", 2, 7), ("d", 9, 7))
    ]
    assert [point.arm for point in race.frontier(points)] == ["a", "c"]
    assert [point.arm for point in race.frontier(points, lower=True)] == ["a", "b"]


def test_labels_of_points_beside_each_other_stand_apart() -> None:
    points = [race.Point(str(cost), cost, 0, 0, 0) for cost in (10, 15, 20, 40)]
    assert [[point.cost for point in group] for group in race.neighbours(points)] == [[10, 15, 20], [40]]
    assert race.apart([1.0, 1.1, 5.0], 0.5) == pytest.approx([0.8667, 1.3667, 4.8667], abs=1e-3)


def test_the_committed_page_is_that_of_its_rows() -> None:
    assert race.main(["--check"]) == 0


@pytest.mark.campaign
@pytest.mark.realdata
def test_the_cheapest_rows_are_reproduced(tmp_path: Path) -> None:
    """The three arms with the shortest steps, trained with another seed at their rates, are within the prediction intervals."""
    of = committed.study("race_transfer")
    config = CHECKOUT / "configs" / "race" / "transfer.yaml"
    settings, rates = read_yaml(config, str(config)), {arm: cost["lr"] for arm, cost in of.about.costs.items()}
    root = os.environ.get("VISMT_DATA")
    if root is None or not all((Path(root) / task["name"]).is_dir() for task in settings["tasks"]):
        pytest.skip("the sets of the race are not under VISMT_DATA")
    steps = json.loads((CHECKOUT / ROWS / "race_costs.json").read_text())["race_transfer"]
    arms = {}
    for arm in sorted(steps, key=lambda arm: steps[arm]["seconds"])[:3]:
        head = {"train.rates": {"head": settings["train"]["lr"] / rates[arm]}} if arm != "head" else {}
        arms[arm] = {**settings["arms"][arm], "train.lr": rates[arm], **head}
    changes = [
        f"arms={json.dumps(arms)}",
        "seeds=[7]",
        "tune=null",
        "evaluate.corruptions=[]",
    ]
    assert main(["run", str(config), *changes, "--out", str(tmp_path), "--quiet"]) == 0
    rows = [r for r in of.rows if r.arm in arms and not r.minus and (r.metric, r.condition) == ("accuracy", "clean")]
    found = verdicts(StudyRows(of.about, rows), study_of(next(tmp_path.iterdir())))
    assert len(found) == 3 * (1 + len(settings["tasks"])) and {verdict.word for verdict in found} == {"inside"}, found
