"""Experts in one tensor and attention of torch.nn in peft's files: the same outputs as peft's, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.readers import LMS, TARGETS, reader, run
from helpers.tiny import shake
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank import combine
from vismt.lowrank.layers.low_rank import LowRankLayer

peft = pytest.importorskip("peft")
PEFT_TARGETS = {
    **{kind: {"target_modules": ["q_proj"], "target_parameters": TARGETS[kind][:2]} for kind in LMS},
    "vit": {"target_modules": ["self_attention", "mlp.0"]},
}
EXPORTED = {**{kind: TARGETS[kind] for kind in LMS}, "vit": ["in_proj_weight", "mlp.0"]}  # out_proj: see below
OTHER_RANK = {
    "mixtral": r".*1\..*down_proj",
    "qwen3_moe": r".*0\..*gate_up_proj",
    "gpt_oss": r".*q_proj",
    "vit": r".*_1.*",
}


@torch.no_grad()
def out(model: nn.Module, kind: str) -> Tensor:
    return run(model, kind)


def written_by_peft(kind: str, folder: Path, **options: object) -> Tensor:
    """Save an adapter with random factors, and return the outputs of peft's model."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **{**PEFT_TARGETS[kind], **options})
    model = peft.get_peft_model(reader(kind), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    model.save_pretrained(folder)
    return out(model, kind)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=["plain", "rslora", "dropout"]
)
@pytest.mark.parametrize("kind", PEFT_TARGETS)
def test_import(kind: str, options: dict, tmp_path) -> None:
    if "lora_dropout" in options and kind in LMS:
        pytest.skip("peft has no dropout for parameters")
    expected = written_by_peft(kind, tmp_path, **options)
    model = vismt.import_peft(reader(kind), tmp_path)
    assert torch.allclose(out(model, kind), expected, atol=1e-5)
    assert not torch.allclose(expected, out(reader(kind), kind), atol=1e-2)
    vismt.save_adapter(model, tmp_path / "ours")
    assert torch.allclose(out(vismt.load_adapter(reader(kind), tmp_path / "ours"), kind), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"compact": True}, {"uniform": True}], ids=["plain", "compact", "uniform"])
@pytest.mark.parametrize("method", ["lora", "pissa"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_export(kind: str, method: str, options: dict, tmp_path) -> None:
    model = reader(kind)
    vismt.adapt(model, method, EXPORTED[kind], rank=2, alpha=6, rank_pattern={OTHER_RANK[kind]: 3})
    expected = out(shake(model, 0.1), kind)
    vismt.export_peft(model, tmp_path, **options)
    theirs = peft.PeftModel.from_pretrained(reader(kind), str(tmp_path)).eval()
    assert torch.allclose(out(theirs, kind), expected, atol=2e-5)
    assert torch.allclose(out(vismt.import_peft(reader(kind), tmp_path), kind), expected, atol=2e-5)
    assert (torch.equal if options else torch.allclose)(out(model, kind), expected)


def test_experts_that_are_named_without_their_owner(tmp_path) -> None:
    expected = written_by_peft("mixtral", tmp_path, target_parameters=["gate_up_proj"])
    assert torch.allclose(out(vismt.import_peft(reader("mixtral"), tmp_path), "mixtral"), expected, atol=1e-5)


def test_all_linears_beside_experts(tmp_path) -> None:
    model = reader("mixtral")
    vismt.adapt(model, "lora", ["q_proj", "k_proj", "v_proj", "o_proj", "experts.down_proj"], rank=2)
    vismt.export_peft(shake(model, 0.1), tmp_path)
    path = tmp_path / "adapter_config.json"  # peft writes the names of the linears
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "all-linear"}))
    imported = vismt.import_peft(reader("mixtral"), tmp_path)
    assert torch.allclose(out(imported, "mixtral"), out(model, "mixtral"), atol=1e-5)


def test_experts_alone_need_no_module(tmp_path) -> None:
    model = reader("mixtral")
    vismt.adapt(model, "lora", ["experts.down_proj"], rank=2)
    vismt.export_peft(shake(model, 0.1), tmp_path)
    theirs = peft.PeftModel.from_pretrained(reader("mixtral"), str(tmp_path)).eval()
    assert torch.allclose(out(theirs, "mixtral"), out(model, "mixtral"), atol=1e-5)
    imported = vismt.import_peft(reader("mixtral"), tmp_path)
    assert torch.allclose(out(imported, "mixtral"), out(model, "mixtral"), atol=1e-5)


def test_peft_adds_the_update_of_out_proj_twice(tmp_path) -> None:
    """Its files are read as it computes; a file that it would read otherwise is not written."""
    written_by_peft("vit", tmp_path)
    model = vismt.import_peft(reader("vit"), tmp_path)
    attention = model.encoder.layers.encoder_layer_0.self_attention
    assert (attention.in_proj_weight.scale, attention.out_proj.scale) == (3, 6)
    with pytest.raises(UserError, match=r"out_proj': peft adds the update twice in nn\.MultiheadAttention; exclude it"):
        vismt.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.22.0"}))
    later = vismt.import_peft(reader("vit"), tmp_path)
    assert later.encoder.layers.encoder_layer_0.self_attention.out_proj.scale == 3
    with pytest.raises(UserError, match="peft has no LoRA of this parameter in"):
        cross = reader("cross")
        vismt.adapt(cross, "lora", ["q_proj_weight"], rank=2)
        vismt.export_peft(cross, tmp_path / "cross")


@pytest.mark.parametrize(
    "kind,change,words",
    [
        ("mixtral", {"target_parameters": ["experts.down_proj"]}, "do not fit the parameters"),
        ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}, "gate"),
        (
            "mixtral",
            {"rank_pattern": {"layers.1.mlp.experts.down_proj": 3}},
            r"saved \(8, 24\), needed \(12, 24\) for 4 experts",
        ),
        ("vit", {"target_modules": ["out_proj", "mlp.0"]}, "in_proj_weight', which the settings do not name"),
    ],
)
def test_files_that_do_not_fit_are_refused(kind: str, change: dict, words: str, tmp_path) -> None:
    written_by_peft(kind, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model, stock = reader(kind), list(reader(kind).state_dict())
    with pytest.raises(UserError, match=words):
        vismt.import_peft(model, tmp_path)
    assert list(model.state_dict()) == stock


def test_out_proj_alone_is_passed_by(tmp_path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(reader("vit"), config).eval()
    assert torch.allclose(out(model, "vit"), out(reader("vit"), "vit"))  # peft's own wrapper is never called
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"peft passes the factors of '.*out_proj' by"):
        vismt.import_peft(reader("vit"), tmp_path)


def test_sums_of_adapters(tmp_path) -> None:
    models = []
    for seed in (1, 2):
        model = reader("mixtral")
        vismt.adapt(model, "lora", ["experts.down_proj", "q_proj"], rank=2, seed=seed)
        models.append(shake(model, 0.1, seed))
    total = combine(models, [0.5, 0.5]).put_on(reader("mixtral"))
    layers = [model.model.layers[0].mlp.experts.down_proj for model in (*models, total)]
    assert all(isinstance(layer, LowRankLayer) for layer in layers)
    first, second, both = (layer.adapted_weight() - layer.weight for layer in layers)
    assert torch.allclose(both, (first + second) / 2, atol=1e-5)
    vismt.export_peft(total, tmp_path / "total")
    theirs = peft.PeftModel.from_pretrained(reader("mixtral"), str(tmp_path / "total")).eval()
    assert torch.allclose(out(theirs, "mixtral"), out(total, "mixtral"), atol=1e-5)
    with pytest.raises(UserError, match="adapts experts in one parameter, whose number the file does not hold"):
        combine([tmp_path / "total"], [0.5])
