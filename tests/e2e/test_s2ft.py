"""S2FT through the one training loop: exact resume in every mode, and a whole multi-task run from a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from tiny import images, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.cli import main
from vismt.config import TrainConfig
from vismt.engine import checkpoint, loop, runtime
from vismt.engine.log import read_lines
from vismt.engine.run import open_run

EVERY = ["v", "o", "u", "d"]


class Objective(nn.Module):
    """Cross-entropy of a tiny ViT with dropout, so that the random state matters."""

    def __init__(self, mode: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.vit = tiny_vit(proj_drop_rate=0.1).to(dtype)
        vismt.adapt(self.vit, "s2ft", ratio=0.25, parts=EVERY, mode=mode, also_train=["head"])

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        logits = self.vit(batch.to(self.vit.head.weight.dtype)).float()
        return {"loss": nn.functional.cross_entropy(logits, torch.arange(3))}


@pytest.mark.parametrize(
    "mode,dtype", [("permute", torch.float32), ("index", torch.float32), ("delta", torch.float32), ("permute", torch.bfloat16)]
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    def run(name: str, stop_after: int | None = None) -> Objective:
        objective = Objective(mode, dtype)
        config = TrainConfig(steps=6, lr=0.01, checkpoint_every=2, weight_decay=0.1)

        def after(step: int) -> None:
            if step == stop_after:
                raise KeyboardInterrupt

        loop.train(
            objective, lambda number: images(3, seed=number), config, tmp_path / name, "hash", runtime.accelerator(), seed=1,
            after_step=after,
        )
        return objective

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_after=5)
    cut = run("cut")
    for (name, one), two in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert torch.equal(one, two), name
    kept = torch.load(tmp_path / "cut" / checkpoint.NAME, weights_only=True)["tensors"]
    assert not any(name.endswith("fc2.weight") for name in kept)  # slices, not weights
    assert read_lines(tmp_path / "cut" / "metrics.jsonl")[-1]["loss"] < read_lines(tmp_path / "cut" / "metrics.jsonl")[0]["loss"]
    stock, start = vismt.unadapt(whole.vit).state_dict(), tiny_vit().to(dtype).state_dict()
    assert all(torch.equal(stock[name], start[name]) for name in start)


def test_a_run_from_its_configuration_to_merged_weights(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    peft = pytest.importorskip("peft")
    path = tmp_path / "slices.yaml"
    path.write_text(yaml.safe_dump({
        "task": "multitask", "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
        "adapt": {"method": "s2ft", "options": {"ratio": {"o": 0.5, "d": 0.1}, "parts": ["o", "d"], "mode": "permute"}},
        "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40}],
        "batch": 16, "train": {"steps": 4, "lr": 1.0e-2, "checkpoint_every": 2}, "evaluate": {"batch": 64},
    }))
    assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    folder = next((tmp_path / "runs").iterdir())
    merged = json.loads(next(folder.rglob("merge.json")).read_text())
    assert merged["different_predictions"] == 0 and merged["largest_difference"] < 1e-5 * merged["largest_logit"]
    run = open_run(folder)
    net = run.job.net()
    assert type(net.stock.blocks[0].mlp.fc2).__name__ == "SlicedLinear"
    x = run.job.data.part(0, "test")[torch.arange(8)]
    wanted = net(x)
    model = timm.create_model("test_vit", img_size=32, num_classes=net.stock.head.out_features)
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(run.merge(None) / "model.safetensors"))
    assert torch.allclose(model.eval()(net.backbone.normalise(x)), wanted, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(run.job.fresh(run.job.config).stock, str(run.export("peft", None))).eval()
    assert torch.allclose(theirs(net.backbone.normalise(x)), wanted, atol=1e-5)
