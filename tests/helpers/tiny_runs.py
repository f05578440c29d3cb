"""A run of each job that takes seconds, and what of its folder must not depend on how it came about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml

from helpers import pyramids  # noqa: F401  registers short_vit
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.ranks import run_two
from helpers.toy_training import logged
from vismt.cli import main
from vismt.engine import checkpoint
from vismt.storage.files import PARTIAL
from vismt.storage.locks import LOCK, locked

VIT = {"name": "test_vit", "img_size": 32, "pretrained": False}
SHORT = {**VIT, "name": "short_vit"}  # for runs within this process alone, in which it is registered
BLOCK = ["model.name=short_vit", "model.block=0"]
TRAIN = {"steps": 3, "lr": 1.0e-2, "checkpoint_every": 2}
FEWSHOT: dict[str, Any] = {
    "model": {**VIT, "block": 2},
    "adapt": {"method": "lora", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False},
    "select": {"data": ["photo_crops:test"], "episodes": 2},
    "train": TRAIN,
    "evaluate": {"data": ["digits"], "ways": 3, "shots": [1], "queries": 2, "episodes": 3},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "fewshot": {**FEWSHOT, "tune": {"rates": [1.0e-3, 1.0e-2]}},
    "pool": {
        **FEWSHOT,
        "adapt": {"method": "amt", "rank": 2},
        "pool": {"levels": [0.5, 4], "warmup": 2, "gamma": 1.0e-2},
        "select": {**FEWSHOT["select"], "attack": None},
        "evaluate": {**FEWSHOT["evaluate"], "models": ["frozen", "merged"]},
    },
    "multitask": {
        "task": "multitask",
        "model": VIT,
        "adapt": {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
        "fade": {"start": 0.0, "end": 0.5},
        "tasks": [
            {"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.03, "limit": 20},
            {"name": "photos", "train": ["photo_crops:train"], "test": ["photo_crops:test"], "limit": 20},
        ],
        "batch": 4,
        "train": TRAIN,
        "evaluate": {"batch": 64},
    },
    "dense": {
        "task": "dense",
        "model": {"name": "test_vit", "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "data": {"train": ["motorcycle:train"], "test": ["motorcycle:test"]},
        "tasks": ["depth", "normals"],
        "size": [32, 48],
        "head": {"name": "linear"},
        "augment": {"strength": 0},
        "batch": 2,
        "train": TRAIN,
    },
    "lm": {
        "task": "lm",
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": TRAIN,
        "batch": 2,
        "evaluate": {"batch": 4},
    },
}


def written(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration; return its file."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def save_classifier(folder: Path) -> None:
    """Write the weights of a classifier of ten classes from elsewhere, and its description."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "img_size": 32, "num_classes": 10}))


def run_on_two(path: Path) -> tuple[Path, str]:
    """Run a configuration beside its file as two processes; return the run folder and what was printed."""
    out = path.parent / "runs"
    printed = run_two("-c", "from vismt.cli import main; raise SystemExit(main())", "run", path, "--out", out)
    return next(out.iterdir()), printed


def run_config(path: Path, *words: str) -> Path:
    """Run a configuration beside its file through the command line, with overrides and options; return the run folder."""
    out = path.parent / "runs"
    before = {*out.iterdir()} if out.exists() else set()
    assert main(["run", str(path), "--out", str(out), "--quiet", *words]) == 0
    folders = {*out.iterdir()}
    return next(iter(folders - before or folders))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that is refused in one line; return the line."""
    capsys.readouterr()  # what came before
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, *words: object, inside: str = "/") -> None:
    """Interrupt a command once its checkpoint of a step is written, in a folder below one of a name."""
    save = checkpoint.save

    def stop(folder: Path, saved: int, *rest: object) -> None:
        save(folder, saved, *rest)
        if saved == step and inside in folder.parts:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stop)
        assert main([*map(str, words)]) == 130


def write_config(job: str, folder: Path) -> Path:
    """Write the configuration of a job and what it needs; return its file."""
    config = dict(CONFIGS[job])
    if job == "lm":
        films = save_texts(folder)["films"]
        config["model"] = {"name": str(save_lm(folder / "lm")), "first_block": 1}
        task = {"name": "films", "kind": "causal", "options": {"answer": "{text}", "length": 16, "end": False}}
        config["tasks"] = [{**task, "limit": 8, "train": [f"{films}:train"], "test": [f"{films}:test"]}]
    return written(folder / f"{job}.yaml", config)


def finished_run(job: str, folder: Path) -> Path:
    """Return the run of a job's configuration in a folder that several processes share; the first one makes it."""
    words = {"lm": [], "fewshot": BLOCK, "pool": BLOCK}.get(job, BLOCK[:1])
    with locked(folder, wait_s=-1):
        if not (folder / "finished").exists():
            run_config(write_config(job, folder), *words)
            (folder / "finished").touch()
    return next((folder / "runs").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder but for locks, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}


def files(folder: Path) -> list[Path]:
    """Return the files of a folder but for locks, which another process may take and give back meanwhile."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and LOCK not in path.name)


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a run has computed, by file: bytes, or the rows of a log without their times. run.json and report differ."""
    found: dict[str, Any] = {}
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        assert PARTIAL not in name, name
        if path.name == "metrics.jsonl":
            found[name] = logged(path.parent)
        elif name != "run.json" and not name.startswith(("report.", "figures/")):
            found[name] = path.read_bytes()
    return found


def evaluated_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Write what they need to a folder; return for every job a configuration with several batches in each set."""
    save_classifier(folder)
    films = save_texts(folder)["films"]
    lora = {"method": "lora", "rank": 2}
    attack = {"name": "pgd", "epsilon": 8 / 255, "steps": 2}  # with a random start, a function of the batch's number
    conditions = {"attacks": [attack], "corruptions": [{"name": "fog", "severities": [2]}]}
    return {
        "fewshot": {
            **FEWSHOT,
            "task": "fewshot",
            "evaluate": {**FEWSHOT["evaluate"], **conditions, "episodes": 20, "probabilities": True},
        },
        "multitask": {
            "task": "multitask",
            "model": VIT,
            "adapt": lora,
            "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.03, "limit": 40}],
            "batch": 16,
            "arms": {"lora": {}, "head": {"adapt": None}},
            "train": {"steps": 2},
            "evaluate": {"batch": 20, **conditions},
        },
        "dense": {
            "task": "dense",
            "model": {"name": "test_vit", "pretrained": False},
            "adapt": lora,
            "data": {"train": ["motorcycle:train"], "test": ["motorcycle:test"]},
            "tasks": ["depth", {"name": "edge", "thresholds": 3, "max_dist": 0.03}],
            "size": [32, 48],
            "head": {"name": "linear"},
            "augment": {"strength": 0},
            "batch": 3,
            "train": {"steps": 2},
            "evaluate": {"batch": 2, **conditions},
        },
        "lm": {
            "task": "lm",
            "model": {"name": str(save_lm(folder / "tiny")), "first_block": 1},
            "adapt": {**lora, "targets": ["q_proj"], "options": {"dropout": 0.2}},
            "tasks": [sentiment_task(films, validation=[f"{films}:dev"])],
            "train": {"steps": 2},
            "batch": 4,
            "evaluate": {"batch": 3, "temperature": True, "laplace": True, "passes": 2},
        },
        "robustness": {
            "task": "robustness",
            "arms": {"vit": {"classifier.name": str(folder / "model.safetensors")}},
            "data": ["digits"],
            "evaluate": {"images": 11, "batch": 4, **conditions},
        },
    }
