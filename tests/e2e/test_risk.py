"""`evaluate.risk` in the classification, robustness and language-model jobs: from the records to the report, and user errors."""

from __future__ import annotations

import json
import math
from copy import copy
from pathlib import Path

import pytest
import yaml
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.tiny_runs import SHORT, TRAIN, run_config, written

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.division import validation_parts
from vismt.engine.study import read_choice
from vismt.evaluation.risk import COVERED, Risk
from vismt.jobs import open_run
from vismt.report.results import Result, read_results
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines

COLUMNS = Risk.summary.metrics
PGD = "PGD-2 linf 2/255"
CONDITIONS = {
    "attacks": [{"name": "pgd", "epsilon": "2/255", "steps": 2}],
    "corruptions": [{"name": "fog", "severities": [1, 5]}],
}
DIGITS = {
    "task": "multitask",
    "model": SHORT,
    "adapt": {"method": "lora", "rank": 2},
    "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.05, "limit": 40}],
    "batch": 8,
    "train": TRAIN,
    "evaluate": {"batch": 64, "risk": True, **CONDITIONS},
}


def run(folder: Path, name: str, config: dict[str, object]) -> Path:
    return run_config(written(folder / f"{name}.yaml", config))


def refused(folder: Path, config: dict[str, object], capsys: pytest.CaptureFixture) -> str:
    path = folder / "refused.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", str(path), "--out", str(folder / "refused")]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("risk"), "digits", DIGITS)


def numbers(folder: Path) -> dict[tuple[str, str], Result]:
    rows = read_results(folder / "results.jsonl")
    return {(row.condition, row.metric): row for row in rows if row.seed is None and row.metric in COLUMNS}


def test_robustness_on_a_runs_own_images_takes_the_thresholds_of_the_run(digits: Path, tmp_path: Path) -> None:
    config = {
        "task": "robustness",
        "arms": {"digits": {"classifier.run": str(digits)}},
        "evaluate": {"batch": 64, "risk": True, **CONDITIONS},
    }
    found, own = numbers(run(tmp_path, "own", config)), numbers(digits)
    for key, row in own.items():
        assert found[key].value == pytest.approx(row.value), key


def test_a_tuned_runs_thresholds_come_from_the_half_of_validation_that_chose_no_rate(tmp_path: Path, capsys) -> None:
    config = {**DIGITS, "tune": {"rates": [1.0e-3, 1.0e-2]}, "evaluate": {"batch": 64, "risk": True}}
    job = open_run(run(tmp_path, "tuned", config)).job
    (training,) = job.trainings("adapted")
    labels = job.data.part(0, "validation").labels
    chooses, gives = validation_parts(labels, True)
    assert chooses.sum() == len(labels) // 2 and not bool((chooses & gives).any())
    rows = [row for row in read_lines(training.folder / "records" / "validation-digits.jsonl") if "id" in row]
    right = [row["clean"] == row["label"] for row, kept in zip(rows, chooses.tolist(), strict=True) if kept]
    chosen = read_choice(job.folder, "adapted")
    assert chosen.validation[f"{chosen.lr:g}"] == pytest.approx(sum(right) / len(right))
    logits, _ = job.evaluation.validation(job.final(training), training)[0]
    nlls = -logits[gives].double().log_softmax(1).gather(1, labels[gives, None])[:, 0]
    expected = nlls.sort().values[math.ceil((len(nlls) + 1) * 0.9) - 1]
    found = read_sealed(training.folder / "records" / "risk-digits.json", "risk")
    assert (found["quantile"], found["n"]) == (pytest.approx(float(expected)), int(gives.sum()))
    # A run that chose its rates without thresholds in view has no example left for them.
    asked = copy(job.config.evaluate)
    job.config.evaluate.risk = False
    with pytest.raises(UserError, match="chose its rates on all of its validation images"):
        job.check_features(asked)
    few = {**DIGITS["tasks"][0], "validation_share": 0.005}
    assert "5 validation examples for the thresholds" in refused(tmp_path, {**config, "tasks": [few]}, capsys)


def test_robustness_on_cards_calibrates_on_images_that_it_does_not_evaluate(
    digits: Path, tmp_path: Path, capsys
) -> None:
    evaluate = {"images": 40, "risk": True, "threshold_images": 50, "batch": 20, **CONDITIONS}
    config = {
        "task": "robustness",
        "arms": {"digits": {"classifier.run": str(digits)}},
        "data": ["digits"],
        "evaluate": evaluate,
    }
    folder = run(tmp_path, "cards", config)
    assert numbers(folder)["clean", COVERED].n == 40
    thresholds = json.loads(next((folder / "classifiers" / "digits").glob("risk*.json")).read_text())
    assert thresholds["n"] == 50
    assert "threshold_images" in refused(tmp_path, {**config, "evaluate": {**evaluate, "threshold_images": 0}}, capsys)
    assert "has 50 images besides" in refused(  # of the 90 on which the run did not train
        tmp_path, {**config, "evaluate": {**evaluate, "threshold_images": 9999}}, capsys
    )
    assert "8 validation examples" in refused(
        tmp_path, {**config, "evaluate": {**evaluate, "threshold_images": 8}}, capsys
    )


def test_a_language_models_classes_have_sets(tmp_path: Path, capsys) -> None:
    cards = save_texts(tmp_path)
    films, other = cards["films"], str(cards["other"])
    task = sentiment_task(films, limit=16, validation=[f"{films}:dev", other], test=[f"{films}:test"])
    config = {
        "task": "lm",
        "model": {"name": str(save_lm(tmp_path / "tiny")), "first_block": 1},
        "tasks": [task],
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": TRAIN,
        "batch": 4,
        "evaluate": {
            "batch": 4,
            "frozen": False,
            "risk": True,
            "temperature": True,
            "laplace": True,
        },  # no threshold changes
    }
    folder = run(tmp_path, "words", config)
    training = next((folder / "arms" / "adapted").glob("lr-*"))
    log_p = {
        part: [
            row for path in (training / "records").glob(f"{part}*.jsonl") for row in read_lines(path) if "log_p" in row
        ]
        for part in ("validation", "test")
    }
    scores = sorted(-row["log_p"][row["label"]] for row in log_p["validation"])
    assert len(scores) == 14
    quantile = scores[math.ceil(15 * 0.9) - 1]  # the largest of 14
    covered = [-row["log_p"][row["label"]] <= quantile for row in log_p["test"]]
    assert numbers(folder)["clean", COVERED].value == pytest.approx(sum(covered) / len(covered))
    causal = {**task, "kind": "causal", "options": {"answer": "{text}", "length": 16, "end": False}, "prompt": ""}
    assert "has no probabilities of choices" in refused(
        tmp_path, {**config, "tasks": [causal], "evaluate": {"risk": True}}, capsys
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate": {"risk": True, "split": "validation"}}, "set evaluate.split to test"),
        ({"tasks": [{**DIGITS["tasks"][0], "validation_share": 0.0}]}, "'digits' has no validation images"),
        ({"arms": {"a": {"evaluate.risk": False}}}, "must be the same for all arms"),
        ({"evaluate": {"ood": ["digits"]}}, "shares examples with tasks: "),
    ],
)
def test_reports_that_cannot_be_made_are_refused(changes, text, tmp_path: Path, capsys) -> None:
    assert text in refused(tmp_path, {**DIGITS, **changes}, capsys)
