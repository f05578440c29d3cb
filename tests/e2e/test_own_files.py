"""Files of the user: no prediction, export or report takes the place of one, whatever it is called."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_runs import contents, refused
from PIL import Image

import vismt
from vismt.cli import main
from vismt.jobs.predictions import TABLE
from vismt.storage.outputs import NOTE


@pytest.fixture(scope="module")
def runs(finished) -> dict[str, Path]:
    """A run of the dense and of the multi-task job."""
    return {job: finished(job) for job in ("dense", "multitask")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, value in (("a.png", 50), ("a-depth.png", 90)):
        Image.fromarray(np.full((40, 50, 3), value, np.uint8)).save(folder / name)
    return folder


def test_a_prediction_never_replaces_the_photo_that_it_is_made_of(
    runs: dict[str, Path], photos: Path, monkeypatch, capsys
) -> None:
    before, run = contents(photos), runs["dense"]
    monkeypatch.chdir(photos)
    for words in ((photos, "--to", photos), ("a.png", "--to", "."), (photos / "a.png", "--to", photos / "../photos")):
        assert "is an input and would be replaced by an output" in refused(capsys, "predict", run, *words)
    assert contents(photos) == before
    # Nor another photo beside it.
    (photos / "a.png").rename(photos / "b.jpg")
    (photos / "b.png").write_bytes(b"mine")
    before = contents(photos)
    error = refused(capsys, "predict", run, "b.jpg", "--to", ".")
    assert "'b.png' exists and would be overwritten; give another --to" in error and contents(photos) == before


def test_the_maps_of_one_photo_never_replace_those_of_another(
    runs: dict[str, Path], photos: Path, tmp_path: Path, capsys
) -> None:
    command = ("predict", runs["dense"], photos, "--to", tmp_path / "maps")
    error = refused(capsys, *command, "--maps")
    assert f"'{photos / 'a-depth.png'}' and '{photos / 'a.png'}' would both become a-depth.png" in error
    assert not (tmp_path / "maps").exists()
    for _ in range(2):  # what vismt wrote it may write again
        assert main([*map(str, command), "--quiet"]) == 0
    assert set(contents(tmp_path / "maps")) == {"a.png", "a-depth.png", TABLE, NOTE}


def test_a_photo_of_two_dots_stays_in_the_folder(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    (photos / "a.png").rename(photos / "..png")
    (photos / "a-depth.png").unlink()
    target = tmp_path / "to" / "maps"
    assert main(["predict", str(runs["dense"]), str(photos / "..png"), "--to", str(target), "--maps", "--quiet"]) == 0
    assert set(contents(tmp_path / "to")) >= {"maps/..png", "maps/..npz", "maps/.-depth.png"}
    assert all(name.startswith("maps/") for name in contents(tmp_path / "to"))


@pytest.mark.parametrize("job", ["multitask", "dense"])
def test_every_file_of_a_folder_is_a_row_or_counted(
    runs: dict[str, Path], job: str, photos: Path, tmp_path: Path, capsys
) -> None:
    (photos / "a.png").rename(photos / "a\rb,\n.png")
    (photos / "sub").mkdir()
    (photos / "a-depth.png").rename(photos / "sub" / "a.png")
    bad = {"empty.png": "0 bytes", "gone.jpg": "No such file", "text.jpg": "none of BMP", "torn.png": "truncated"}
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (photos / "text.jpg").write_text("no image")
    (photos / "empty.png").write_bytes(b"")
    (photos / "torn.png").write_bytes((photos / "sub" / "a.png").read_bytes()[:90])
    odd = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")
    Image.new("RGB", (40, 50)).save(odd)
    (photos / "notes.txt").write_text("mine")
    to = tmp_path / "to"
    capsys.readouterr()
    assert main(["predict", str(runs[job]), str(photos), "--to", str(to), "--maps"]) == 2
    printed = capsys.readouterr()
    assert "8 seen   2 answered   5 failed   1 left out: files without the name of an image" in printed.out
    assert printed.err.count("\n") == 1 and "5 without an answer" in printed.err and "on_bad_sample" not in printed.err
    with (to / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows if not row["error"]} == {
        str(photos / "a\rb,\n.png"),
        str(photos / "sub/a.png"),
    }
    errors = {Path(row["image"]).name: row["error"] for row in rows if row["error"]}
    assert errors.keys() == {*bad, "caf?.png"} and "not UTF-8; rename" in errors["caf?.png"]
    for name, reason in bad.items():
        assert reason in errors[name]
    if job == "dense":
        assert (to / "sub-a.png").exists() and {row["picture"] for row in rows} == {"", "a\rb,\n.png", "sub-a.png"}
    else:
        assert np.load(to / "predictions.npz")["probabilities"].shape[0] == 2
    found = vismt.predict(runs[job], [photos / "text.jpg", photos / "sub"], to=tmp_path / "python")
    assert (found.answered, len(found.failed)) == (1, 1)


def test_a_table_of_the_user_is_kept(runs: dict[str, Path], photos: Path, capsys) -> None:
    (photos / TABLE).write_text("mine")
    assert "predictions.csv' exists and would be overwritten" in refused(
        capsys, "predict", runs["multitask"], photos, "--to", photos
    )
    assert (photos / TABLE).read_text() == "mine" and not (photos / NOTE).exists()


@pytest.mark.parametrize("form", ["torch", "timm", "peft"])
def test_an_export_leaves_a_folder_of_the_user_alone(
    runs: dict[str, Path], form: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "preprocessing.json").write_text("mine")
    monkeypatch.setattr("vismt.jobs.multitask.classifier_job.ClassifierJob.graph", lambda *_: None)
    error = refused(capsys, "export", runs["multitask"], "--format", form, "--to", tmp_path)
    assert "preprocessing.json' exists and would be overwritten; give another --to" in error
    assert contents(tmp_path) == {"preprocessing.json": b"mine"}


def test_a_run_folder_is_no_folder_of_the_user(tmp_path: Path, capsys) -> None:
    (tmp_path / "report.md").write_text("mine")
    words = ["--model", "test_resnet", "--random-weights", "--data", "digits", "--images", "2", "--img-size", "32"]
    error = refused(capsys, "attack", *words, "--attack", "fgsm", "--out", tmp_path)
    assert "report.md' exists and would be overwritten; give another --out" in error
    assert contents(tmp_path) == {"report.md": b"mine"}


@pytest.mark.parametrize("words", ["predict RUN LONG", "attack --model LONG --data digits"])
def test_a_path_that_is_too_long_is_one_message(
    runs: dict[str, Path], words: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(runs["multitask"]), "LONG": "x" * 5000}
    error = refused(capsys, *[named.get(word, word) for word in words.split()])
    assert "too many for a path; give a shorter one" in error and len(error) < 400
