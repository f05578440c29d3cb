"""The robustness job: a checkpoint, a user's function and a run folder as arms, from configuration to report."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.golden_reports import check_report
from helpers.results import scores_of
from helpers.tiny_runs import refused, run_config, save_classifier, written

from vismt.cli import main
from vismt.storage.lines import read_lines

RADII = (2 / 255, 8 / 255)
FUNCTION = """
import torch
from torch import nn

def load():
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10)), 10

def wrong():
    return 3
"""


def write(folder: Path, **changes: object) -> Path:
    config = {
        "task": "robustness",
        "arms": {
            "vit": {"classifier.name": str(folder / "model.safetensors")},
            "linear": {"classifier.function": "user_models:load", "classifier.size": 32},
        },
        "data": ["digits"],
        "evaluate": {
            "images": 12,
            "batch": 5,
            "attacks": [{"name": "pgd", "epsilon": radius, "steps": 2} for radius in RADII],
            "corruptions": [{"name": "fog", "severities": [1, 3]}, {"name": "contrast", "severities": [5]}],
            "baseline": "vit",
        },
    }
    return written(folder / "robust.yaml", {**config, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a checkpoint and a module of the user's."""
    folder = tmp_path_factory.mktemp("robust")
    save_classifier(folder)
    (folder / "user_models.py").write_text(FUNCTION)
    return folder


@pytest.fixture(scope="module")
def run_folder(models: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        assert main(["run", str(write(models)), "--out", "runs", "--quiet"]) == 0
    return next((models / "runs").iterdir())


def test_every_condition_of_every_classifier_is_a_row(run_folder: Path) -> None:
    rows = scores_of(run_folder)
    conditions = {row["condition"]: (row["kind"], row["level"]) for row in rows}
    assert conditions == {
        "clean": ("clean", None),
        "PGD-2 linf 2/255": ("attack", pytest.approx(RADII[0])),
        "PGD-2 linf 8/255": ("attack", pytest.approx(RADII[1])),
        "fog 1": ("corruption", 1),
        "fog 3": ("corruption", 3),
        "contrast 5": ("corruption", 5),
        "all corruptions": ("variant", None),
    }
    assert len(rows) == 2 * len(conditions) and {row["arm"] for row in rows} == {"vit", "linear"}
    assert all(row["n"] == 12 and row["seed"] is None and row["low"] <= row["value"] <= row["high"] for row in rows)


def test_values_follow_from_the_records(run_folder: Path) -> None:
    rows = scores_of(run_folder)
    for arm in ("vit", "linear"):
        path = next((run_folder / "classifiers" / arm / "records").iterdir())
        answers = [line for line in read_lines(path) if "id" in line]
        value = {row["condition"]: row["value"] for row in rows if row["arm"] == arm}
        right = [line["clean"] == line["label"] for line in answers]
        assert value["clean"] == pytest.approx(sum(right) / 12)
        # right under attack counts only where the clean image is right
        attacked = [line["PGD-2 linf 8/255"] == line["label"] for line in answers]
        assert value["PGD-2 linf 8/255"] == pytest.approx(sum(a and b for a, b in zip(right, attacked)) / 12)
        # the mean over corruptions of the mean error over severities, 2 of fog and 1 of contrast
        fog = (value["fog 1"] + value["fog 3"]) / 2
        assert value["all corruptions"] == pytest.approx(1 - (fog + value["contrast 5"]) / 2)


def test_the_report_compares_the_classifiers(run_folder: Path) -> None:
    check_report(run_folder, "robustness")


def test_a_second_run_evaluates_nothing_again(run_folder: Path, models: Path, monkeypatch) -> None:
    monkeypatch.chdir(models)
    before = (run_folder / "results.jsonl").read_text()
    times = {path: path.stat().st_mtime_ns for path in run_folder.glob("classifiers/*/records/*")}
    assert main(["evaluate", str(run_folder), "--quiet"]) == 0
    assert (run_folder / "results.jsonl").read_text() == before
    assert {path: read_lines(path) for path in times} and len(times) == 2


def test_an_arm_of_a_run_folder_is_a_classifier(models: Path, tmp_path: Path, monkeypatch) -> None:
    tasks = {
        "task": "multitask",
        "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [{"name": "figures", "train": ["digits"], "test_share": 0.02, "limit": 40}],
        "batch": 8,
        "train": {"steps": 2},
    }
    trained = run_config(written(tmp_path / "tasks.yaml", tasks))
    monkeypatch.chdir(models)
    arms = {"ours": {"classifier.run": str(trained), "classifier.arm": "adapted"}}
    (row,) = scores_of(run_config(write(tmp_path, arms=arms, evaluate={"images": 12})))
    assert row["arm"] == "ours" and row["n"] == 12 and row["chance"] == 0.1


def test_a_classifier_at_chance_is_told(models: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(models)
    arms = {"vit": {"classifier.name": "model.safetensors"}}  # with random weights
    assert main(["run", str(write(tmp_path, arms=arms, evaluate={"images": 12})), "--out", str(tmp_path / "runs")]) == 0
    assert "is not told from chance" in capsys.readouterr().out


def test_a_run_is_not_scored_on_the_images_that_it_trained_or_chose_on(finished, tmp_path: Path, capsys) -> None:
    own = finished("multitask")
    expected = {row["data"]: row for row in scores_of(own) if row["metric"] == "accuracy"}
    save_classifier(tmp_path)
    arms = {"ours": {"classifier.run": str(own)}, "other": {"classifier.name": str(tmp_path / "model.safetensors")}}
    scored = run_config(write(tmp_path, arms=arms, data=["digits"], evaluate={}))
    rows = {row["arm"]: row for row in scores_of(scored) if row["metric"] == "accuracy"}
    assert rows["ours"]["value"] == expected["digits"]["value"]
    assert rows["ours"]["n"] == rows["other"]["n"] == expected["digits"]["n"] < 1797
    arms = {"ours": {"classifier.run": str(own)}}
    path = write(tmp_path, arms=arms, data=["photo_crops:train"], evaluate={})
    assert "'photo_crops:train' shares examples with the training of the run" in refused(capsys, "run", path, "--quiet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {}}}, "classifier: nothing given"),
        ({"arms": {"a": {"classifier.function": "user_models:load"}}}, "classifier.size"),
        ({"arms": {"a": {"classifier.function": "nowhere:load", "classifier.size": 32}}}, "nowhere"),
        ({"arms": {"a": {"classifier.function": "user_models:laod", "classifier.size": 32}}}, "'load'"),
        ({"arms": {"a": {"classifier.function": "user_models:wrong", "classifier.size": 32}}}, "user_models:wrong"),
        ({"arms": {"a": {"classifier.run": "nowhere"}}}, "nowhere"),
        ({"arms": {"a": {"classifier.nmae": "x"}}}, "'name'"),
        ({"data": []}, "data: []"),
        ({"data": ["photo_crops:test"]}, "10 outputs"),
        ({"train": {}}, "nothing is trained"),
        ({"arms": {"a": {"train": {}}}}, "arms.a: train must be the same for all arms"),
        ({"evaluate": {"masking": True}}, "unknown key 'evaluate.masking'. Leave it out, and add the attack `strong`"),
        ({"arms": {"a": {"classifier.quantise": "int8"}}}, "unknown key 'classifier.quantise'. Leave it out."),
        ({"evaluate": {"baseline": "vti"}}, "'vit'"),
        ({"evaluate": {"images": 1}}, "images is 1"),
    ],
)
def test_errors_are_one_line(models: Path, tmp_path: Path, monkeypatch, capsys, changes: dict, words: str) -> None:
    monkeypatch.chdir(models)
    path = write(models, **{"evaluate": {"images": 12}, **changes})
    assert words in refused(capsys, "run", path, "--out", tmp_path / "runs", "--quiet")


def test_a_robustness_run_has_nothing_to_merge(run_folder: Path, capsys) -> None:
    assert "no trained adapter" in refused(capsys, "merge", run_folder)
