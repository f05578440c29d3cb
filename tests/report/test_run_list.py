"""`vismt list runs` and `clean`: what a folder of runs shows, and that nothing but stubs and caches is deleted."""

import os
import re

import pytest
import torch
from helpers.faults import no_hang
from helpers.own_images import write_folder
from helpers.run_folder import make_folder
from helpers.tiny import tiny_vit
from helpers.tiny_runs import refused

from vismt.base.identity import Identity
from vismt.cli import main
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.multitask.emtal.clusters import cluster_model
from vismt.report.run_list import list_runs
from vismt.storage.cache import deletable
from vismt.storage.files import sealed
from vismt.storage.locks import locked, scratch_beside
from vismt.storage.stored_tensors import machine, path_of, write_stored

PIXELS = "digits-test-32-0123456789abcdef0123.npy"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An evaluated run, a trained one, an interrupted one, a stub, and a folder that is no run."""
    parent = tmp_path / "runs"
    config = "task: fewshot\ntitle: Digits\n"
    for name in ("trained", "interrupted", "stub", "other"):
        (parent / name).mkdir(parents=True)
        if name != "other":
            (parent / name / "config.resolved.yaml").write_text(config)
    make_folder(parent)
    (parent / "run-4f2a" / "config.resolved.yaml").write_text(config)
    (parent / "trained" / "run.json").write_text(sealed({"adapt": {}}))
    (parent / "interrupted" / "records").mkdir()
    (parent / "interrupted" / "records" / "a.jsonl").write_text("")
    (parent / "stub" / "run.json").write_text(sealed({}))
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "pixels").mkdir(parents=True)
    (tmp_path / "cache" / "pixels" / PIXELS).write_bytes(b"0" * 10)
    return parent


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["results.jsonl", "run.json", "config.resolved.yaml", "records"])
def test_a_run_folder_with_files_that_have_no_end_leaves_the_other_runs_listed(runs, name, kind):
    folder = runs / "run-4f2a"
    path = next((folder / "records").iterdir()) if name == "records" else folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with no_hang(name):
        states = {row.folder.name: row.state for row in list_runs(runs)}
    assert states.keys() == {"run-4f2a", "trained", "interrupted", "stub"} and states["trained"] == "trained"
    # A run that has results is not opened further.
    assert "a named pipe" in states["run-4f2a"] or "a device" in states["run-4f2a"] or name == "run.json"


def test_every_run_has_a_line(runs, capsys):
    states = {row.folder.name: row.state for row in list_runs(runs)}
    assert states == {
        "run-4f2a": "evaluated",
        "trained": "trained",
        "interrupted": "interrupted",
        "stub": "nothing done",
    }
    assert main(["list", "runs", "--runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "title", "job", "result", "state"] and len(lines) == 5
    line = next(line for line in lines if line.startswith("run-4f2a"))
    assert (
        "Digits" in line and "fewshot" in line and "accuracy in % 56.2 ± 21.3 (adapted; 95 % over new examples)" in line
    )


def test_a_run_that_is_running_or_damaged_is_said_to_be(runs):
    (runs / "run-4f2a" / "results.jsonl").write_text("{}\n")
    with locked(runs / "stub"):
        states = {row.folder.name: row.state for row in list_runs(runs)}
    assert states["stub"] == "running" and "results.jsonl" in states["run-4f2a"]
    assert {row.state for row in list_runs(runs)} >= {"nothing done"}


def test_a_folder_without_runs(tmp_path, capsys):
    assert f"no run folder in '{tmp_path}'" in refused(capsys, "list", "runs", "--runs", tmp_path)


def test_clean_asks_for_each_folder(runs, monkeypatch, capsys):
    questions = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or ("y" if "stub" in text else ""))
    assert main(["clean", "--runs", str(runs)]) == 0
    assert len(questions) == 2 and "stub" in questions[0] and "pixels" in questions[1]
    assert {path.name for path in runs.iterdir()} == {"run-4f2a", "trained", "interrupted", "other"}
    assert (runs.parent / "cache" / "pixels" / PIXELS).exists()
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    assert not list((runs.parent / "cache").iterdir())
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert {path.name for path in runs.iterdir()} == {"run-4f2a", "trained", "interrupted", "other"}


def test_clean_without_a_terminal_deletes_nothing(runs, monkeypatch, capsys):
    def closed(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert "--yes" in refused(capsys, "clean", "--runs", runs)
    assert (runs / "stub").is_dir()


def tree(root):
    """Return every name below a folder with the content of its file or the target of its link."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in root.rglob("*")
    }


def test_clean_keeps_whatever_else_lies_in_the_cache_folder(runs, capsys):
    """A cache folder that is also the user's own: only files that vismt named, and folders that it fetched, go."""
    cache = runs.parent / "cache"
    elsewhere = runs.parent / "elsewhere"
    for name in ("thesis/chapter.tex", "pixels/photos.npy", "features/mine.safetensors", "assets/logo.png",
                 "torchvision/cifar10/data.bin", "experts/notes.txt", "robustbench/.git/config"):  # fmt: skip
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    (elsewhere / "0123456789abcdef01234567.safetensors").parent.mkdir()
    (elsewhere / "0123456789abcdef01234567.safetensors").write_text("linked")
    (elsewhere / ".weights.lock").write_text("")
    (cache / "wheels").symlink_to(elsewhere)
    (cache / "features" / "0123456789abcdef01234560.safetensors").symlink_to(elsewhere / ".weights.lock")
    kept = tree(runs.parent)
    for name in ("features/0123456789abcdef01234567.safetensors", "experts/0123456789abcdef0123456789abcdef.safetensors",
                 "pixels/tmpab12_cd9.part", "assets/vit/model.safetensors", "assets/.vit.lock", "assets/.vit.part-a1/0/x",
                 "robustbench/cifar10/Linf/Standard.pt"):  # fmt: skip
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    gone = {f"cache/pixels/{PIXELS}", "runs/stub", "runs/stub/run.json", "runs/stub/config.resolved.yaml"}
    left = tree(runs.parent)
    assert {name for name in kept if name not in left} == gone
    assert {name for name in left if name not in kept} <= {
        "cache/robustbench/cifar10/Linf",
        "cache/robustbench/cifar10",
    }
    shown = capsys.readouterr().out
    assert not re.search("thesis|logo|mine|photos|elsewhere|cifar10", shown)
    assert "fetched by vismt, by the lock files that it left: vit" in shown and "not vismt's and stays" in shown


@pytest.mark.parametrize(
    "content", ['{"experiment": "mine"}', "[1]", "{", "x" * 2000, "[" * 100_000, '{"sha256": "0", "command": "vismt"}']
)
def test_a_run_json_of_another_program_keeps_its_folder(runs, content, capsys):
    (runs / "stub" / "run.json").write_text(content)
    assert main(["clean", "--runs", str(runs), "--yes"]) == 0
    assert (runs / "stub" / "run.json").read_text() == content and "stub" not in capsys.readouterr().out


def test_clean_keeps_a_folder_that_is_not_a_bare_run(runs, tmp_path):
    def damaged(name, change):
        folder = runs / name
        folder.mkdir()
        (folder / "config.resolved.yaml").write_text("task: fewshot\n")
        change(folder)

    outside = tmp_path / "outside"
    (outside / "arms").mkdir(parents=True)
    (outside / "config.resolved.yaml").write_text("task: fewshot\n")
    damaged("linked arms", lambda folder: (folder / "arms").symlink_to(outside / "arms"))
    damaged("linked file", lambda folder: (folder / "run.json").symlink_to(outside / "config.resolved.yaml"))
    damaged(
        "own file below", lambda folder: (folder / "mine").mkdir() or (folder / "mine" / "run.json").write_text("{}")
    )
    damaged("own config", lambda folder: (folder / "config.resolved.yaml").write_text("db: mysql\n"))
    damaged("pipe", lambda folder: os.mkfifo(folder / "run.json"))
    damaged("folder", lambda folder: (folder / "run.json").mkdir())
    (runs / "behind a link").symlink_to(outside)
    (runs / "broken link").symlink_to(outside / "nothing")
    before = {name for name in tree(tmp_path) if not name.startswith(("runs/stub", "cache"))}
    with no_hang("clean"):
        assert main(["clean", "--runs", str(runs), "--yes"]) == 0
        assert main(["list", "runs", "--runs", str(runs)]) == 0
    assert set(tree(tmp_path)) == before | {"cache"}


def test_a_run_that_starts_during_the_question_is_kept(runs, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: (runs / "stub" / "results.jsonl").write_text("") or "y")
    assert main(["clean", "--runs", str(runs)]) == 0
    assert (runs / "stub" / "config.resolved.yaml").exists()


def test_what_the_caches_write_is_what_clean_deletes(tmp_path, monkeypatch):
    """A store whose files are renamed without a word to `clean` fails here."""
    photos, cache = write_folder(tmp_path / "photos", count=1), tmp_path / "cache"
    monkeypatch.setenv("VISMT_CACHE", str(cache))
    Pixels(open_images(photos), 8)
    linear = torch.nn.Linear(2, 2)
    write_stored(path_of("data", Identity(linear), machine(torch.device("cpu"))), {"features": torch.ones(2)})
    cluster_model(tiny_vit(), 2)
    with scratch_beside(cache / "assets" / "vit", "asset") as scratch:
        (scratch / "model").mkdir()
        os.replace(scratch / "model", cache / "assets" / "vit")
    assert sorted(path.name for path in cache.iterdir()) == ["assets", "experts", "features", "pixels"]
    for item in deletable(cache):
        item.delete()
    assert not list(cache.iterdir())
