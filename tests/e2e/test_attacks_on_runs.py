"""Attacks and corruptions of dense and multi-task runs, their own and in the robustness job, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.own_images import write_folder
from helpers.tiny_runs import CONFIGS, SHORT, refused, run_config, written

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import config_hash
from vismt.config.typed import build
from vismt.jobs import load_config, open_run, started_config
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.robustness.config import ClassifierConfig
from vismt.jobs.robustness.models import TrainedArm
from vismt.lowrank.model.merge import merge
from vismt.report.results import Result, read_results
from vismt.robustness.attacks.attacks import AttackSpec, robust_accuracy
from vismt.storage.lines import read_lines

ALL, DEPTH = "PGD-2 linf 4/255 on all tasks", "PGD-2 linf 4/255 on depth"
NORMALS, CONTRAST = "PGD-2 linf 4/255 on normals", "contrast 5"
PGD = {"name": "pgd", "epsilon": "4/255", "steps": 2}
CORRUPTIONS = [{"name": "contrast", "severities": [5]}]
DENSE = {
    **CONFIGS["dense"],
    "model": {"name": "short_vit", "pretrained": False},
    "batch": 3,
    "arms": {"lora": {}, "heads": {"adapt": None}, "depth": {"adapt": None, "trained_tasks": ["depth"]}},
    "baseline": "heads",
    "train": {"steps": 4, "lr": 3.0e-3},
    "evaluate": {
        "batch": 4,
        "attacks": [PGD, {**PGD, "tasks": ["depth"]}, {**PGD, "tasks": ["normals"]}],
        "corruptions": CORRUPTIONS,
    },
}
MULTITASK = {
    "task": "multitask",
    "model": SHORT,
    "adapt": {"method": "lora", "rank": 2},
    "tasks": [
        {"name": "digits", "train": ["digits"], "test_share": 0.02, "limit": 40},
        {"name": "photos", "train": ["photo_crops:train"], "test": ["photo_crops:test"], "limit": 36},
    ],
    "batch": 16,
    "train": {"steps": 8, "lr": 1.0e-2},
    "evaluate": {"attacks": [PGD], "corruptions": CORRUPTIONS},
}


def run(folder: Path, name: str, config: dict) -> Path:
    return run_config(written(folder / f"{name}.yaml", config))


def values(folder: Path, arm: str) -> dict[tuple[str, str, str], float]:
    """Return the values of an arm by task, set and condition; of a classification the accuracies."""
    rows = [row for row in read_results(folder / "results.jsonl") if row.arm == arm and row.seed is None]
    rows = [row for row in rows if not row.further]
    rows = [row for row in rows if row.task != "classification" or row.metric not in ("ECE-15", "NLL in nats", "Brier")]
    return {(row.task, row.data, row.condition): row.value for row in rows}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("attacked"), "dense", DENSE)


@pytest.fixture(scope="module")
def multitask(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("attacked"), "multitask", MULTITASK)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, dense: Path, multitask: Path) -> Path:
    """The robustness job over arms of both runs, on their own images."""
    arms = {
        "depth": {"classifier.run": str(dense), "classifier.arm": "depth"},
        "lora": {"classifier.run": str(dense), "classifier.arm": "lora"},
        "classes": {"classifier.run": str(multitask)},
    }
    evaluate = {"attacks": [PGD], "corruptions": CORRUPTIONS, "baseline": "classes"}
    folder = tmp_path_factory.mktemp("compared")
    return run(folder, "compared", {"task": "robustness", "arms": arms, "data": [], "evaluate": evaluate})


def test_a_dense_run_has_its_own_scores_under_every_condition(dense: Path) -> None:
    lora, heads, depth = (values(dense, arm) for arm in ("lora", "heads", "depth"))
    conditions = ("clean", ALL, DEPTH, NORMALS, CONTRAST)
    assert set(heads) == {(task, "motorcycle", name) for task in ("depth", "normals") for name in conditions}
    # the arm without normals is not attacked on them, and has no delta_m
    assert set(depth) == {("depth", "motorcycle", name) for name in conditions if name != NORMALS}
    assert set(lora) == set(heads) | {("delta_m", "motorcycle", name) for name in conditions}
    for arm in (lora, heads):
        at = {(task, condition): value for (task, _, condition), value in arm.items()}
        for task, attacked, other in (("depth", DEPTH, NORMALS), ("normals", NORMALS, DEPTH)):
            assert at[task, attacked] > at[task, "clean"]  # errors, lower is better
            assert at[task, attacked] > at[task, other]
            assert at[task, ALL] > at[task, "clean"]
    for name in conditions:
        gains = [
            -(lora[task, "motorcycle", name] / heads[task, "motorcycle", name] - 1) for task in ("depth", "normals")
        ]
        assert lora["delta_m", "motorcycle", name] == pytest.approx(100 * sum(gains) / 2)
    row: Result = next(row for row in read_results(dense / "results.jsonl") if row.condition == DEPTH)
    assert (row.kind, row.family, row.level) == ("attack", "PGD linf on depth", 4 / 255)
    assert row.n == 6 and row.low <= row.value <= row.high
    text = (dense / "report.md").read_text().replace("\\", "")
    assert all(name in text for name in conditions)


def test_evaluating_again_attacks_nothing(dense: Path) -> None:
    before, times = (
        (dense / "results.jsonl").read_text(),
        {p: p.stat().st_mtime_ns for p in dense.rglob("records/test*.jsonl")},
    )
    assert len(times) == 3 + 1  # one of each arm, and the constant predictions
    assert main(["evaluate", str(dense), "--quiet"]) == 0
    assert (dense / "results.jsonl").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_windows_and_the_mirrored_image_are_attacked_together(tmp_path: Path) -> None:
    evaluate = {"batch": 4, "flip": True, "attacks": [PGD]}
    config = {**DENSE, "adapt": None, "arms": {}, "baseline": None, "canvas": [48, 72], "evaluate": evaluate}
    at = values(run(tmp_path, "windows", config), "adapted")
    for task in ("depth", "normals"):
        assert at[task, "motorcycle", ALL] > at[task, "motorcycle", "clean"]


def test_attack_adds_rows_of_one_task(dense: Path, capsys) -> None:
    command = ["attack", str(dense), "--epsilon", "8/255", "--steps", "2"]
    before = values(dense, "lora")
    assert main([*command, "--task", "depth"]) == 0
    after = values(dense, "lora")
    label = "PGD-2 linf 8/255 on depth"
    assert {key: after[key] for key in before} == before and after["depth", "motorcycle", label] > before[
        "depth", "motorcycle", DEPTH
    ]
    capsys.readouterr()
    for options, words in ((["--task", "dpeth"], "no task 'dpeth'"), (["--attack", "apgd_ce"], "dense runs have pgd")):
        assert words in refused(capsys, *command, *options)


def test_a_multitask_run_has_rows_under_attack_and_corruption(multitask: Path, capsys) -> None:
    rows = values(multitask, "adapted")
    conditions = ("clean", "PGD-2 linf 4/255", CONTRAST)
    assert set(rows) == {("classification", task, name) for task in ("digits", "photos") for name in conditions}
    for task in ("digits", "photos"):
        clean, attacked, _ = (rows["classification", task, name] for name in conditions)
        assert attacked < clean
    assert "for dense runs" in refused(capsys, "attack", multitask, "--task", "digits")


def test_the_robustness_job_has_the_runs_own_numbers(compared: Path, dense: Path, multitask: Path) -> None:
    for arm, folder, name in (("lora", dense, "lora"), ("depth", dense, "depth"), ("classes", multitask, "adapted")):
        here, there = values(compared, arm), values(folder, name)
        shared = {key for key in here if key[2] != "all corruptions"}
        assert {key[2] for key in shared} == {"clean", CONTRAST, ALL if folder is dense else "PGD-2 linf 4/255"}
        assert {key: here[key] for key in shared} == {key: there[key] for key in shared}
    classes = values(compared, "classes")
    key = ("classification", "photos", "all corruptions")
    assert classes[key] == pytest.approx(1 - classes["classification", "photos", CONTRAST])
    assert not any(name == "all corruptions" for _, _, name in values(compared, "lora"))
    text = (compared / "report.md").read_text().replace("\\", "")
    assert "RMSE in m" in text and "Over classes, in %" in text
    # nothing is written into the runs
    assert not [
        path for path in multitask.rglob("records/*") if path.stat().st_mtime > (compared / "run.json").stat().st_mtime
    ]


def test_merged_and_unmerged_are_attacked_alike(multitask: Path) -> None:
    job = open_run(multitask).job
    training = job.study.find(None)
    plain, merged = job.loaded(training), job.loaded(training)
    merge(job.stock(merged))
    assert torch.equal(job.final(training).stock.head.weight, merged.stock.head.weight)
    part = job.data.part(1, "test")
    images = part[torch.arange(16)]
    labels = plain(images).argmax(1)
    # Steps along the gradient itself: signs of entries near zero may differ.
    spec = AttackSpec("pgd", 0.05, norm="l2", steps=4)
    keys = [(0, i) for i in range(16)]
    pair = [spec.perturb(net, images, labels, num_classes=28, keys=keys, exhaust=True) for net in (plain, merged)]
    assert (
        float((pair[0] - pair[1]).abs().max()) < 1e-5 and float((pair[0] - images).flatten(1).norm(dim=1).min()) > 0.04
    )
    robust = [robust_accuracy(net, images, labels, [spec], num_classes=28) for net in (plain, merged)]
    assert torch.equal(*robust) and 0 < int(robust[0].sum()) < 16


def test_a_card_of_a_run_with_equal_names_of_classes_is_its_own_task(tmp_path: Path, capsys) -> None:
    for name in ("first", "second"):
        write_folder(tmp_path / name, count=4)
    tasks = [{"name": name, "train": [str(tmp_path / name)], "test_share": 0.5} for name in ("first", "second")]
    trained = run(tmp_path, "twins", {**MULTITASK, "tasks": tasks, "evaluate": {}, "batch": 6})
    assert main(["merge", str(trained), "--quiet"]) == 0
    merged = next(trained.glob("merged-*"))
    arms = {"card": {"classifier.run": str(trained)}, "key": {"classifier.name": str(merged)}}
    arms |= {"other": {"classifier.run": str(trained), "classifier.task": "first"}}
    arms["key"]["classifier.task"] = "second"
    config = {"task": "robustness", "arms": arms, "data": [str(tmp_path / "second")]}
    folder = run(tmp_path, "cards", config)
    labels = {}
    for arm in arms:
        (path,) = (folder / "classifiers" / arm / "records").iterdir()
        labels[arm] = {row["id"]: row["label"] for row in read_lines(path) if "id" in row}
    count = len(set(labels["other"].values()))
    assert labels["card"] == labels["key"] == {name: label + count for name, label in labels["other"].items()}
    (path,) = trained.rglob("records/test-second.jsonl")
    own = {row["id"].removeprefix("second:"): (row["label"], row["clean"]) for row in read_lines(path) if "id" in row}
    (path,) = (folder / "classifiers" / "card" / "records").iterdir()
    here = {row["id"]: (row["label"], row["clean"]) for row in read_lines(path) if "id" in row}
    assert own.items() <= here.items() and own
    path = written(tmp_path / "ambiguous.yaml", {**config, "arms": {"merged": {"classifier.name": str(merged)}}})
    assert "is in the tasks first, second; name one as classifier.task" in refused(
        capsys, "run", path, "--out", tmp_path / "ambiguous", "--quiet"
    )


def test_merged_and_exported_folders_are_the_run(multitask: Path, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(["merge", str(multitask), "--quiet"]) == 0
    assert main(["export", str(multitask), "--format", "timm", "--to", str(tmp_path / "timm"), "--quiet"]) == 0
    arms = {
        "run": {"classifier.run": str(multitask)},
        "merged": {"classifier.name": str(next(multitask.glob("merged-*")))},
        "exported": {"classifier.name": str(tmp_path / "timm")},
    }
    evaluate = {"images": 40, "attacks": [PGD], "corruptions": CORRUPTIONS}
    config = {"task": "robustness", "arms": arms, "data": ["photo_crops:test"], "evaluate": evaluate}
    folder = run(tmp_path, "folders", config)
    first, *others = (values(folder, arm) for arm in arms)
    assert others == [first, first] and len(first) == 4
    paths = [next((folder / "classifiers" / arm / "records").iterdir()) for arm in arms]
    answers = [[row["clean"] for row in read_lines(path) if "id" in row] for path in paths]
    assert answers[0] == answers[1] == answers[2]
    # normalisation and classes are those of the folder's config.json
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    about["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "timm" / "config.json").write_text(json.dumps(about))
    from vismt.robustness.classifier import load_classifier

    classifier = load_classifier(tmp_path / "timm")
    assert classifier.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert classifier.labels == open_run(multitask).job.data.label_names
    assert main(["merge", str(dense), "--arm", "lora", "--quiet"]) == 0
    capsys.readouterr()
    arms = {"a": {"classifier.name": str(next(dense.glob("merged-*")))}}
    path = written(tmp_path / "backbone.yaml", {**config, "arms": arms})
    assert "a backbone without a classifier" in refused(capsys, "run", path, "--out", tmp_path / "none", "--quiet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": [{"name": "square"}]}, "dense runs have pgd"),
        ({"attacks": [{**PGD, "tasks": ["semseg"]}]}, "no task 'semseg'"),
        ({"corruptions": [{"name": "elastic_transform"}]}, "moves pixels"),
        ({"attacks": [PGD, PGD]}, "asked for twice"),
    ],
)
def test_errors_of_a_dense_run(tmp_path: Path, capsys, changes: dict, words: str) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**DENSE, "evaluate": changes}))
    assert (
        words in refused(capsys, "run", tmp_path / "a.yaml", "--out", tmp_path / "runs", "--quiet")
        and not (tmp_path / "runs").exists()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"classifier.name": "test_vit"}}}, "data: []; name at least one card"),
        ({"arms": {"a": {"classifier.run": "DENSE", "classifier.size": 32}}}, "of their own size"),
        ({"evaluate": {"images": 5}}, "leave out what is for cards: evaluate.images"),
        (
            {"arms": {"a": {"classifier.run": "DENSE", "classifier.img_size": 32}}},
            "classifier.img_size: it is for a timm",
        ),
        ({"data": ["digits"]}, "a dense run does not classify images of cards"),
        ({"evaluate": {"attacks": [{"name": "apgd_ce"}]}}, "dense runs have pgd"),
        ({"arms": {"a": {"classifier.run": "COMPARED"}}}, "trains nothing"),
    ],
)
def test_errors_of_runs_as_arms(
    dense: Path, multitask: Path, compared: Path, tmp_path: Path, capsys, changes: dict, words: str
) -> None:
    arms = {
        "classes": {"classifier.run": str(multitask)},
        "a": {"classifier.run": str(dense), "classifier.arm": "lora"},
    }
    text = yaml.safe_dump({"task": "robustness", "arms": arms, "data": [], **changes})
    (tmp_path / "a.yaml").write_text(text.replace("DENSE", str(dense)).replace("COMPARED", str(compared)))
    assert words in refused(capsys, "run", tmp_path / "a.yaml", "--out", tmp_path / "runs", "--quiet")
    assert not list((tmp_path / "runs").rglob("records")) or "data" in changes  # nothing was evaluated before


def test_a_job_without_images_of_its_own_says_so(tmp_path: Path) -> None:
    config = build(FewShotConfig, {"evaluate": {"data": ["digits"]}, "source": {"data": ["photo_crops:train"]}}, "a")
    with started_config(config, tmp_path / "a") as run:
        folder = run.folder
    with pytest.raises(UserError, match="'fewshot' has no images of its own"):
        TrainedArm(ClassifierConfig(run=str(folder)))


def test_runs_without_attacks_keep_their_hash(tmp_path: Path) -> None:
    plain = {**DENSE, "evaluate": {"batch": 4}}
    explicit = {**DENSE, "evaluate": {"batch": 4, "attacks": [], "corruptions": []}}
    assert config_hash(build(MultitaskConfig, plain, "a")) == config_hash(build(MultitaskConfig, explicit, "a"))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(DENSE))
    assert config_hash(load_config(tmp_path / "a.yaml", [])) != config_hash(build(MultitaskConfig, plain, "a"))
