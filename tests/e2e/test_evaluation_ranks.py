"""Evaluation by two processes: every job writes the files of one process, and each process runs half of the batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.evaluation_ranks import evaluate
from helpers.lm_parts import save_lm, save_texts, sentiment_task
from helpers.ranks import of_two
from helpers.tiny_runs import save_classifier

from vismt.cli import main
from vismt.report.results import RECORDS, RESULTS

VIT = {"name": "test_vit", "pretrained": False}
ATTACK = {"name": "pgd", "epsilon": 8 / 255, "steps": 2}  # with a random start, a function of the batch's number
FOG = {"name": "fog", "severities": [2]}
LORA = {"method": "lora", "rank": 2}


def configs(folder: Path) -> dict[str, dict]:
    """Return a small configuration of every job."""
    save_classifier(folder)
    films = save_texts(folder)["films"]
    return {
        "multitask": {
            "model": {**VIT, "img_size": 32},
            "adapt": LORA,
            "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.03, "limit": 40}],
            "batch": 16,
            "arms": {"lora": {}, "head": {"adapt": None}},
            "train": {"steps": 2},
            "evaluate": {"batch": 20, "attacks": [ATTACK], "corruptions": [FOG]},
        },
        "dense": {
            "model": VIT,
            "adapt": LORA,
            "data": {"train": ["motorcycle:train"], "test": ["motorcycle:test"]},
            "tasks": ["depth", {"name": "edge", "thresholds": 3, "max_dist": 0.03}],
            "size": [32, 48],
            "head": {"name": "linear"},
            "augment": {"strength": 0},
            "batch": 3,
            "train": {"steps": 2},
            "evaluate": {"batch": 2, "attacks": [ATTACK], "corruptions": [FOG]},
        },
        "lm": {
            "model": {"name": str(save_lm(folder / "tiny")), "first_block": 1},
            "adapt": {**LORA, "targets": ["q_proj"]},
            "tasks": [sentiment_task(films, validation=[f"{films}:dev"])],
            "train": {"steps": 2},
            "batch": 4,
            "evaluate": {"batch": 3, "temperature": True, "laplace": True},
        },
        "robustness": {
            "arms": {"vit": {"classifier.name": str(folder / "model.safetensors")}},
            "data": ["digits"],
            "evaluate": {"images": 11, "batch": 4, "attacks": [ATTACK], "corruptions": [FOG], "masking": True},
        },
    }


def files(folder: Path) -> dict[str, bytes]:
    """Return all files of a run by name but those with times."""
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one_and_each_runs_half(tmp_path: Path) -> None:
    counts = {}
    for name, config in configs(tmp_path).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": name, **config}))
        assert main(["train", str(path), "--out", str(tmp_path / name), "--quiet"]) == 0
        one, two = next((tmp_path / name).iterdir()), tmp_path / "two"
        shutil.copytree(one, two / name)
        counts[name] = evaluate(one)
        if name == "multitask":
            shutil.copytree(one, two / "multitask-cut")
            cut_records(two / "multitask-cut")
    of_two("evaluation_ranks.py", tmp_path)
    both = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(2)]
    for name, count in counts.items():
        one, two = next((tmp_path / name).iterdir()), tmp_path / "two"
        expected = files(one)
        assert RESULTS in expected and len(expected) > 3
        for copy in two.glob(f"{name}*"):
            found = files(copy)
            assert set(found) == set(expected)
            assert [path for path in expected if found[path] != expected[path]] == [], copy.name
        first, second = both[0][name], both[1][name]
        assert first + second == count and count / 3 <= second <= first


def cut_records(folder: Path) -> None:
    """Leave of an evaluation half of the lines of the records, and no other results."""
    for path in [folder / RESULTS, *folder.rglob("merge.json"), *(folder / RECORDS).glob("*.jsonl")]:
        path.unlink()
    for path in folder.glob("arms/*/*/records/*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: len(lines) // 2]))
