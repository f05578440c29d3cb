"""`vismt predict` of runs that classify, and risk and outside sets of a class of the image beside maps."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.results import rows_by_task
from helpers.room import MAPS, dense
from helpers.tiny_runs import TRAIN, VIT, refused, run_config, written

from vismt.cli import main
from vismt.evaluation.risk import AURC, COVERED, SIZE, Risk
from vismt.jobs import load_config, make_job, open_run
from vismt.jobs.multitask.config import MultitaskEvaluateConfig
from vismt.jobs.predictions import TABLE
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines

pytestmark = pytest.mark.usefixtures("in_room")

PGD = "PGD-2 linf 2/255 on all tasks"


@pytest.fixture(scope="module")
def mixed(room: Path, tmp_path_factory) -> Path:
    """A run with maps and a class of the image, its risk, and a set of other classes."""
    evaluate = {
        "risk": True,
        "ood": [f"{room}/reds:test"],
        "attacks": [{"name": "pgd", "epsilon": "2/255", "steps": 2}],
        "corruptions": [{"name": "contrast", "severities": [5]}],
    }
    arms = {"both": {}, "classify": {"trained_tasks": ["classify"]}, "semseg": {"trained_tasks": ["semseg"]}}
    baseline = {"semseg": "semseg", "classify": "classify"}
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_DATA", str(room / "data"))
        return run_config(written(folder / "mixed.yaml", dense(room, arms=arms, baseline=baseline, evaluate=evaluate)))


def test_the_probabilities_are_those_of_the_net(mixed: Path, tmp_path: Path) -> None:
    """The answers on record against the net itself, and thresholds against its validation images one by one."""
    job = open_run(mixed).job
    (training,) = job.study.trainings("both")
    net = job.final(training)
    log_p, nlls = {}, []
    for part in ("validation", "test"):
        rows = job.data.part(part)
        for i, (images, number) in enumerate(rows.entries):
            if images.labels is not None:
                with torch.no_grad():
                    logits = net(rows.fitted(i, job.data.size)["image"][None])["classify"][0]
                label = int(images.labels[number])
                log_p[rows.ids[i]] = (logits.double().log_softmax(0), label)
                if part == "validation":
                    nlls.append(-float(log_p[rows.ids[i]][0][label]))
    assert len(nlls) == 24
    quantile = read_sealed(training.folder / "records" / "risk-classify.json", "risk")["quantile"]
    assert quantile == pytest.approx(sorted(nlls)[math.ceil(25 * 0.9) - 1], abs=1e-5)
    # Another version of the net has thresholds of its own beside its records.
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data *= 1.5
    fitted = Risk(True).fitted(job.evaluation.views(lambda: other, training, "test", tmp_path)["classify"])
    assert fitted.quantile != quantile and (tmp_path / "risk-classify.json").exists()
    answers = job.pooled(training, "test")["classify"].answers
    for name, row in answers.items():
        values, label = log_p[name]
        assert row["label"] == label and row["clean"] == int(values.argmax())
        assert row["clean nll"] == pytest.approx(-float(values[label]), abs=1e-5)


def test_delta_m_compares_the_tasks_scores_alone(mixed: Path) -> None:
    found = {arm: rows_by_task(mixed, arm) for arm in ("both", "classify", "semseg")}
    for condition in ("clean", "contrast 5"):
        gains = [
            found["both"][task, condition, metric].value / found[task][task, condition, metric].value - 1
            for task, metric in (("semseg", "mIoU"), ("classify", "accuracy"))
        ]
        delta = next(row for (task, name, _), row in found["both"].items() if (task, name) == ("delta_m", condition))
        assert delta.value == pytest.approx(100 * sum(gains) / 2)
    assert not any(task == "delta_m" and "against" in condition for task, condition, _ in found["both"])


def test_predict_writes_classes_and_sets_beside_the_pictures(mixed: Path, room: Path, tmp_path: Path) -> None:
    images = room / "data/tones/test/dark"
    assert main(["predict", str(mixed), str(images), "--arm", "both", "--to", str(tmp_path), "--quiet"]) == 0
    job = open_run(mixed).job
    answers = job.pooled(job.study.find("both"), "test")["classify"].answers
    with (tmp_path / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and len(list(tmp_path.glob("*.png"))) == 6
    for row in rows:
        record = next(answer for name, answer in answers.items() if name.endswith(Path(row["image"]).name))
        assert row["task"] == "classify" and row["label"] == ["bright", "dark"][record["clean"]]
        assert float(row["probability"]) == pytest.approx(record["clean confidence"], abs=1e-5)
        assert len(json.loads(row["set"])) == record["clean set"]
    # At their own size images are predicted otherwise than the validation images, for which the thresholds hold.
    command = ["predict", str(mixed), str(images), "--arm", "both", "--to", str(tmp_path), "--own-size", "--quiet"]
    assert main(command) == 0 and "set" not in (tmp_path / TABLE).read_text().splitlines()[0].split(",")


def test_a_tuned_run_keeps_half_of_the_classified_images_for_thresholds(room: Path, tmp_path: Path) -> None:
    config = dense(
        room, tune={"rates": [1e-3, 1e-2]}, evaluate={"risk": True}, tasks=[{"name": "classify", "classes": 2}]
    )
    config["data"] = {part: names[1:] for part, names in config["data"].items()}
    job = open_run(run_config(written(tmp_path / "tuned.yaml", config))).job
    (training,) = job.study.trainings("adapted")
    assert read_sealed(training.folder / "records" / "risk-classify.json", "risk")["n"] == 12
    answers = job.pooled(training, "validation")["classify"].answers
    right = {name: row["clean"] == row["label"] for name, row in answers.items()}
    # The first half of each class, in its order, chooses.
    chosen = [list(right)[12 * label + place] for label in (0, 1) for place in range(6)]
    expected = sum(right[name] for name in chosen) / 12
    assert job.validate(training) == pytest.approx(max(expected, 1e-6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": MAPS, "evaluate": {"risk": True}}, "evaluate.risk: no task is of whole images"),
        ({"tasks": MAPS, "evaluate": {"ood": ["digits"]}}, "evaluate.ood: no task is of whole images"),
        ({"evaluate": {"risk": True, "split": "validation"}}, "set evaluate.split to test"),
        ({"evaluate": {"ood": ["tones:test"]}}, "shares examples with data"),
        ({"validation": []}, "data: nothing to validate on"),
        (
            {"validation": ["scenes:val", "tones:train"], "train": ["scenes:train", "tones:val"]},
            "8 validation examples for the thresholds",
        ),
    ],
)
def test_errors_of_risk_are_one_line(room: Path, tmp_path: Path, capsys, changes: dict, words: str) -> None:
    config = dense(room, evaluate={"risk": True})
    for part in ("train", "validation"):
        if part in changes:
            names = [f"{room}/{name}" for name in changes.pop(part)]
            config["data"] = {**config["data"], part: names}
    for name in changes.get("evaluate", {}).get("ood", ()):
        if name != "digits":
            changes["evaluate"]["ood"] = [f"{room}/{name}"]
    path = written(tmp_path / "bad.yaml", {**config, **changes})
    assert words in refused(capsys, "run", path, "--out", tmp_path, "--quiet")


# ---- multitask --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["union", "separate"])
def classes(room: Path, tmp_path_factory, request: pytest.FixtureRequest) -> Path:
    """A run of two tasks with risk."""
    folder = tmp_path_factory.mktemp("classes")
    tasks = [
        {
            "name": name,
            "train": [f"{room}/{name}:train"],
            "validation": [f"{room}/{name}:val"],
            "test": [f"{room}/{name}:test"],
        }
        for name in ("tones", "reds")
    ]
    config = {
        "task": "multitask",
        "model": VIT,
        "adapt": {"method": "lora", "rank": 2},
        "tasks": tasks,
        "head": request.param,
        "batch": 4,
        "train": {**TRAIN, "steps": 6},
        "evaluate": {"batch": 5, "risk": True},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_DATA", str(room / "data"))
        return run_config(written(folder / "classes.yaml", config))


def test_predict_of_a_multitask_run_agrees_with_its_records(classes: Path, room: Path, tmp_path: Path) -> None:
    folders = [str(room / "data/tones/test/bright"), str(room / "data/reds/test/gloom")]
    assert main(["predict", str(classes), *folders, "--maps", "--to", str(tmp_path), "--quiet"]) == 0
    job = open_run(classes).job
    union = job.config.head == "union"
    (training,) = job.study.trainings("adapted")
    names = job.data.label_names
    quantiles = {
        task: read_sealed(training.folder / f"records/risk-{task}.json", "risk")["quantile"]
        for task in ("tones", "reds")
    }
    with (tmp_path / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (12 if union else 24)
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert arrays["labels"].tolist() == names == ["tones/bright", "tones/dark", "reds/gloom", "reds/shine"]
        probabilities = dict(zip(arrays["images"].tolist(), arrays["probabilities"]))
    for task in ("tones", "reds"):
        records = [row for row in read_lines(training.folder / f"records/test-{task}.jsonl") if "id" in row]
        for row in rows:
            if f"/{task}/" not in row["image"] or (not union and row["task"] != task):
                continue
            folder, file_name = Path(row["image"]).parts[-2:]
            record = next(record for record in records if record["id"].endswith(f"{folder}/{file_name}"))
            assert row["label"] == names[record["clean"]]
            assert float(row["probability"]) == pytest.approx(record["clean confidence"], abs=1e-5)
            span = slice(4) if union else {"tones": slice(2), "reds": slice(2, 4)}[task]
            p = probabilities[row["image"]][span]
            assert p.sum() == pytest.approx(1, abs=1e-5)
            assert p.max() == pytest.approx(float(row["probability"]), abs=1e-5)
            quantile = max(quantiles.values()) if union else quantiles[task]
            assert len(json.loads(row["set"])) == int((-np.log(p) <= quantile).sum())


def test_predict_names_what_is_for_maps(classes: Path, room: Path, capsys) -> None:
    image = str(room / "data/tones/test/bright")
    for option in ("--own-size", "--flip"):
        assert main(["predict", str(classes), image, option, "--quiet"]) == 2
        wanted = (
            f"error: predict: {option[2:]} is for dense runs, and this run of multitask does not use it; leave it out. "
        )
        wanted += "Known: arm, maps, sheet, top.\n"
        assert capsys.readouterr().err == wanted


def test_a_robustness_run_takes_the_risk_of_a_dense_run_that_has_classes(
    mixed: Path, tmp_path: Path, room: Path
) -> None:
    evaluate = {"risk": True, "corruptions": [{"name": "contrast", "severities": [5]}]}
    config = {
        "task": "robustness",
        "arms": {"a": {"classifier.run": str(mixed), "classifier.arm": "both"}},
        "evaluate": evaluate,
    }
    found, own = rows_by_task(run_config(written(tmp_path / "own.yaml", config)), "a"), rows_by_task(mixed, "both")
    for key in [
        ("classify", condition, metric) for condition in ("clean", "contrast 5") for metric in (COVERED, SIZE, AURC)
    ]:
        assert found[key].value == pytest.approx(own[key].value), key
    plain = dense(room, tasks=MAPS)
    plain["data"] = {part: names[:1] for part, names in plain["data"].items()}
    folder = tmp_path / "maps"
    job = make_job(load_config(written(tmp_path / "maps.yaml", plain)), folder)
    with pytest.raises(Exception, match="has no class probabilities of images"):
        job.check_features(MultitaskEvaluateConfig(risk=True))
