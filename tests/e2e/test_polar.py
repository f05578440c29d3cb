"""Every job trains with adapt.method polar: the factors stay where its constraint holds them, merged weights are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_runs import CONFIGS, VIT, run_config, written

from vismt.cli import main
from vismt.report.results import read_results
from vismt.storage.lines import read_lines

POLAR = {"method": "polar", "rank": 2, "options": {"split_qkv": True}}
FEWSHOT = {
    "model": {**VIT, "block": 4},
    "adapt": POLAR,
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 2, "queries": 2, "augment": False},
    "train": {"steps": 4, "lr": 1e-3, "checkpoint_every": 2},
    "evaluate": {"data": ["digits"], "ways": 3, "shots": [1], "queries": 2, "episodes": 3},
}
MULTITASK = {
    "task": "multitask",
    "model": VIT,
    "adapt": POLAR,
    "tasks": [
        {"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40},
        {"name": "photos", "train": ["photo_crops:train"], "test": ["photo_crops:test"], "limit": 36},
    ],
    "batch": 16,
    "arms": {
        "landing": {},
        "qr": {"adapt.options": {"constraint": "qr", "theta": "diagonal"}},
        "lora": {"adapt.method": "lora", "adapt.options": {}},
    },
    "train": {"steps": 4, "lr": 1e-2, "weight_decay": 0.05, "accumulate": 2},
}
DENSE = {**CONFIGS["dense"], "adapt": POLAR, "batch": 3, "train": {"steps": 3, "lr": 3.0e-3}}


def test_fewshot(tmp_path: Path) -> None:
    folder = run_config(written(tmp_path / "polar.yaml", FEWSHOT))
    training = folder / "arms" / "adapted" / "lr-0.001-seed-0"
    rows = read_lines(training / "metrics.jsonl")
    assert len(rows) == 4 and all(0 <= row["infeasibility"] < 1 for row in rows) and rows[-1]["infeasibility"] > 0
    assert {row.arm for row in read_results(folder / "results.jsonl")} == {"frozen", "adapted"}
    adapter = json.loads((training / "adapter" / "adapter.json").read_text())
    assert adapter["method"] == "polar" and adapter["options"]["attraction"] == 5e-3
    assert main(["export", str(folder), "--format", "peft", "--to", str(tmp_path / "peft"), "--quiet"]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_multitask_arms_with_and_without_landing(tmp_path: Path) -> None:
    folder = run_config(written(tmp_path / "polar.yaml", MULTITASK))
    logged = {arm: read_lines(next(folder.glob(f"arms/{arm}/lr-*/metrics.jsonl"))) for arm in ("landing", "qr", "lora")}
    assert all("infeasibility" not in row for row in logged["lora"])
    assert all(row["infeasibility"] < 1e-8 for row in logged["qr"]) and logged["landing"][-1]["infeasibility"] > 1e-8
    for arm in logged:
        merged = json.loads(next(folder.glob(f"arms/{arm}/lr-*/merge.json")).read_text())
        assert merged["different_predictions"] == 0
    assert (folder / "report.html").stat().st_size > 0


def test_dense(tmp_path: Path) -> None:
    folder = run_config(written(tmp_path / "polar.yaml", DENSE))
    assert all(1 <= row["stable_rank"] <= 2 for row in read_lines(next(folder.glob("arms/*/lr-*/metrics.jsonl"))))
    assert {(row.task, row.metric) for row in read_results(folder / "results.jsonl")} >= {("depth", "RMSE in m")}
