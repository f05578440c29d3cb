"""CorDA's covariances over images, in the classification and the few-shot job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import FEWSHOT, TRAIN, VIT, refused, run_config, written

from vismt.backbones import timm_models
from vismt.jobs import open_run
from vismt.llm.corda.covariance import collect_covariance, load_covariances

CORDA = {"method": "corda", "rank": 2, "targets": ["qkv"]}
TASK = {"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40}
MULTITASK = {
    "task": "multitask",
    "model": VIT,
    "adapt": CORDA,
    "calibration": {"examples": 12, "batch": 5},
    "tasks": [TASK],
    "batch": 8,
    "train": TRAIN,
}


def test_covariances_are_those_of_the_chosen_training_images(tmp_path: Path) -> None:
    folder = run_config(written(tmp_path / "corda.yaml", MULTITASK))
    found = load_covariances(next((folder / "calibration").iterdir()))
    job = open_run(folder).job
    backbone = timm_models.create(**VIT, num_classes=10, new_head=True, seed=0)
    images = job.data.training()
    assert len(images) == 40
    every = collect_covariance(backbone.vit, [backbone.normalise(images[torch.arange(40)])], ["qkv"])
    assert set(found) == set(every) and len(found) >= 4
    path = min(found)
    # A mean over 12 of the 40 images: near that of all, and not equal.
    assert 0 < float((found[path] - every[path]).norm() / every[path].norm()) < 0.5


def test_few_shot_runs_calibrate_on_named_sets(tmp_path: Path) -> None:
    config = {**FEWSHOT, "adapt": CORDA, "calibration": {"data": ["photo_crops:test"], "examples": 8}, "select": None}
    folder = run_config(written(tmp_path / "corda.yaml", config))
    assert load_covariances(next((folder / "calibration").iterdir()))
    assert (folder / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**MULTITASK, "calibration": None}, "calibration: 'corda' needs covariances; give this section"),
        ({**MULTITASK, "calibration": {"examples": 0}}, "calibration.examples is 0; it must be at least 1"),
        ({**FEWSHOT, "adapt": CORDA}, "calibration: 'corda' needs covariances; give this section"),
    ],
)
def test_missing_images_are_an_error_before_any_work(config, text, tmp_path: Path, capsys) -> None:
    path = written(tmp_path / "corda.yaml", config)
    assert text in refused(capsys, "run", path, "--out", tmp_path / "runs")
