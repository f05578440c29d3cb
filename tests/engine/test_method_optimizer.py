"""The training loop with the optimiser of a method around its optimiser: PoLAR's landing, resumed, accumulated, logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import images, tiny_vit
from helpers.toy_training import logged, train
from torch import Tensor, nn

import vismt
from vismt.llm import Landing
from vismt.multitask.emtal.fading import FadeConfig
from vismt.multitask.emtal.ffn import MoEfiedMlp
from vismt.storage.lines import read_lines


class Classify(nn.Module):
    """Cross-entropy of a tiny ViT with dropout, adapted by a method."""

    def __init__(self, method: str = "polar", **options: object) -> None:
        super().__init__()
        self.vit = tiny_vit(proj_drop_rate=0.1)
        vismt.adapt(self.vit, method, rank=3, split_qkv=True, **options)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.vit(batch["x"]), batch["y"])}


def batches(number: int) -> dict[str, Tensor]:
    return {"x": images(4, seed=number), "y": torch.arange(4)}


def run(folder: Path, objective: Classify, **settings: object) -> Classify:
    settings = {"steps": 6, "lr": 0.02, "warmup": 2, "checkpoint_every": 2, **settings}
    return train(objective, batches, folder, **settings)


@pytest.mark.parametrize("optimizer,constraint", [("adamw", "landing"), ("sgd", "landing"), ("adamw", "cayley")])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, optimizer: str, constraint: str) -> None:
    settings = {"optimizer": optimizer, "accumulate": 2}
    whole = run(tmp_path / "whole", Classify(constraint=constraint), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Classify(constraint=constraint), stop_after=5, **settings)
    cut = run(tmp_path / "cut", Classify(constraint=constraint), **settings)
    for (name, parameter), twin in zip(whole.named_parameters(), cut.parameters()):
        assert torch.equal(parameter, twin), name
    rows = [logged(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert set(rows[0][0]) == {"step", "loss", "lr", "grad_norm", "infeasibility", "stable_rank"}
    # The first step, at Theta = 0, has a pull of rounding alone, which Adam scales up.
    assert rows[0][0]["infeasibility"] < 1e-4 and all(1 <= row["stable_rank"] <= 3 for row in rows[0])
    if constraint == "cayley":
        assert rows[0][-1]["infeasibility"] < 1e-8
    elif optimizer == "adamw":  # the small steps of SGD leave rounding alone
        assert rows[0][-1]["infeasibility"] > rows[0][1]["infeasibility"] > 0


def test_the_loop_is_the_optimiser_by_hand(tmp_path: Path) -> None:
    """Accumulate, clip, land, step: the loop does it in this order with the settings of the adaptation."""
    settings = {"steps": 3, "accumulate": 2, "clip": 0.05, "warmup": 0, "min_lr": 0.02}
    looped, model = run(tmp_path, Classify(attraction=0.8), **settings), Classify()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    landing = Landing(torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0), model, 0.8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for step in range(3):
            for part in (0, 1):
                (model(batches(2 * step + part))["loss"] / 2).backward()
            norm = nn.utils.clip_grad_norm_(trained, 0.05)
            landing.step()
            landing.zero_grad()
    for (name, parameter), twin in zip(looped.named_parameters(), model.parameters()):
        assert torch.allclose(parameter, twin, atol=1e-6), name
    last = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert last["grad_norm"] == pytest.approx(float(norm), rel=1e-4)  # of the gradients, not of the field
    assert last["infeasibility"] == pytest.approx(float(landing.metrics()["infeasibility"]), rel=1e-4)


def test_other_methods_train_as_before(tmp_path: Path) -> None:
    run(tmp_path, Classify("lora"), steps=2)
    assert set(read_lines(tmp_path / "metrics.jsonl")[0]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "elapsed_s",
        "memory_mb",
    }


def test_routers_fade_by_the_section_of_the_configuration_and_resume_bit_for_bit(tmp_path: Path) -> None:
    def objective() -> Classify:
        return Classify("emtal", n_experts=4, cluster=False)

    sections = SimpleNamespace(fade=FadeConfig(0.0, 0.5))
    whole = run(tmp_path / "whole", objective(), sections=sections)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", objective(), stop_after=3, sections=sections)
    cut = run(tmp_path / "cut", objective(), sections=sections)
    for (name, parameter), twin in zip(whole.named_parameters(), cut.parameters()):
        assert torch.equal(parameter, twin), name
    logs = [[row["fade"] for row in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert logs[0] == logs[1] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])  # the value of the step's forward pass
    x = images()
    expected = whole.eval().vit(x)
    assert torch.allclose(vismt.merge(whole.vit)(x), expected, atol=1e-5)


def test_routers_stay_at_their_start_value_without_the_section(tmp_path: Path) -> None:
    objective = run(tmp_path, Classify("emtal", n_experts=4, cluster=False, fade=0.25), steps=2)
    assert {module.fade_value for module in objective.vit.modules() if isinstance(module, MoEfiedMlp)} == {0.25}
    assert "fade" not in read_lines(tmp_path / "metrics.jsonl")[0]
