"""The memory that is predicted for a dense configuration is that of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from scripts.bench import config_memory
from scripts.bench.__main__ import main
from scripts.bench.accounting import peak_bytes, weight_bytes
from scripts.bench.config_memory import made_batch
from vismt.jobs import load_config, make_job
from vismt.jobs.multitask.config import all_tasks

SMALL = {
    "task": "dense",
    "model": {"name": "test_vit"},
    "adapt": {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
    "data": {"train": ["motorcycle:train"], "test": ["motorcycle:test"]},
    "tasks": [{"name": "semseg", "classes": 5, "class_weights": "sqrt"}, "depth", "normals", {"name": "classify", "classes": 3}],
    "size": [64, 96],
    "head": {"name": "conv"},
    "batch": 6,
    "arms": {"heads": {"adapt": None}, "emtal+qr": {"retain": {}}},
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    return path


def test_the_prediction_is_the_peak_of_a_step(path: Path, tmp_path: Path) -> None:
    (predicted,) = config_memory.run(path)
    job = make_job(load_config(path, ["model.pretrained=false"]), tmp_path / "run")
    vars(job)["data"] = config_memory.DATA
    settings = job.study.arms["emtal+qr"]
    net, _, balanced = job.prepared(settings)
    objective = job.objective(settings, net, balanced).train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    batch = made_batch(all_tasks(settings), 6, settings.size)

    def step() -> None:
        objective(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert predicted.peak("as it is", 6) == pytest.approx(weight_bytes(objective) + peak_bytes(step), rel=0.01)
    assert predicted.optimizer == 8 * sum(parameter.numel() for parameter in trained)
    assert predicted.peak("checkpointing: true", 6) < predicted.peak("as it is", 6)
    assert predicted.peak("recompute: cheap", 6) < predicted.peak("as it is", 6)
    lines = str(predicted).splitlines()
    assert lines[0] == "small, arm emtal+qr: test_vit, emtal, 64 x 96 px, no" and len(lines) == 5
    assert lines[2].split()[-1] == f"{predicted.peak('as it is', 6) / 2**30:.2f}"


def test_what_it_does_not_predict(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--config", "configs/lm/quickstart.yaml"]) == 2
    assert "has no task of maps" in " ".join(capsys.readouterr().err.split())
    for words in (["core"], ["memory", "--model", "some"]):
        assert main([*words, "--config", str(path)]) == 2
        assert "is for `python -m scripts.bench memory` without --model" in " ".join(capsys.readouterr().err.split())
