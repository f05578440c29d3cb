"""A class of the image beside maps, from sets that have one of the two: whole runs, arms, delta_m, merge, and user errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.room import save, write_cards
from helpers.tiny_runs import refused, run_config, written
from PIL import Image

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.jobs import load_config, make_job, open_run
from vismt.jobs.multitask.figures import read_numbers
from vismt.jobs.multitask.job import MapsJob
from vismt.jobs.multitask.maps_data import DenseData
from vismt.report.results import EXAMPLE, RECORDS, Result, read_results
from vismt.storage.lines import read_lines
from vismt.storage.paths import data_roots
from vismt.uncertainty.intervals import estimate, interval_of

SCENES = (
    '{kind: dense, root: scenes, image: "{split}/rgb", maps: {label: "{split}/label"}, splits: {train: 6, test: 3}}'
)
TONES = '{kind: folder, root: NAME, layout: "{split}/{class}", splits: {train: 6, test: 4}}'
CLASSIFY = {"name": "classify", "classes": 2}
SMALL = {
    "task": "dense",
    "model": {"name": "short_vit", "pretrained": False},
    "adapt": {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
    "fade": {"start": 0.0, "end": 0.5},
    "size": [32, 48],
    "head": {"name": "linear"},
    "augment": {"strength": 0},
    "batch": 4,
    "train": {"steps": 2, "lr": 3.0e-3, "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Two sets and their cards: scenes of three label bands, 20 x 30, and dark or bright images of two sizes."""
    home = tmp_path_factory.mktemp("sets")
    data, generator = home / "data", np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for number in range(count):
            label = np.sort(generator.integers(0, 3, (20, 30)), axis=0)
            save(data / f"scenes/{split}/label/{number}.png", label)
            save(
                data / f"scenes/{split}/rgb/{number}.png", np.stack([80 * label, 255 - 80 * label, 0 * label], axis=-1)
            )
    for root, names in (("tones", ("bright", "dark")), ("others", ("bright", "dim"))):
        for split, count in (("train", 3), ("test", 2)):
            for name in names:
                for number in range(count):
                    size = (16, 16) if number % 2 else (40, 10)
                    grey = generator.integers(200, 256, size) if name == "bright" else generator.integers(0, 50, size)
                    save(data / root / split / name / f"{number}.png", np.stack([grey] * 3, axis=-1))
    write_cards(home, ("scenes", SCENES, 3), ("tones", TONES, 2), ("others", TONES, 2))
    return home


@pytest.fixture(autouse=True)
def data_folder(room: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "realdata" not in request.keywords:
        monkeypatch.setenv("VISMT_DATA", str(room / "data"))


def write(folder: Path, **changes: object) -> Path:
    return written(folder / "mixed.yaml", {**SMALL, **changes})


def sets(room: Path, *names: str) -> list[str]:
    """Return names of cards and splits, the cards of `room` by their path."""
    return [f"{room / name.partition(':')[0]}:{name.partition(':')[2]}" for name in names]


def on_room(room: Path, **changes: object) -> dict:
    """Return the configuration on the sets of `room`."""
    data = {"train": sets(room, "scenes:train", "tones:train"), "test": sets(room, "scenes:test", "tones:test")}
    return {"data": data, "tasks": [{"name": "semseg", "classes": 3}, CLASSIFY], **changes}


@pytest.fixture(scope="module")
def study(room: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_DATA", str(room / "data"))
        path = write(
            folder,
            **on_room(
                room,
                seeds=[0, 1],
                retain={},
                baseline={"semseg": "semseg", "classify": "classify"},
                arms={
                    "both": {},
                    "semseg": {"trained_tasks": ["semseg"]},
                    "classify": {"trained_tasks": ["classify"], "retain": None},
                },
            ),
        )
        return run_config(path)


def scores_of(folder: Path) -> list[Result]:
    """Return the scores of the trained arms of a run."""
    rows = read_results(folder / "results.jsonl", open_run(folder).hash)
    return [row for row in rows if not row.further and row.arm != "constant"]


def rows_of_arms(results: list[Result]) -> dict[tuple[str, str], Result]:
    """Return the means over the trainings by arm and task."""
    return {(row.arm, row.task): row for row in results if row.seed is None}


def test_rows_are_over_the_images_that_have_the_task(study: Path) -> None:
    job = open_run(study).job
    results = scores_of(study)
    rows = rows_of_arms(results)
    assert {(arm, task, row.metric) for (arm, task), row in rows.items()} == {
        ("both", "semseg", "mIoU"),
        ("both", "classify", "accuracy"),
        ("both", "delta_m", "over semseg+classify in per cent"),
        ("semseg", "semseg", "mIoU"),
        ("classify", "classify", "accuracy"),
    }
    counts = {"semseg": 3, "classify": 4, "delta_m": 7}
    for (_, task), row in rows.items():
        assert row.n == counts[task] and row.unit == "images" and row.data == "scenes+tones"
        assert row.better == "higher" and row.protocol == "test images at 32 x 48"
        assert row.scale == ("number" if task == "delta_m" else "share")
    value = {(row.arm, row.task, row.seed): row.value for row in results}
    for arm in ("both", "classify"):
        by_seed = []
        for training in job.study.trainings(arm):
            numbers = read_numbers(training.folder / "records" / "test.numbers.json")["numbers"]["classify"]
            assert numbers["images"] == 4
            assert value[arm, "classify", training.seed] == pytest.approx(numbers["accuracy"])
            by_seed.append(numbers["accuracy"])
        assert len(by_seed) == 2 and value[arm, "classify", None] == pytest.approx(sum(by_seed) / 2)
    gains = [value["both", task, None] / value[task, task, None] - 1 for task in ("semseg", "classify")]
    assert value["both", "delta_m", None] == pytest.approx(100 * sum(gains) / 2)
    assert "classify accuracy in % ↑" in (study / "report.md").read_text()


def test_records_have_the_answers_by_image(study: Path) -> None:
    """psi of an image is 1 or 0 at each seed, and their mean the row; delta_m's records are over the images of both sets."""
    job = open_run(study).job
    rows = rows_of_arms(read_results(study / "results.jsonl"))
    for arm in ("both", "classify"):
        row = rows[arm, "classify"]
        records = read_lines(study / RECORDS / f"{row.stem}.jsonl")
        assert len(records) == 4 and all(record[EXAMPLE].startswith("tones:test/") for record in records)
        pools = [job.pooled(training, "test")["classify"] for training in job.study.trainings(arm)]
        for record in records:
            alone = [pool.alone(record[EXAMPLE]) for pool in pools]
            assert set(alone) <= {0.0, 1.0} and record["clean"] == pytest.approx(sum(alone) / 2)
        right = [record["clean"] for record in records]
        assert row.value == pytest.approx(sum(right) / 4)
        seeds = [pool.result().value for pool in pools]
        found = estimate(right).with_seeds(seeds)
        assert (row.low, row.high) == pytest.approx(interval_of(found, "share", 4), abs=1e-6)
    row = rows["both", "delta_m"]
    records = read_lines(study / RECORDS / f"{row.stem}.jsonl")
    assert {record[EXAMPLE].partition(":")[0] for record in records} == {"scenes", "tones"} and len(records) == 7
    assert sum(record["clean"] for record in records) / 7 == pytest.approx(row.value)


def test_predict_writes_the_class_and_draws_the_maps(study: Path, room: Path, painted: None, tmp_path: Path) -> None:
    picture = next((room / "data" / "tones" / "test" / "dark").iterdir())
    command = ["predict", str(study), str(picture), "--arm", "both:1", "--maps", "--to", str(tmp_path), "--quiet"]
    assert main(command) == 0
    assert (tmp_path / f"{picture.stem}.png").stat().st_size > 5000
    with np.load(tmp_path / f"{picture.stem}.npz") as maps:
        assert set(maps.files) == {"semseg", "classify"}
        assert maps["classify"].shape == () and int(maps["classify"]) in (0, 1)
        assert maps["semseg"].ndim == 2


def test_a_changed_answer_is_counted_in_the_merge_check(study: Path, tmp_path: Path, monkeypatch) -> None:
    job = open_run(study).job
    training = job.study.training("both", 3e-3, 0)
    turned = job.loaded(training)
    with torch.no_grad():
        head = turned.heads["classify"].predict
        head.weight.neg_()
        head.bias.neg_()
    copy = replace(training, folder=tmp_path)
    shutil.copytree(training.folder, copy.folder, dirs_exist_ok=True)
    (copy.folder / "merge.json").unlink()
    nets = [job.loaded(training), turned]  # the one that is merged, and the one that is not
    monkeypatch.setattr(job, "loaded", lambda training: nets.pop(0))
    job.check_merge(copy)
    check = json.loads((copy.folder / "merge.json").read_text())
    # Two classes with turned logits: the other answer for every image, also for those without a class.
    assert check["outputs"]["classify"]["different"] == 7 and check["outputs"]["semseg"]["different"] == 0
    assert check["different_predictions"] == 7 and check["largest_difference"] > 1e-3 * check["largest_logit"]


def test_an_arm_sees_the_images_with_a_label_of_its_tasks(study: Path) -> None:
    job = open_run(study).job
    configs = {arm: job.study.config_of(job.study.training(arm, 3e-3, 0)) for arm in ("both", "classify", "semseg")}
    names = {arm: [name.partition(":")[0] for name in job.batches(config).rows.ids] for arm, config in configs.items()}
    assert names == {"both": ["scenes"] * 6 + ["tones"] * 6, "classify": ["tones"] * 6, "semseg": ["scenes"] * 6}
    with_class = set()
    for number in range(6):
        both, classify, semseg = (job.batches(config)(number) for config in configs.values())
        assert both["image"].shape == (4, 3, 32, 48)
        assert "semseg" not in classify and bool((classify["class"] >= 0).all()) and "class" not in semseg
        has_class = both["class"] >= 0 if "class" in both else torch.zeros(4, dtype=torch.bool)
        has_map = (both["semseg"] != 255).flatten(1).any(1) if "semseg" in both else torch.zeros(4, dtype=torch.bool)
        assert torch.equal(has_class, ~has_map)
        with_class |= set(has_class.tolist())
    assert with_class == {True, False}


def test_shares_are_of_every_class(room: Path, tmp_path: Path) -> None:
    """In a set sorted by class the last images are all of one class."""
    data = {"train": sets(room, "scenes:train", "tones:train"), "test_share": 0.34, "validation_share": 0.3}
    dense = DenseData(load_config(write(tmp_path, **on_room(room, data=data)), []))
    for part in ("train", "validation", "test"):
        entries = [(images, i) for images, i in dense.part(part).entries if images.labels is not None]
        assert sorted(int(images.labels[i]) for images, i in entries) == [0, 1]
    assert len(dense.part("test")) == 4 and dense.part("train").name == "scenes+tones"


def test_tuning_takes_the_accuracy_into_its_score(room: Path, tmp_path: Path) -> None:
    data = {"train": sets(room, "scenes:train", "tones:train"), "test_share": 0.34, "validation_share": 0.34}
    config = load_config(write(tmp_path, **on_room(room, data=data, adapt=None, fade=None)), [])
    job = MapsJob(config, tmp_path, "hash")
    job.train()
    training = job.study.training("adapted", 3e-3, 0)
    scored = {name: pool.result() for name, pool in job.pooled(training, "validation").items()}
    assert job.validate(training) == pytest.approx(
        (max(scored["semseg"].value, 1e-6) * max(scored["classify"].value, 1e-6)) ** 0.5
    )
    assert len(scored["classify"].images) == 2 and len(scored["semseg"].images) == 2


def test_training_labels_are_counted_where_a_loss_needs_them(room: Path, tmp_path: Path) -> None:
    tasks = [{"name": "semseg", "classes": 3, "class_weights": "sqrt"}, CLASSIFY]
    changes = on_room(room, tasks=tasks, class_weights="inverse")
    job = make_job(load_config(write(tmp_path, **changes), []), tmp_path / "run")
    labels = [np.asarray(Image.open(path)) for path in sorted((room / "data/scenes/train/label").iterdir())]
    wanted = [int(sum((label == c).sum() for label in labels)) for c in range(3)]
    config = job.study.arms["adapted"]
    objective = job.objective(config, job.fresh(config), [])
    assert objective.tasks["semseg"].class_counts == wanted and objective.class_loss.class_counts == [3, 3]
    plain = DenseData(load_config(write(tmp_path, **on_room(room)), []))
    assert plain.counted(list(plain.tasks.values()))[0].class_counts is None
    plain.parts["train"].entries.clear()
    with pytest.raises(UserError, match="tasks: semseg: class 0 has 0 training labels"):
        plain.class_counts(plain.tasks["semseg"])


def test_arms_that_differ_in_their_losses_alone(room: Path, tmp_path: Path) -> None:
    """Each arm trains with its own loss, and all are scored by the same metric."""
    arms = {
        "plain": {},
        "sqrt": {"tasks.semseg.class_weights": "sqrt", "tasks.semseg.loss_weight": 2.0},
        "inverse": {"tasks.semseg.class_weights": "inverse", "label_smoothing": 0.3},
    }
    path = write(tmp_path, **on_room(room, arms=arms, adapt=None, fade=None))
    folder = run_config(path)
    job = open_run(folder).job
    tasks = {
        arm: job.objective(config, job.fresh(config), []).tasks["semseg"] for arm, config in job.study.arms.items()
    }
    assert [task.class_weights for task in tasks.values()] == [None, "sqrt", "inverse"]
    assert tasks["plain"].class_counts is None and tasks["sqrt"].class_counts == tasks["inverse"].class_counts
    first = {
        arm: read_lines(job.study.trainings(arm)[0].folder / "metrics.jsonl")[0] for arm in arms
    }  # of equal nets on equal images
    assert len({lines["semseg"] for lines in first.values()}) == 3
    assert first["plain"]["classify"] == first["sqrt"]["classify"] != first["inverse"]["classify"]
    assert first["sqrt"]["loss"] == pytest.approx(2 * first["sqrt"]["semseg"] + first["sqrt"]["classify"])
    rows = [row for row in read_results(folder / "results.jsonl") if row.task == "semseg" and not row.further]
    assert len({(row.metric, row.n) for row in rows}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["semseg", {**CLASSIFY, "classes": 3}]}, "tasks: classify: classes 3, 'tones' has 2."),
        ({"train": ["scenes:train"]}, "classify: no train set has classes of its images; scenes has semseg."),
        ({"test": ["scenes:test"]}, "classify: no test set has classes of its images; scenes has semseg."),
        ({"train": ["tones:train"]}, "semseg: no train set has maps of it; tones has class."),
        ({"tasks": ["semseg"]}, "'tones' has class, which none of the tasks (semseg) learns from; leave it out."),
        (
            {"train": ["scenes:train", "tones:train", "others:train"]},
            "is 'dark' in 'tones' and 'dim' in 'others'; give both",
        ),
        ({"head": {"name": "pooled"}}, "head.name: 'pooled' is not known"),
        ({"tasks": ["semseg", {**CLASSIFY, "label_smoothing": 0.1}]}, "give label_smoothing beside tasks"),
        ({"batch": 13}, "batch: 13, with 12 training images"),
    ],
)
def test_errors_are_one_line(room: Path, tmp_path: Path, capsys, changes: dict, words: str) -> None:
    config = on_room(room)
    for part in ("train", "test"):
        if part in changes:
            config["data"] = {**config["data"], part: sets(room, *changes[part])}
    if "tasks" in changes:
        config["tasks"] = [{"name": "semseg", "classes": 3} if task == "semseg" else task for task in changes["tasks"]]
    config |= {key: value for key, value in changes.items() if key in ("head", "batch")}
    assert words in refused(capsys, "run", write(tmp_path, **config), "--out", tmp_path / "runs", "--quiet")


@pytest.mark.slow
def test_depth_of_the_motorcycle_and_digits(tmp_path: Path) -> None:
    """Real images that travel with scikit-image and scikit-learn: metric depth from one set, ten classes from the other."""
    path = write(
        tmp_path,
        tasks=["depth", {"name": "classify", "classes": 10}],
        data={"train": ["motorcycle:train", "digits"], "test_share": 0.05},
        augment={"flip": False, "strength": 0},
        balancing={"method": "dwa"},
    )
    folder = run_config(path)
    rows = {(row.task, row.metric): row for row in read_results(folder / "results.jsonl")}
    depth, classify = ("depth", "RMSE in m"), ("classify", "accuracy")
    assert {key: row.n for key, row in rows.items() if not row.further} == {depth: 2, classify: 90}
    assert 0 <= rows[classify].value <= 1 and rows[depth].better == "lower"
    labels = {
        int(images.labels[i])
        for images, i in open_run(folder).job.data.part("test").entries
        if images.labels is not None
    }
    assert labels == set(range(10))
    logged = next(folder.rglob("metrics.jsonl")).read_text()
    assert "classify" in logged and "weight/classify" in logged


@pytest.mark.slow
@pytest.mark.realdata
def test_camvid_and_textures(tmp_path: Path) -> None:
    """Segmentation of road scenes and ten textures, each set with one of the two."""
    root = next(iter(data_roots()), None)
    if root is None or not all((root / name).is_dir() for name in ("camvid", "dtd10")):
        pytest.skip("camvid and dtd10 are not under VISMT_DATA")
    path = write(
        tmp_path,
        tasks=[{"name": "semseg", "classes": 11}, {"name": "classify", "classes": 10}],
        retain={},
        data={"train": ["camvid:train", "dtd10"], "test_share": 0.1, "limit": 60},
        batch=8,
        balancing={"method": "fairgrad"},
    )
    folder = run_config(path)
    counts = {(row.task, row.metric): row.n for row in read_results(folder / "results.jsonl") if not row.further}
    # Whole blocks of frames are held out.
    assert counts == {("semseg", "mIoU"): 44, ("classify", "accuracy"): 100}
    check = json.loads(next(folder.rglob("merge.json")).read_text())
    assert check["n"] == 8 and check["outputs"]["classify"]["different"] == 0
