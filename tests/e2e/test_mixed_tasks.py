"""Maps and several tasks of whole images, each with sets of its own, in one net: training to prediction, and user errors."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from helpers.results import rows_by_task
from helpers.room import MAPS, dense, parts
from helpers.tiny import tiny_vit
from helpers.tiny_runs import refused, run_config, written

from vismt.backbones.vit import Backbone
from vismt.cli import main
from vismt.jobs import load_config, make_job, open_run
from vismt.jobs.multitask.maps_data import Rows
from vismt.jobs.predictions import TABLE
from vismt.multitask.heads import make_map_head, make_pooled_head
from vismt.multitask.nets import DenseNet, Union
from vismt.multitask.objectives import MultitaskObjective
from vismt.multitask.tasks import make_task
from vismt.multitask.tasks.classes import unite
from vismt.storage.files import read_sealed

pytestmark = pytest.mark.usefixtures("in_room")

PGD = "PGD-2 linf 8/255 on all tasks"
STILL = {"strength": 0, "scales": [1.0, 1.0], "flip": False}


def mix(room: Path, **changes: object) -> dict:
    """Return a configuration of scenes, grey tones and red tones."""
    classes = [{"name": name, **parts(room, name)} for name in ("tones", "reds")]
    return dense(room, **{"data": parts(room, "scenes"), "tasks": [*MAPS, *classes], **changes})


def alone(room: Path, labels: str) -> dict:
    """Return a configuration of the two tasks of whole images, that trains their heads until they are right."""
    config = mix(
        room, adapt=None, head={"labels": labels}, batch=8, train={"steps": 60, "lr": 3e-2, "checkpoint_every": 60}
    )
    del config["data"]
    return {**config, "tasks": config["tasks"][1:], "augment": STILL}


@pytest.fixture(scope="module")
def study(room: Path, tmp_path_factory) -> Path:
    """All three tasks with a union of the two tasks of whole images; and each of those without the other."""
    folder = tmp_path_factory.mktemp("mixed")
    arms = {"all": {}, "tones": {"trained_tasks": ["tones"]}}
    evaluate = {"risk": True, "attacks": [{"name": "pgd", "epsilon": "8/255", "steps": 2}]}
    head = {"name": "linear", "labels": "union"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_DATA", str(room / "data"))
        config = mix(room, head=head, arms=arms, evaluate=evaluate, balancing={"method": "uncertainty"})
        return run_config(written(folder / "mixed.yaml", config))


def test_every_task_has_a_score_over_its_own_images(study: Path) -> None:
    found = rows_by_task(study, "all")
    for condition in ("clean", PGD):
        assert found["semseg", condition, "mIoU"].n == 2
        for task in ("tones", "reds"):
            assert found[task, condition, "accuracy"].n == 12
            assert found[task, condition, "coverage of sets"].n == 12
    assert {task for task, _, _ in rows_by_task(study, "tones")} == {"tones"}
    job = open_run(study).job
    assert all(job.described("all").count(f"{name}:train") == 1 for name in ("scenes", "tones", "reds"))
    (training,) = job.study.trainings("all")
    for task in ("tones", "reds"):
        assert read_sealed(training.folder / "records" / f"risk-{task}.json", "risk")["n"] == 24
        answers = job.pooled(training, "test")[task].answers
        assert len(answers) == 12 and all(name.startswith(f"{task}:test") for name in answers)


def test_an_image_has_the_label_of_its_own_source(room: Path, tmp_path: Path) -> None:
    """Red images have classes of reds in their order, gloom and shine, grey ones of tones, bright and dark, others a map."""
    job = make_job(load_config(written(tmp_path / "mixed.yaml", mix(room, augment=STILL))), tmp_path / "run")
    batches = job.batches(job.study.arms["adapted"])
    seen = set()
    for number in range(10):
        batch = batches(number)
        for place, image in enumerate(batch["image"]):
            labels = {
                name: int(batch[name][place])
                for name in ("class:tones", "class:reds")
                if name in batch and batch[name][place] >= 0
            }
            if "semseg" in batch and bool((batch["semseg"][place] != 255).any()):
                labels["semseg"] = 0
            ((name, label),) = labels.items()
            red, green = image[:2, :, :24].mean((-2, -1)).tolist()  # the rest is padding
            if name != "semseg":
                assert (red > 2 * green) == (name == "class:reds")
                assert (label == 1) == ((red > 0.45) == (name == "class:reds"))
            seen.add((name, label))
    assert len(seen) == 5


def test_the_loss_of_a_union_is_over_the_classes_of_all_tasks() -> None:
    """Two tasks of 2 and 3 classes: label 1 of the second is output 3 of five, a label of the first one of the first two."""
    first, second = (make_task({"name": name, "kind": "classify", "classes": k}) for name, k in (("a", 2), ("b", 3)))
    semseg = make_task({"name": "semseg", "classes": 4})
    tasks = unite([first, semseg, second])
    backbone = Backbone(tiny_vit())
    heads = {
        "semseg": make_map_head("linear", [backbone.width], 4),
        "b": make_pooled_head([backbone.width], 3, seed=2),
        "a": make_pooled_head([backbone.width], 2, seed=1),
    }
    net = DenseNet(backbone, heads, [-1], union=["a", "b"])
    images = torch.rand(3, 3, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    outputs = net(images)
    tap = backbone.maps(images, net.blocks)
    rows = torch.cat([heads["a"](tap), heads["b"](tap)], 1)
    assert torch.equal(outputs["a"], rows) and torch.equal(outputs["b"], rows)
    batch = {"image": images, "class:a": torch.tensor([1, -1, -1]), "class:b": torch.tensor([-1, 1, 2])}
    result = MultitaskObjective(net, [semseg], Union(("a", "b"), (2, 3)))(batch)
    log_p = rows.log_softmax(1)
    assert result["a"].item() == pytest.approx(-log_p[0, 1].item(), rel=1e-5)
    assert result["b"].item() == pytest.approx(-(log_p[1, 3] + log_p[2, 4]).item() / 2, rel=1e-5)
    assert result["semseg"].isnan() and result["loss"].item() == pytest.approx(result["ce"].item())
    assert result["ce"].item() == pytest.approx(
        (result["a"] + 2 * result["b"]).item() / 3, rel=1e-5
    )  # one mean over images
    metric = tasks[2].metric()
    tasks[2].update(metric, torch.eye(5)[[3, 1, 4]], torch.tensor([1, 1, -1]))
    assert metric.compute() == {"accuracy": 0.5, "images": 2}


def test_a_mix_has_what_whole_images_have(room: Path, tmp_path: Path) -> None:
    """Quality retaining, smoothed labels, images for CorDA, a limit over classes, and the tasks of an arm."""
    changes = {
        "adapt": {"method": "corda", "rank": 2},
        "calibration": {"examples": 4, "batch": 2},
        "retain": {},
        "label_smoothing": 0.2,
        "batch": 3,
        "arms": {"all": {}, "reds": {"trained_tasks": ["reds"]}},
    }
    config = mix(room, **changes)
    config["tasks"][2]["limit"] = 3
    job = make_job(load_config(written(tmp_path / "mixed.yaml", config)), tmp_path / "run")
    assert [job.trained_on(arm).count(":train") for arm in job.study.arms.values()] == [3, 1]
    counts = {name: job.data.class_counts(job.data.tasks[name]) for name in ("tones", "reds")}
    assert sorted(counts["reds"]) == [1, 2] and counts["tones"] == [4, 4]
    net, method, balanced = job.prepared(job.study.arms["all"])
    assert method == "corda" and list((tmp_path / "run" / "calibration").iterdir())
    objective = job.objective(job.study.arms["all"], net, balanced)
    assert {name: retain.num_classes for name, retain in objective.retain.items()} == {"semseg": 3, "images": 4}
    assert objective.label_smoothing == 0.2 and objective.union.counts == (2, 2)
    assert set(job.batches(job.study.arms["reds"]).rows.ids) < set(job.batches(job.study.arms["all"]).rows.ids)


def test_images_of_other_classes_are_told_beside_a_union(room: Path, tmp_path: Path) -> None:
    config = mix(room, head={"labels": "union"}, evaluate={"ood": ["photo_crops:test"]})
    found = rows_by_task(run_config(written(tmp_path / "mixed.yaml", config)), "adapted")
    assert {task for task, condition, _ in found if condition == "against photo_crops:test"} == {"tones", "reds"}


def test_images_that_choose_a_rate_are_also_evaluated_under_a_condition(room: Path, tmp_path: Path) -> None:
    evaluate = {"split": "validation", "corruptions": [{"name": "contrast", "severities": [5]}]}
    config = mix(room, tune={"rates": [1e-3, 1e-2]}, evaluate=evaluate)
    found = rows_by_task(run_config(written(tmp_path / "mixed.yaml", config)), "adapted")
    assert {task for task, condition, _ in found if condition == "contrast 5"} == {"semseg", "tones", "reds"}


def test_two_tasks_of_one_set_have_a_sample_each(room: Path, tmp_path: Path) -> None:
    """Samples of one image have different names and one group, so that they count once in a score over both tasks."""
    config = mix(room)
    config["tasks"][2] = {**config["tasks"][1], "name": "again"}
    folder = run_config(written(tmp_path / "mixed.yaml", config))
    found = rows_by_task(folder, "adapted")
    assert {found[task, "clean", "accuracy"].n for task in ("tones", "again")} == {12}
    rows = open_run(folder).job.data.part("test")
    assert len(rows) == len({*rows.ids}) == 26 and sum(name.endswith((" tones", " again")) for name in rows.ids) == 24
    alone = Rows([(replace(images, groups={}), i) for images, i in rows.entries])  # a card without groups
    assert len({*rows.groups()[0].values()}) <= len({*alone.groups()[0].values()}) == 14


@pytest.mark.parametrize("labels", ["separate", "union"])
def test_both_tasks_are_learned(room: Path, tmp_path: Path, labels: str) -> None:
    """Classes of the two tasks have opposite orders: a head or a label of the other task would answer wrongly."""
    folder = run_config(written(tmp_path / "alone.yaml", alone(room, labels)))
    found = rows_by_task(folder, "adapted")
    assert [found[task, "clean", "accuracy"].value for task in ("tones", "reds")] == [1.0, 1.0]
    images = [str(room / "data" / place) for place in ("tones/test/dark", "reds/test/shine")]
    assert main(["predict", str(folder), *images, "--to", str(tmp_path), "--quiet"]) == 0
    with (tmp_path / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    answers = {(Path(row["image"]).stem.rstrip("0123456789"), row["task"], row["label"]) for row in rows}
    if labels == "union":
        assert answers == {("dark", "tones", "tones/dark"), ("shine", "reds", "reds/shine")} and len(rows) == 12
    else:
        assert {("dark", "tones", "dark"), ("shine", "reds", "shine")} <= answers and len(rows) == 24


def test_a_mix_is_merged_exactly(study: Path) -> None:
    check = json.loads(next((study / "arms" / "all").glob("*/merge.json")).read_text())
    assert set(check["outputs"]) == {"semseg", "tones", "reds"} and check["different_predictions"] == 0
    assert check["largest_difference"] < 1e-5 * check["largest_logit"]
    assert main(["merge", str(study), "--arm", "all:0", "--quiet"]) == 0
    with safetensors.safe_open(study / "merged-all-seed-0" / "heads.safetensors", "pt") as file:
        about, weight = json.loads(file.metadata()["heads"]), file.get_tensor("tones.predict.weight")
    assert about["labels"] == "union" and about["tasks"] == {"semseg": 3, "tones": 2, "reds": 2}
    assert about["pooled"] == ["tones", "reds"] and about["head"] == "linear" and weight.shape == (2, 64)
    shapes = {name: output["shape"] for name, output in open_run(study).job.graph("all", "torch").outputs.items()}
    assert shapes["tones"] == shapes["reds"] == ["batch", 4] and shapes["semseg"][:2] == ["batch", 3]


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ({"classes": 3}, {}, "tasks: reds: classes 3, 'reds' has 2."),
        ({"train": None}, {}, "tasks: reds: train names no set."),
        ({"test": None}, {}, "tasks: reds: nothing to test on"),
        ({"validation_share": 0.2}, {}, "tasks: reds: both validation and validation_share"),
        ({"validation_share": 2}, {}, "tasks: reds: validation_share"),
        ({"kind": "depth"}, {}, "task: 'depth' has no option 'name'"),
        ({"name": "classify"}, {}, "tasks: classify: its sets belong in data."),
        ({"name": "ce"}, {}, "tasks: ce: the name has another meaning in a run"),
        (
            {"name": "semseg", "kind": "classify"},
            {},
            "tasks: ['semseg', 'tones', 'semseg']; name at least one, each once.",
        ),
        ({"name": "normals"}, {}, "tasks: normals: the name has another meaning in a run"),
        ({"name": "a/b"}, {}, "'a/b' cannot be a name"),
        (
            {"class_weights": "sqrt"},
            {},
            "tasks: reds: class_weights is of all tasks of whole images; give class_weights beside",
        ),
        ({}, {"head": {"labels": "union"}, "evaluate": {"adjust_logits": True}}, "set head.labels to separate"),
        ({}, {"arms": {"a": {}, "b": {"head": "separate"}}}, "arms: head.labels must be the same for all arms"),
        ({"train": ["scenes:train"]}, {}, "tasks: reds: 'scenes' has maps; name it in data."),
        ({"train": ["reds:test"]}, {}, "shares examples with"),
        ({}, {"evaluate": {"laplace": True}}, "it stands on the input of a stock classifier; leave it or size out"),
    ],
)
def test_errors_are_one_line(room: Path, tmp_path: Path, capsys, task: dict, changes: dict, words: str) -> None:
    config = mix(room, **changes)
    if isinstance(task.get("train"), list):
        task = {**task, "train": [f"{room}/{name}" for name in task["train"]]}
    entry = {key: value for key, value in {**config["tasks"][2], **task}.items() if value is not None}
    path = written(tmp_path / "bad.yaml", {**config, "tasks": [*config["tasks"][:2], entry]})
    assert words in refused(capsys, "run", path, "--out", tmp_path, "--quiet")
