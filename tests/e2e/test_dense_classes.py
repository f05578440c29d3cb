"""A class of the image beside maps, from sets that have one of the two: whole runs, arms, delta_m, merge, and user errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import yaml
from PIL import Image

from vismt.cli import main
from vismt.engine.arms import unit, unit_config
from vismt.engine.log import read_lines
from vismt.engine.run import open_run
from vismt.jobs import load_config
from vismt.jobs.dense.data import DenseData
from vismt.jobs.dense.job import DenseJob
from vismt.paths import data_root

pytest.importorskip("torchmetrics")

CARD = "name: {name}\ntitle: Made\nsource: own\nlicence: own\nclasses: {classes}\nsources:\n  - {source}\n"
SCENES = (
    '{kind: dense, root: scenes, image: "{split}/rgb", maps: {label: "{split}/label"}, splits: {train: 6, test: 3}}'
)
TONES = '{kind: folder, root: ROOT, layout: "{split}/{class}", splits: {train: 6, test: 4}}'
CLASSIFY = {"name": "classify", "classes": 2}
SMALL = {
    "task": "dense",
    "model": {"name": "test_vit", "pretrained": False},
    "adapt": {"method": "moe_lora", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
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

    def save(path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)

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
    for name, classes, source in (("scenes", 3, SCENES), ("tones", 2, TONES), ("others", 2, TONES)):
        (home / name).mkdir()
        text = CARD.format(name=name, classes=classes, source=source.replace("ROOT", name))
        (home / name / "card.yaml").write_text(text)
    return home


@pytest.fixture(autouse=True)
def found_there(room: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "realdata" not in request.keywords:
        monkeypatch.setenv("VISMT_DATA", str(room / "data"))


def write(folder: Path, **changes: object) -> Path:
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def sets(room: Path, *names: str) -> list[str]:
    """Names of cards and splits, the cards of `room` by their path."""
    return [f"{room / name.partition(':')[0]}:{name.partition(':')[2]}" for name in names]


def made(room: Path, **changes: object) -> dict:
    """The configuration on the sets of `room`."""
    data = {"train": sets(room, "scenes:train", "tones:train"), "test": sets(room, "scenes:test", "tones:test")}
    return {"data": data, "tasks": [{"name": "semseg", "classes": 3}, CLASSIFY], **changes}


@pytest.fixture(scope="module")
def study(room: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_DATA", str(room / "data"))
        path = write(
            folder,
            **made(
                room,
                seeds=[0, 1],
                retain={},
                baseline={"semseg": "semseg", "classify": "classify"},
                arms={"both": {}, "semseg": {"only": ["semseg"]}, "classify": {"only": ["classify"], "retain": None}},
            ),
        )
        assert main(["run", str(path), "--out", str(folder / "runs"), "--quiet"]) == 0
    return next((folder / "runs").iterdir())


def test_rows_are_over_the_images_that_have_the_task(study: Path) -> None:
    rows = {(row["model"], row["metric"]): row for row in read_lines(study / "results.jsonl")}
    delta = "delta_m over semseg+classify in per cent"
    both = {("both", metric) for metric in ("semseg mIoU", "classify accuracy", delta)}
    assert set(rows) == both | {("semseg", "semseg mIoU"), ("classify", "classify accuracy")}
    counts = {"semseg mIoU": 3, "classify accuracy": 4, delta: 7}
    for (_, metric), row in rows.items():
        assert row["n"] == counts[metric] and row["unit"] == "images" and row["data"] == "scenes+tones"
        assert row["lower_is_better"] is False and row["protocol"] == "test images at 32 x 48"
    lines = read_lines(study / "dense_seeds.jsonl")
    for arm in ("both", "classify"):
        own = [line for line in lines if line["arm"] == arm and line["task"] == "classify"]
        assert [line["measure"] for line in own] == ["accuracy"] * 2 and all(
            line["numbers"]["images"] == 4 for line in own
        )
        assert rows[arm, "classify accuracy"]["value"] == pytest.approx(sum(line["value"] for line in own) / 2)
    value = {key: row["value"] for key, row in rows.items()}
    gains = [
        value["both", metric] / value[task, metric] - 1
        for task, metric in (("semseg", "semseg mIoU"), ("classify", "classify accuracy"))
    ]
    assert value["both", delta] == pytest.approx(100 * sum(gains) / 2)
    assert "classify accuracy in %" in (study / "report.md").read_text()


def test_records_say_which_images_were_right(study: Path) -> None:
    """psi of an image is 1 or 0 at each seed, and their mean the row; delta_m's records are over the images of both sets."""
    rows = {(row["model"], row["metric"]): row for row in read_lines(study / "results.jsonl")}
    paths = {path.name for path in (study / "records").glob("*.jsonl")}
    for arm in ("both", "classify"):
        name = next(name for name in paths if name.endswith(f"{arm}-classify.jsonl"))
        records = read_lines(study / "records" / name)
        assert len(records) == 4 and all(record["episode"].startswith("tones:test/") for record in records)
        assert all(set(record["alone"]) <= {0.0, 1.0} for record in records)
        assert all(record["clean"] == pytest.approx(sum(record["alone"]) / 2) for record in records)
        right = [record["clean"] for record in records]
        assert rows[arm, "classify accuracy"]["value"] == pytest.approx(sum(right) / 4)
        half = 1.96 * np.std(right, ddof=1) / 2  # sqrt(4) images
        assert rows[arm, "classify accuracy"]["ci95"] == pytest.approx(half, rel=1e-4, abs=1e-9)
    name = next(name for name in paths if name.endswith("both-delta_m.jsonl"))
    records = read_lines(study / "records" / name)
    assert {record["episode"].partition(":")[0] for record in records} == {"scenes", "tones"} and len(records) == 7
    delta = rows["both", "delta_m over semseg+classify in per cent"]["value"]
    assert sum(record["clean"] for record in records) / 7 == pytest.approx(delta)


def test_merging_is_checked_and_the_head_is_told(study: Path) -> None:
    for path in (study / "arms" / "both").glob("*/merge.json"):
        found = json.loads(path.read_text())
        assert set(found["tasks"]) == {"semseg", "classify"} and found["n"] == 7
        assert found["largest_difference"] < 1e-5 * found["largest_logit"] and found["tasks"]["classify"][2] == 0
        assert found["tasks"]["classify"][1] > 0
    assert main(["merge", str(study), "--expert", "both:1"]) == 0
    with safetensors.safe_open(study / "merged" / "heads.safetensors", "pt") as file:
        told = json.loads(file.metadata()["heads"])
        weight = file.get_tensor("classify.predict.weight")
    assert told["tasks"] == {"semseg": 3, "classify": 2} and told["pooled"] == ["classify"] and told["head"] == "linear"
    assert weight.shape == (2, 64)


def test_predict_says_the_class_and_draws_the_maps(study: Path, room: Path, tmp_path: Path) -> None:
    picture = next((room / "data" / "tones" / "test" / "dark").iterdir())
    assert (
        main(["predict", str(study), str(picture), "--expert", "both:1", "--maps", "--to", str(tmp_path), "--quiet"])
        == 0
    )
    assert (tmp_path / f"{picture.stem}.png").stat().st_size > 5000
    with np.load(tmp_path / f"{picture.stem}.npz") as maps:
        assert (
            set(maps.files) == {"semseg", "classify"}
            and maps["classify"].shape == ()
            and int(maps["classify"]) in (0, 1)
        )
        assert maps["semseg"].ndim == 2


def test_a_changed_answer_is_counted_in_the_merge_check(study: Path, room: Path, tmp_path: Path, monkeypatch) -> None:
    from vismt.jobs.dense import evaluation as dense_evaluation

    job = open_run(study).job
    one = unit(job.config, study, "both", 3e-3, 0)
    job.evaluation.folder = tmp_path
    other = job.loaded(one)
    with torch.no_grad():
        head = other.heads["classify"].predict
        head.weight.neg_()
        head.bias.neg_()
    monkeypatch.setattr(dense_evaluation, "loaded", lambda config, unit, size: other)
    monkeypatch.setattr(dense_evaluation, "mergeable", lambda net, unit: True)
    written = {}
    monkeypatch.setattr(dense_evaluation, "atomic_write", lambda path, text: written.update(json.loads(text)))
    monkeypatch.setattr(job.evaluation, "_final", lambda unit: job.loaded(unit))
    job.evaluation._check_merge(one)
    # Two classes with turned logits: the other answer for every image, also for those without a class.
    assert (
        written["tasks"]["classify"][2] == 7
        and written["tasks"]["semseg"][2] == 0
        and written["different_predictions"] == 7
    )


def test_arms_see_the_same_images_and_labels_where_there_are_any(study: Path, monkeypatch) -> None:
    job = open_run(study).job
    configs = [unit_config(job.config, unit(job.config, study, arm, 3e-3, 0)) for arm in ("both", "classify", "semseg")]
    seen = set()
    for number in range(6):
        both, classify, semseg = (job.batches(config)(number) for config in configs)
        assert torch.equal(both["image"], classify["image"]) and torch.equal(both["image"], semseg["image"])
        assert both["image"].shape == (4, 3, 32, 48) and "semseg" not in classify and "class" not in semseg
        assert not {"class"} & set(classify) or torch.equal(both["class"], classify["class"])
        has_class = both["class"] >= 0 if "class" in both else torch.zeros(4, dtype=torch.bool)
        has_map = (both["semseg"] != 255).flatten(1).any(1) if "semseg" in both else torch.zeros(4, dtype=torch.bool)
        assert torch.equal(has_class, ~has_map)
        seen |= set(has_class.tolist())
    assert seen == {True, False}


def test_a_class_is_learned_beside_maps(room: Path, tmp_path: Path) -> None:
    """Dark or bright, by the heads alone on a random backbone: all right in the end, half at chance."""
    train = {"steps": 40, "lr": 3e-2, "checkpoint_every": 40}
    path = write(
        tmp_path, **made(room, adapt=None, fade=None, train=train, augment={"strength": 0, "scales": [1.0, 1.0]})
    )
    assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    rows = {row["metric"]: row["value"] for row in read_lines(next((tmp_path / "runs").iterdir()) / "results.jsonl")}
    assert rows["classify accuracy"] == 1.0


def test_shares_are_of_every_class(room: Path, tmp_path: Path) -> None:
    """In a set sorted by class the last images are all of one class."""
    data = {"train": sets(room, "scenes:train", "tones:train"), "test_share": 0.34, "validation_share": 0.3}
    found = DenseData(load_config(write(tmp_path, **made(room, data=data)), []))
    for part in ("train", "validation", "test"):
        entries = [(images, i) for images, i in found.part(part).entries if images.labels is not None]
        assert sorted(int(images.labels[i]) for images, i in entries) == [0, 1]
    assert len(found.part("test")) == 4 and found.part("train").name == "scenes+tones"


def test_tuning_takes_the_accuracy_into_its_score(room: Path, tmp_path: Path) -> None:
    data = {"train": sets(room, "scenes:train", "tones:train"), "test_share": 0.34, "validation_share": 0.34}
    config = load_config(write(tmp_path, **made(room, data=data, adapt=None, fade=None)), [])
    job = DenseJob(config, tmp_path, "hash")
    job.train()
    one = unit(config, tmp_path, "adapted", 3e-3, 0)
    scored = job.evaluation._scored(one, "validation")
    assert job.validate(one) == pytest.approx(
        (max(scored["semseg"].value, 1e-6) * max(scored["classify"].value, 1e-6)) ** 0.5
    )
    assert len(scored["classify"].images) == 2 and len(scored["semseg"].images) == 2


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
        ({"head": {"name": "pooled"}}, "no head 'pooled'"),
        ({"batch": 13}, "batch: 13, with 12 training images"),
    ],
)
def test_errors_are_one_line(room: Path, tmp_path: Path, capsys, changes: dict, words: str) -> None:
    config = made(room)
    for part in ("train", "test"):
        if part in changes:
            config["data"] = {**config["data"], part: sets(room, *changes[part])}
    if "tasks" in changes:
        config["tasks"] = [{"name": "semseg", "classes": 3} if task == "semseg" else task for task in changes["tasks"]]
    config |= {key: value for key, value in changes.items() if key in ("head", "batch")}
    assert main(["run", str(write(tmp_path, **config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert words in told and told.startswith("error: ") and told.count("\n") == 1


def test_depth_of_the_motorcycle_and_digits(tmp_path: Path) -> None:
    """Real images that travel with scikit-image and scikit-learn: metric depth from one set, ten classes from the other."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    path = write(
        tmp_path,
        tasks=["depth", {"name": "classify", "classes": 10, "label_smoothing": 0.1}],
        data={"train": ["motorcycle:train", "digits"], "test_share": 0.05},
        augment={"flip": False, "strength": 0},
        balancing={"method": "dwa"},
    )
    assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    rows = {row["metric"]: row for row in read_lines(folder / "results.jsonl")}
    assert {metric: row["n"] for metric, row in rows.items()} == {"depth RMSE in m": 2, "classify accuracy": 90}
    assert 0 <= rows["classify accuracy"]["value"] <= 1 and rows["depth RMSE in m"]["lower_is_better"]
    labels = {
        int(images.labels[i])
        for images, i in open_run(folder).job.data.part("test").entries
        if images.labels is not None
    }
    assert labels == set(range(10))
    logged = next(folder.rglob("metrics.jsonl")).read_text()
    assert "classify" in logged and "weight/classify" in logged


@pytest.mark.realdata
def test_camvid_and_textures(tmp_path: Path) -> None:
    """Segmentation of road scenes and ten textures, each set with one of the two."""
    root = data_root()
    if root is None or not all((root / name).is_dir() for name in ("camvid", "dtd10")):
        pytest.skip("camvid and dtd10 are not under VISMT_DATA")
    path = write(
        tmp_path,
        tasks=[{"name": "semseg", "classes": 11}, {"name": "classify", "classes": 10}],
        retain={},
        data={"train": ["camvid:train", "dtd10"], "test_share": 0.1, "limit": 60},
        batch=8,
        balancing={"method": "pcgrad"},
    )
    assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    rows = {row["metric"]: row for row in read_lines(folder / "results.jsonl")}
    assert {metric: row["n"] for metric, row in rows.items()} == {"semseg mIoU": 37, "classify accuracy": 100}
    found = json.loads(next(folder.rglob("merge.json")).read_text())
    assert found["n"] == 137 and found["tasks"]["classify"][2] == 0
