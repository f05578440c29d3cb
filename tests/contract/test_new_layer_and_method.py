"""A new kind of layer and a new method, both in this file: everything else works with them unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import DIGITS, holds, images, shake, tiny_vit
from helpers.tiny_runs import run_config, written
from torch import Tensor, nn

import vismt
from vismt.cli import main
from vismt.config.sections import TrainConfig
from vismt.engine import loop, runtime
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import MODULES, AdapterLayer, LayerSpec, register_module, spec_of
from vismt.lowrank.model.inject import also_trained, install
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.targets import find_targets
from vismt.methods import METHODS, Method, register_method

TARGETS = r"blocks\..*(qkv|fc1)"


@dataclass(frozen=True)
class ScaleSettings:
    """Settings of a trained output scale. strength: factor of what is trained."""

    strength: float


class OutputScale(AdapterLayer):
    """A linear with a trained factor for each output: y = (1 + s * g) * (W x) + b, g (o,); DeltaW = diag(s * g) W."""

    Settings = ScaleSettings
    combine_refusal = "needs the weight of the base"

    def __init__(self, base: nn.Module, strength: float) -> None:
        super().__init__(base)
        self.strength = strength
        self.scale_g = nn.Parameter(torch.zeros(self.out_features, device=base.weight.device))

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> OutputScale:
        return cls(base, spec.settings.strength)

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {"scale_g": (spec.shape[0],)}

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        return spec.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"scale_g": self.scale_g}

    def low_rank(self) -> LowRank:
        return LowRank(torch.diag(self.strength * self.scale_g.detach()), self.matrix(self.weight).detach())

    @torch.no_grad()
    def merged(self) -> nn.Module:
        weight = self.stored((1 + self.strength * self.scale_g)[:, None] * self.matrix(self.weight))
        return self.stock(nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        out = (1 + self.strength * self.scale_g) * nn.functional.linear(x, self.matrix(self.weight))
        return out if self.bias is None else out + self.bias


def output_scale(
    model: nn.Module,
    *,
    targets: Any,
    rank: int,
    alpha: float | None,
    seed: int,
    strength: float = 2.0,
    also_train: list[str] | tuple[str, ...] = (),
) -> AdaptReport:
    """Train one factor for each output of the targets."""
    refuse_adapted(model)
    modules, _ = find_targets(model, targets)
    specs = [spec_of(path, module, OutputScale, ScaleSettings(strength)) for path, module in modules.items()]
    install(model, "output_scale", specs, {}, also_trained(model, list(also_train), list(modules)))
    return AdaptReport("output_scale", specs, *count_parameters(model))


class Ramp:
    """A schedule that counts the steps it has seen."""

    def __init__(self, end: float) -> None:
        self.end = end
        self.value = 0.0

    def on_step(self, step: int) -> None:
        self.value = self.end * step

    def metrics(self) -> Mapping[str, float]:
        return {"ramp": self.value}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_module("output_scale")(OutputScale)
    register_method(
        Method(
            "output_scale",
            output_scale,
            layers=(OutputScale,),
            optimizer=lambda optimizer, model: optimizer,
            schedule=lambda model, optimizer, *, steps, settings: Ramp(1 / steps),
        )
    )
    yield
    MODULES._items.pop("output_scale")
    METHODS._items.pop("output_scale")


def adapted(**options: object) -> nn.Module:
    model = tiny_vit()
    vismt.adapt(model, "output_scale", targets=TARGETS, **options)
    return model


def test_adapt_reports_and_starts_at_the_original_function() -> None:
    model = tiny_vit()
    report = vismt.adapt(model, "output_scale", targets=TARGETS)
    assert "output_scale" in vismt.list_methods() and METHODS["output_scale"].options == ["strength", "also_train"]
    assert report.trainable == 2 * (96 + 128) == sum(spec.parameters for spec in report.specs)
    assert "blocks.*.attn.qkv" in str(report) and "96 x 32" in str(report)
    assert torch.allclose(model(images()), tiny_vit()(images()), atol=1e-6)
    with pytest.raises(vismt.UserError, match=r"no option 'strenght'\. Near: 'strength'"):
        vismt.adapt(tiny_vit(), "output_scale", strenght=1.0)


def test_train_with_the_schedule_of_the_method(tmp_path: Path) -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = adapted()

        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            return {"loss": self.vit(batch).square().mean()}

    objective = Objective()
    config = TrainConfig(steps=4, lr=0.05)
    loop.train(objective, lambda k: images(4, seed=k), config, tmp_path, "hash", runtime.accelerator(), seed=0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["ramp"] for row in rows] == [0, 0.25, 0.5, 0.75] and rows[-1]["loss"] < rows[0]["loss"]
    assert any(bool(layer.scale_g.any()) for layer in objective.vit.modules() if isinstance(layer, OutputScale))


def test_save_and_load(tmp_path: Path) -> None:
    model = shake(adapted(also_train=["head"]))
    vismt.save_adapter(model, tmp_path / "a")
    sites = json.loads((tmp_path / "a" / "adapter.json").read_text())["sites"]
    assert sites[0] == {
        "path": "blocks.0.attn.qkv",
        "kind": "linear",
        "shape": [96, 32],
        "layer": "output_scale",
        "strength": 2.0,
    }
    assert torch.equal(vismt.load_adapter(tiny_vit(), tmp_path / "a")(images()), model(images()))
    again = adapted(also_train=["head"])
    assert torch.equal(vismt.load_adapter(again, tmp_path / "a")(images()), model(images()))
    with pytest.raises(vismt.UserError, match="already carries another 'output_scale'"):
        vismt.load_adapter(adapted(also_train=["head"], strength=1.0), tmp_path / "a")
    with pytest.raises(vismt.UserError, match=r"weight was \(96, 32\), here it is \(192, 64\)"):
        vismt.load_adapter(tiny_vit(embed_dim=64), tmp_path / "a")


def test_a_file_of_an_unknown_layer_is_one_clear_error(tmp_path: Path) -> None:
    vismt.save_adapter(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    path.write_text(path.read_text().replace('"layer": "output_scale"', '"layer": "output_scales"'))
    with pytest.raises(
        vismt.UserError, match=r"no adapter module 'output_scales'\. Near: 'output_scale'.*Import the file"
    ):
        vismt.load_adapter(tiny_vit(), tmp_path / "a")


def test_merge_and_unadapt() -> None:
    model = shake(adapted())
    expected = model(images())
    vismt.merge(model)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert torch.allclose(model(images()), expected, atol=1e-5)
    assert holds(vismt.unadapt(shake(adapted())), tiny_vit().state_dict())


def test_peft_reads_the_export_and_combine_refuses(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = shake(adapted())
    vismt.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "peft")).eval()
    assert torch.allclose(theirs(images()), model(images()), atol=1e-5)
    with pytest.raises(vismt.UserError, match=r"combine.*'output_scale' needs the weight of the base"):
        vismt.lowrank.combine([model], [1.0])


def test_vismt_run(tmp_path: Path) -> None:
    config = {**DIGITS, "adapt": {"method": "output_scale", "targets": TARGETS, "options": {"strength": 1.0}}}
    folder = run_config(written(tmp_path / "toy.yaml", config))
    merge = next(folder.rglob("merge.json"))
    assert json.loads(merge.read_text())["different_predictions"] == 0
    log = next(folder.rglob("metrics.jsonl"))
    assert [json.loads(line)["ramp"] for line in log.read_text().splitlines()] == [0, 0.5]
    assert (folder / "report.html").exists() and main(["merge", str(folder), "--quiet"]) == 0
