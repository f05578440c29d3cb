"""S2FT through the one training loop: exact resume, and a whole multi-task run from a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.checkpoints import saved_tensors
from helpers.ranks import of_two
from helpers.s2ft_parts import sliced, steps
from helpers.tiny import images, snapshot, tiny_vit
from helpers.tiny_runs import run_config
from helpers.toy_training import train
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.jobs import open_run
from vismt.methods import method_optimizer
from vismt.storage.lines import read_lines

EVERY = ["v", "o", "u", "d"]


class Objective(nn.Module):
    """Cross-entropy of a tiny ViT with dropout, so that the random state matters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vit = tiny_vit(proj_drop_rate=0.1).to(dtype)
        vismt.adapt(self.vit, "s2ft", ratio=0.25, parts=EVERY, also_train=["head"])

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        logits = self.vit(batch.to(self.vit.head.weight.dtype)).float()
        return {"loss": nn.functional.cross_entropy(logits, torch.arange(3))}


def batches(number: int) -> Tensor:
    return images(3, seed=number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    def run(name: str, stop_after: int | None = None) -> Objective:
        settings = {"steps": 6, "lr": 0.01, "checkpoint_every": 2, "weight_decay": 0.1}
        return train(Objective(dtype), batches, tmp_path / name, stop_after, **settings)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_after=5)
    cut = run("cut")
    for (name, value), resumed in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        assert torch.equal(value, resumed), name
    kept = saved_tensors(tmp_path / "cut")
    assert not any(name.endswith("fc2.weight") for name in kept)  # slices, not weights
    logged = read_lines(tmp_path / "cut" / "metrics.jsonl")
    assert logged[-1]["loss"] < logged[0]["loss"]
    stock, start = vismt.unadapt(whole.vit).state_dict(), tiny_vit().to(dtype).state_dict()
    assert all(torch.equal(stock[name], start[name]) for name in start)


def test_a_run_from_its_configuration_to_merged_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = tmp_path / "slices.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "task": "multitask",
                "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
                "adapt": {
                    "method": "s2ft",
                    "options": {"ratio": {"o": 0.5, "d": 0.1}, "parts": ["o", "d"]},
                },
                "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "limit": 40}],
                "batch": 16,
                "train": {"steps": 4, "lr": 1.0e-2, "checkpoint_every": 2},
                "evaluate": {"batch": 64},
            }
        )
    )
    folder = run_config(path)
    merged = json.loads(next(folder.rglob("merge.json")).read_text())
    assert merged["different_predictions"] == 0 and merged["largest_difference"] < 1e-5 * merged["largest_logit"]
    run = open_run(folder)
    net = run.job.loaded(run.job.study.find(None))
    assert type(net.stock.blocks[0].mlp.fc2).__name__ == "SliceLinear"
    x = run.job.data.part(0, "test")[torch.arange(8)]
    wanted = net(x)
    model = timm.create_model("test_vit", img_size=32, num_classes=net.stock.head.out_features)
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(run.merge(None) / "model.safetensors"))
    assert torch.allclose(model.eval()(net.backbone.normalise(x)), wanted, atol=1e-5)
    exported = peft.PeftModel.from_pretrained(run.job.fresh(run.job.config).stock, str(run.export("peft", None))).eval()
    assert torch.allclose(exported(net.backbone.normalise(x)), wanted, atol=1e-5)


# ---- the optimiser ---------------------------------------------------------------------------------------------------------


def test_an_optimiser_without_the_slices_is_refused() -> None:
    objective = Objective()
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer, layer = torch.optim.SGD(trained, lr=0.1), objective.vit.blocks[1].mlp.fc2
    assert method_optimizer(optimizer, objective) is optimizer
    with pytest.raises(UserError, match=r"optimiser does not hold the slice of 'blocks\.1\.mlp\.fc2'; build it"):
        method_optimizer(torch.optim.SGD([p for p in trained if p is not layer.slice_values], lr=0.1), objective)
    layer.slice_values.requires_grad_(False)  # frozen on purpose
    method_optimizer(torch.optim.SGD([p for p in trained if p is not layer.slice_values], lr=0.1), objective)


@pytest.mark.slow
def test_two_processes_are_one_on_both_batches(tmp_path: Path) -> None:
    """DDP and the engine's loop over gloo; processes that chose differently are refused."""
    reports = of_two("s2ft_parts.py", tmp_path)[0]
    assert reports["refused"]
    alone, start = sliced(), snapshot(sliced())
    steps(alone, lambda step: [2 * step, 2 * step + 1])
    for name, value in alone.state_dict().items():
        assert torch.allclose(reports[name], value, atol=1e-4), name
        if name.endswith("slice_values"):
            assert not any(torch.allclose(reports[f"{kind}{name}"], start[name], atol=1e-3) for kind in ("", "loop."))
    for name, value in vismt.merge(alone).state_dict().items():
        assert torch.allclose(reports[f"merged.{name}"], value, atol=1e-4), name
