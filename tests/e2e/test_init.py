"""`vismt init`: what it writes runs as it is, but for the tiny model that stands in for the downloaded one."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import pyramids  # noqa: F401  registers short_vit
from helpers.lm_parts import save_lm, tokenizer
from helpers.own_images import write_folder
from helpers.tiny_runs import refused
from PIL import Image

import vismt
from vismt.cli import main
from vismt.data.cards import load_card
from vismt.data.images import open_images
from vismt.data.maps.dense_set import open_dense
from vismt.jobs import load_config, make_job
from vismt.report.results import read_results
from vismt.robustness.attacks import attacks

TINY = ["model.name=short_vit", "model.pretrained=false", "model.img_size=32", "model.position=timm", "train.steps=2"]
JOBS = ("classification", "fewshot", "multitask", "robustness")


def run(folder: Path, job: str, *overrides: str):
    config = str(folder / f"{job}.yaml")
    assert main(["run", config, *overrides, "--out", str(folder / "runs"), "--quiet"]) == 0
    return read_results(next((folder / "runs").iterdir()) / "results.jsonl")


@pytest.mark.parametrize("job", JOBS)
def test_own_images(job: str, tmp_path: Path, monkeypatch, capsys) -> None:
    images = write_folder(tmp_path / "my: #photos" / "2024", 12)  # neither is plain YAML
    where = tmp_path / "my: #photos" / "study"
    assert main(["init", job, "--images", str(images), "--to", str(where)]) == 0
    assert f"cd '{where}' && vismt run {job}.yaml" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.chdir(where)  # where classifier.py is found
    monkeypatch.setitem(attacks.QUERIES, "strong", 20)
    cut = {"fewshot": ["evaluate.episodes=2"], "robustness": ["evaluate.images=4"]}
    rows = run(where, job, *cut.get(job, ["tune=null"]), *([] if job == "robustness" else [*TINY, "train.warmup=0"]))
    assert {row.data for row in rows} == {"2024"}
    if job == "classification":  # in the folder of the first job, whose card serves both
        assert main(["init", "robustness", "--images", str(images), "--to", str(where), "--quiet"]) == 0
    before = (where / f"{job}.yaml").read_text()
    assert "exists and would be overwritten; give another --to" in refused(
        capsys, "init", job, "--images", images, "--to", where
    )
    assert (where / f"{job}.yaml").read_text() == before


@pytest.mark.parametrize(
    "name", ["$x", "#c", ".hid", "-dash", "{a}", "'q", "a\nseed: 7", "a\x85b", "é", "???", "a: b", "x.y"]
)
def test_a_folder_of_any_name_has_a_configuration_that_is_read(name: str, tmp_path: Path) -> None:
    images = write_folder(tmp_path / name, 3)
    for job in (*JOBS, "dense"):
        given = images
        if job == "dense":
            given = tmp_path / "maps" / name
            for form in ("images", "normal"):
                (given / form).mkdir(parents=True)
                for number in range(3):
                    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(given / form / f"{number}.png")
        where = tmp_path / "to" / job
        assert main(["init", job, f"--images={given}", "--to", str(where), "--quiet"]) == 0
        config = load_config(where / f"{job}.yaml")
        assert config.seed == 0 and "\n" not in config.title
        (card,) = where.glob("*.card.yaml")
        assert load_card(card).sources
        if job == "classification":
            make_job(config, tmp_path / "run").check()
    assert len(open_images(str(next((tmp_path / "to" / "classification").glob("*.card.yaml"))))) > 0


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("TRAIN", "Dev", "Testing"), ("training", "test")])
def test_folders_of_splits_are_the_parts_of_a_run(splits: tuple[str, ...], tmp_path: Path, capsys) -> None:
    images = write_folder(tmp_path / "mine", 10, splits)
    wanted = {f"mine:{path.relative_to(images).as_posix()}" for path in (images / splits[-1]).rglob("*.png")}
    assert main(["init", "classification", "--images", str(images), "--to", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"train: [./mine.card.yaml:{splits[0]}]" in printed and f"test: [./mine.card.yaml:{splits[-1]}]" in printed
    run(tmp_path, "classification", *TINY, "train.warmup=0", "tune=null", "arms={full: {adapt.method: full}}")
    (records,) = tmp_path.rglob("records/test-*.jsonl")
    assert {json.loads(line)["id"] for line in records.read_text().splitlines()[1:]} == wanted
    for job in ("robustness", "fewshot"):
        assert main(["init", job, "--images", str(images), "--to", str(tmp_path), "--quiet"]) == 0
        assert f"data: [./mine.card.yaml:{splits[-1]}]" in (tmp_path / f"{job}.yaml").read_text()


@pytest.mark.parametrize("layout", ["{split}/{form}", "{form}/{split}"])
def test_folders_of_splits_of_maps(layout: str, tmp_path: Path, capsys) -> None:
    for split in ("train", "test"):
        for form in ("images", "label"):
            folder = tmp_path / "maps" / layout.format(split=split, form=form)
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.eye(16, dtype=np.uint8)).save(folder / f"{number}.png")
    assert main(["init", "dense", "--images", str(tmp_path / "maps"), "--to", str(tmp_path), "--quiet"]) == 0
    data = load_config(tmp_path / "dense.yaml").data
    assert data.validation_share == 0.1 and not data.test_share
    for part in ("train", "test"):
        card, split = getattr(data, part)[0].rsplit(":", 1)
        opened = open_dense(card, split)
        assert opened.ids == [f"{layout.format(split=part, form='images')}/{number}.png" for number in range(3)]
    for name in ("train", "test"):
        for path in (tmp_path / "maps").rglob(name):
            path.rename(path.with_name({"train": "val", "test": "testing"}[name]))
    error = refused(capsys, "init", "dense", "--images", tmp_path / "maps", "--to", tmp_path / "other")
    assert "has the folders testing, val; name one 'train'" in error


def test_every_file_is_accounted_for(tmp_path: Path, capsys) -> None:
    images = write_folder(tmp_path / "mine", 3)
    (images / "red" / "notes.txt").touch()
    (images / "red" / ".hidden.png").touch()
    (images / "red" / "more").mkdir()
    (images / "red" / "00.png").rename(images / "red" / "more" / "00.png")
    (images / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "blue" / "link.txt").symlink_to(tmp_path / "nowhere.txt")
    command = ["init", "robustness", "--images", str(images), "--to", str(tmp_path / "to")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "9 images of 3 classes; left out: 1 broken links (blue/link.txt), 1 hidden (red/.hidden.png), " in printed
    assert "1 in no folder that is read (red/more/00.png), 1 of other types (red/notes.txt)" in printed
    assert "1 images cannot be read, the first is " in printed and "red/gone.png: cannot be read" in printed
    (images / "red" / "gone.png").unlink()
    command[1] = "classification"
    assert "'mine': class 'red' has 2 examples, too few for 3 parts; add examples, or remove the class" in refused(
        capsys, *command
    )


@pytest.mark.parametrize("model", ["test_efficientnet", "test_resnet"])
def test_another_backbone_needs_no_other_change(model: str, tmp_path: Path) -> None:
    """A convnet has no linear layers to adapt, and timm calls its classifier `classifier` or `fc`."""
    images = write_folder(tmp_path / "mine", 10)
    assert main(["init", "classification", "--images", str(images), "--to", str(tmp_path), "--quiet"]) == 0
    words = ["train.steps=2", "train.warmup=0", "tune=null"]
    rows = run(tmp_path, "classification", f"model={{name: {model}, img_size: 32, pretrained: false}}", *words)
    assert {row.arm for row in rows} == {"constant", "head", "lora", "full"}


def test_classes_of_one_set_are_named_alone(tmp_path: Path, monkeypatch) -> None:
    """In predictions, exports and pictures; and an attack on the run finds the classes of its set by these names."""
    images = write_folder(tmp_path / "fruit", 12)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "classification", "--images", str(images), "--quiet"]) == 0
    run(tmp_path, "classification", *TINY, "train.warmup=0", "tune=null", "arms={full: {adapt.method: full}}")
    folder = next((tmp_path / "runs").iterdir())
    classes = sorted(path.name for path in images.iterdir())
    assert main(["export", str(folder), "--format", "timm", "--to", "timm", "--quiet"]) == 0
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["label_names"] == classes and "label_space" not in about
    files = [next((images / name).iterdir()) for name in classes]
    labels = {row["label"] for row in vismt.predict(folder, files).rows}
    assert labels <= set(classes)
    answers = np.load(folder / "examples.npz")
    assert {*answers["truth"].tolist(), *answers["predictions"].flat} <= set(classes)
    attack = ["attack", str(folder), "--attack", "fgsm", "--epsilon", "8/255"]
    assert main([*attack, "--quiet"]) == 0


COMMENTED = re.compile(r"^# ?(?=(?:arms|tune|select|calibration|  \w+): ?)", re.M)


@pytest.mark.parametrize("job", ["dense", "fewshot", "lm"])
def test_what_stands_in_comments_can_be_used(job: str, tmp_path: Path) -> None:
    assert main(["init", job, "--to", str(tmp_path), "--quiet"]) == 0
    path = tmp_path / f"{job}.yaml"
    text = COMMENTED.sub("", path.read_text()).replace("OTHER_IMAGES", "cifar10:test")
    path.write_text(text)
    config = load_config(path)
    assert {*config.arms} >= {"lora", "full"} and len(config.tune.rates) == 3
    make_job(config, tmp_path / "run")
    if job == "dense":  # whose arms need no further key
        words = ["size=[32, 48]", "tune=null", "train.warmup=0", *(word for word in TINY if "img_size" not in word)]
        assert main(["train", str(path), *words, "--out", str(tmp_path / "runs"), "--quiet"]) == 0
        done = {path.parts[-3]: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/arms/*/*/done.json")}
        assert {arm: about["method"] for arm, about in done.items()} == {
            "lora": "lora",
            "head": "heads",
            "full": "full",
        }


# What a job cannot give a method; the file is not at fault.
CANNOT = {
    ("classification", "ilora"): "gates",
    ("classification", "mtlora"): "only tasks of a multitask run with `size` have them",
    ("fewshot", "emtal"): "a router takes adapt.options.fade: 1",
    ("fewshot", "ilora"): "gates",
    ("fewshot", "mtlora"): "only tasks of a multitask run with `size` have them",
    ("dense", "ilora"): "gates",
    ("lm", "corda"): "calibration: 'corda' needs covariances",
    ("lm", "emtal"): "it needs a timm ViT",
    ("lm", "ilora"): "is gated by a user's history",
    ("lm", "mtlora"): "only tasks of a multitask run with `size` have them",
    ("lm", "head"): "has no head",
}
METHODS = [*vismt.list_methods(), "peft:dora"]
TRAINING = ("classification", "fewshot", "dense", "lm")
# Each method in one job, and every refusal.
CHANGED = sorted(
    {*zip(itertools.cycle(TRAINING), METHODS), ("dense", "full"), ("dense", "corda"), ("lm", "s2ft"), *CANNOT}
)


@pytest.mark.parametrize(("job", "method"), CHANGED)
def test_the_method_is_changed_alone(job: str, method: str, tmp_path: Path, capsys) -> None:
    given, words = [], [*TINY]
    if job == "classification":
        words += ["arms={}", "tune=null"]
    if job == "dense":
        words = ["size=[32, 48]", *(word for word in TINY if "img_size" not in word)]
    if job == "lm":
        (tmp_path / "mine.jsonl").write_text((json.dumps({"prompt": "a b", "completion": "b a"}) + "\n") * 20)
        reader = tokenizer()
        reader.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}"
        reader.save_pretrained(save_lm(tmp_path / "lm"))
        given, words = ["--texts", str(tmp_path / "mine.jsonl")], [f"model.name={tmp_path / 'lm'}", "train.steps=2"]
    assert main(["init", job, *given, "--to", str(tmp_path), "--quiet"]) == 0
    command = ["train", tmp_path / f"{job}.yaml", *words, "train.warmup=0", f"adapt.method={method}"]
    command += ["--out", tmp_path / "runs"]
    capsys.readouterr()
    if (job, method) in CANNOT:
        assert CANNOT[job, method] in refused(capsys, *command)
        return
    assert main([str(word) for word in command]) == 0
    reset = {"dense": "without rank 4: ", "lm": "without rank 16, alpha 32.0: "}.get(job, "without")
    expected = job in ("dense", "lm") and method in ("s2ft", "lisa", "full")
    assert (reset in capsys.readouterr().out) == expected


def test_a_line_end_in_the_name_of_a_file_of_texts_is_no_line_of_the_configuration(tmp_path: Path) -> None:
    texts = tmp_path / "a\nseed: 7.jsonl"
    texts.write_text('{"text": "a", "b\\nseed: 8": 1}\n' * 3)
    assert main(["init", "lm", "--texts", str(texts), "--to", str(tmp_path), "--quiet"]) == 0
    config = load_config(tmp_path / "lm.yaml")
    assert config.seed == 0 and Path(config.tasks[0].train[0]).resolve() == texts


def test_a_study_can_be_moved(tmp_path: Path, monkeypatch, capsys) -> None:
    """With its images and its runs, and a configuration is read from any folder."""
    home = tmp_path / "here"
    write_folder(home / "study" / "photos", 12)
    assert (
        main(
            [
                "init",
                "classification",
                "--images",
                str(home / "study" / "photos"),
                "--to",
                str(home / "study"),
                "--quiet",
            ]
        )
        == 0
    )
    written = [(home / "study" / name).read_text() for name in ("classification.yaml", "photos.card.yaml")]
    assert not any(str(tmp_path) in text for text in written) and "train: [./photos.card.yaml]" in written[0]
    command = ["run", "classification.yaml", *TINY, "train.warmup=0", "tune=null"]
    monkeypatch.chdir(home / "study")
    assert main(command) == 0
    home.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there" / "study")
    capsys.readouterr()
    assert main(command) == 0 and len(list(Path("runs").iterdir())) == 1
    assert "done before" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["run", "there/study/classification.yaml", *TINY, "train.warmup=0", "tune=null", "--quiet"]) == 0


def test_own_maps(tmp_path: Path, capsys) -> None:
    """The size is that of the images, and a missing map, a label of one pixel and names of the classes are told."""
    random = np.random.default_rng(0)
    for name in ("images", "label", "depth_m"):
        (tmp_path / "maps" / name).mkdir(parents=True)
    for number in range(10):
        image = random.integers(0, 255, (32, 48, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "maps" / "images" / f"{number}.png")
        labels = random.choice([0, 1, 2, 255], (32, 48)).astype(np.uint8)
        if number == 0:
            labels[3, 4] = 4
        Image.fromarray(labels).save(tmp_path / "maps" / "label" / f"{number}.png")
        np.save(tmp_path / "maps" / "depth_m" / f"{number}.npy", random.uniform(1, 2, (32, 48)).astype(np.float32))
    (tmp_path / "maps" / "depth_m" / "0.npy").unlink()
    (tmp_path / "maps" / "masks").mkdir()
    where = tmp_path / "study"
    assert main(["init", "dense", "--images", str(tmp_path / "maps"), "--to", str(where)]) == 0
    told = capsys.readouterr().out
    assert "not used: 'masks'; a folder of maps is called by its form: label, depth_mm," in told
    assert "1 without depth_m of 10 images" in told and "few have label 3 (0), 4 (1)." in told
    assert load_config(where / "dense.yaml").size == [28, 42]  # of 32 x 48, in patches of 14
    assert "Scores are of maps in this size." in (where / "dense.yaml").read_text()
    card = where / "maps.card.yaml"
    commented = "# names: [background, door, ...]"
    assert commented in card.read_text()
    card.write_text(card.read_text().replace(commented, "names: [wall, floor, door, lamp, cat] #"))
    tiny = [override for override in TINY if "img_size" not in override]
    rows = run(where, "dense", *tiny, "size=[32, 48]", "train.warmup=0")
    assert {row.task for row in rows} == {"semseg", "depth"} and {row.n for row in rows} == {2}
    scores = {(row.task, row.metric) for row in rows if not row.further}
    assert scores == {("semseg", "mIoU"), ("depth", "RMSE in m")} and {row.arm for row in rows} == {
        "constant",
        "adapted",
    }
    of_classes = {row.metric for row in rows if row.arm == "constant" and row.metric.startswith("IoU of ")}
    assert of_classes == {"IoU of wall", "IoU of floor", "IoU of door"}  # which occur in the test images
    assert {"pixel accuracy", "delta 1", "mean relative error"} <= {row.metric for row in rows if row.further}
    (folder,) = (where / "runs").iterdir()
    assert main(["evaluate", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "mIoU in % ↑ (score)" in printed and "IoU of wall in % ↑" in printed
    report = (folder / "report.md").read_text()
    assert "mean relative error" in report and "IoU of wall" in report
    assert "Confusion of pixels" in report and (folder / "figures" / "confusion-semseg-adapted.svg").exists()
    assert "Take constant" not in report


DEPTH = np.full((8, 8), 700, np.uint16)
WRONG = {
    "huge": ("label", np.full((8, 8), 3_000_000_000), "label 3e+09 found"),
    "unknown": ("label", np.full((8, 8), -1), "correct the file, or `classes`, `first` and `void` of the card"),
    "colours": ("label", np.full((8, 8, 3), 255, np.uint8), "class numbers, grey or palette and not colours"),
    "depth": ("depth_m", DEPTH, "an image of millimetres is depth_mm: name the folder so"),
    "size": ("depth_mm", DEPTH[:4], "bring the file to the size of its image"),
}


def write_map(folder: Path, form: str, values: np.ndarray, count: int = 5) -> None:
    for name, array in (("images", np.zeros((8, 8, 3), np.uint8)), (form, values)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            if array.dtype == np.int64:
                np.save(folder / name / f"{number}.npy", array)
            else:
                Image.fromarray(array).save(folder / name / f"{number}.png")


@pytest.mark.parametrize("case", WRONG)
def test_maps_that_a_run_would_refuse(case: str, tmp_path: Path, capsys) -> None:
    form, values, message = WRONG[case]
    write_map(tmp_path / "maps", form, values)
    error = refused(capsys, "init", "dense", "--images", tmp_path / "maps", "--to", tmp_path / "to")
    assert message in error and not (tmp_path / "to").exists()


def test_masks_of_0_and_255_have_two_classes(tmp_path: Path, capsys) -> None:
    write_map(tmp_path / "maps", "label", 255 * np.eye(8, dtype=np.uint8), 10)
    assert main(["init", "dense", "--images", str(tmp_path / "maps"), "--to", str(tmp_path)]) == 0
    assert "'label' has 255 and 0 alone: a mask of two classes" in capsys.readouterr().out
    tiny = [override for override in TINY if "img_size" not in override]
    rows = run(tmp_path, "dense", *tiny, "size=[32, 32]", "train.warmup=0")
    assert {(row.task, row.metric) for row in rows if not row.further} == {("saliency", "mIoU")}


def test_maps_of_void_alone_and_texts_of_any_name(tmp_path: Path, capsys) -> None:
    for name, value in (("images", 0), ("label", 255)):
        (tmp_path / "maps" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "maps" / name / f"{number}.png")
    error = refused(capsys, "init", "dense", "--images", tmp_path / "maps", "--to", tmp_path / "dense")
    assert "no map in 'label' has a label but 0 and 255" in error
    texts = tmp_path / 'a: "b" #c.jsonl'  # no plain YAML
    texts.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    assert main(["init", "lm", "--texts", str(texts), "--to", str(tmp_path / "lm"), "--quiet"]) == 0
    text = (tmp_path / "lm" / "lm.yaml").read_text()
    assert '{"x": " A", "y": " B"}' in text and yaml.safe_load(text)["title"] == f"Fine-tuning on {texts.name}"


def test_texts(tmp_path: Path) -> None:
    assert main(["init", "lm", "--to", str(tmp_path), "--quiet"]) == 0
    rows = run(tmp_path, "lm", f"model={{name: {save_lm(tmp_path / 'lm')}, first_block: 0}}", "train.steps=2")
    assert {(row.task, row.data) for row in rows} == {("sentiment", "texts")} and {row.arm for row in rows} >= {
        "frozen"
    }


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "what colour", "input": "", "output": "blue", "id": 1},
        {"conversations": [{"from": "human", "value": "sky"}, {"from": "gpt", "value": "blue"}]},
        {"question": "what colour", "choices": ["blue", "green"], "answer": 1},
    ],
    ids=["alpaca", "sharegpt", "choices"],
)
def test_rows_of_a_known_layout_train_as_written(row: dict, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([row] * 20))
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}"
    words.save_pretrained(save_lm(tmp_path / "lm"))
    assert main(["init", "lm", "--texts", str(tmp_path / "mine.json"), "--to", str(tmp_path), "--quiet"]) == 0
    rows = run(tmp_path, "lm", f"model={{name: {tmp_path / 'lm'}}}", "train.steps=2", "train.warmup=0")
    assert {(row.task, row.n) for row in rows} == {("own", 6)}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fewshot", "dense"])  # the others' sets are those of the quick starts
def test_without_images(job: str, tmp_path: Path, monkeypatch) -> None:
    assert main(["init", job, "--to", str(tmp_path), "--quiet"]) == 0
    monkeypatch.chdir(tmp_path)
    words = {
        "fewshot": [*TINY, "evaluate.episodes=2"],
        "dense": [*(word for word in TINY if "img_size" not in word), "size=[32, 48]"],
    }
    assert run(tmp_path, job, *words[job], "train.warmup=0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fewshot", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["fewshot", "--images", "."], "no folder of images in it; need one for each class"),
        (["dense", "--images", "."], "for dense it needs a folder 'images' and folders of maps beside it"),
        (["lm", "--images", "."], "init: lm takes --texts, not --images."),
        (["dense", "--texts", "a.jsonl"], "init: dense takes --images, not --texts."),
        (["lm", "--texts", "a.jsonl"], "--texts a.jsonl: no such file"),
        (["multitusk"], "init: no job 'multitusk'. Near: 'multitask'"),
    ],
)
def test_user_errors(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "init", *arguments)
    assert not list(tmp_path.iterdir())
