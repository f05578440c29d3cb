"""LoRA on tiny random models that timm did not make: start, gradient, merge, undo, and reasons for what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.lowrank.model.record import AdaptReport

transformers = pytest.importorskip("transformers")

LM: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Experts in one parameter, (e, o, i) or (e, i, o), are named to be adapted.
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SSM = {"state_size": 4, "time_step_rank": 2, "conv_kernel": 3, "expand": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "olmo2": {},
    "mixtral": MOE,
    "qwen3_moe": {**MOE, "head_dim": 8},
    "gpt_oss": {**MOE, "head_dim": 8},
    "deepseek_v3": {
        **MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "mamba": SSM,
}
# Models whose weights of experts are named in a remark, and the modules that are left out of others.
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
LEFT_OUT = {"mamba": "x_proj' is read by the fused scan of a MambaMixer"}
TORCHVISION = {
    "vit_b_16": {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
}
ENCODERS = {"bert": {}, "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}}


def causal(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**LM, **CAUSAL[kind]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def other(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in TORCHVISION:
        model = pytest.importorskip("torchvision").models.VisionTransformer(**TORCHVISION[kind], num_classes=3)
        nn.init.normal_(model.heads.head.weight)  # zeros hide what comes before
        return model.eval()
    given = {**LM, **ENCODERS[kind]} if kind == "bert" else {"vocab_size": 48, **ENCODERS[kind]}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **given)).eval()


def run(model: nn.Module, kind: str) -> Tensor:
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(1))
    if kind in CAUSAL:
        return model(input_ids=ids).logits
    if kind == "t5":
        return model(input_ids=ids, decoder_input_ids=ids[:, :3]).last_hidden_state
    if kind == "bert":
        return model(input_ids=ids).pooler_output
    side = TORCHVISION[kind]["image_size"]
    return model(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))


def build(kind: str) -> nn.Module:
    return causal(kind) if kind in CAUSAL else other(kind)


# What is named beside a run on all linears.
NAMED = {kind: ["experts.gate_up_proj", "experts.down_proj"] for kind in EXPERTS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CAUSAL, *TORCHVISION, *ENCODERS])
def test_lora_on_every_layout(kind: str, tmp_path) -> None:
    report = check_layout(kind, None, tmp_path)
    assert any("three dimensions" in text for text in report.skipped) == (kind in EXPERTS)
    if kind in LEFT_OUT:
        assert any(LEFT_OUT[kind] in text for text in report.skipped)
    if kind in TORCHVISION:
        assert {"in_proj_weight", "out_proj"} <= {spec.path.rpartition(".")[2] for spec in report.specs}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_lora_on_experts(kind: str, tmp_path) -> None:
    report = check_layout(kind, NAMED[kind], tmp_path)
    assert {spec.kind for spec in report.specs} == {"parameter"} and not report.skipped


def check_layout(kind: str, targets: Any, folder: Path) -> AdaptReport:
    """Adapt, train one step, save, load, merge and undo; return the report."""
    model, expected = build(kind), run(build(kind), kind)
    report = vismt.adapt(model, "lora", targets, rank=2)
    assert report.specs and torch.allclose(run(model, kind), expected, atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    run(model, kind).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=1e-3).step()
    moved = run(model, kind)
    assert not torch.equal(moved, expected)
    vismt.save_adapter(model, folder)
    assert torch.equal(run(vismt.load_adapter(build(kind), folder), kind), moved)
    fresh = build(kind).state_dict()
    vismt.merge(model)
    assert (run(model, kind) - moved).abs().max() <= 1e-4 * moved.abs().max()
    assert list(model.state_dict()) == list(fresh)
    again = build(kind)
    vismt.adapt(again, "lora", targets, rank=2)
    vismt.unadapt(again)
    assert all(torch.equal(value, fresh[name]) for name, value in again.state_dict().items())
    return report


def test_what_the_scan_of_mamba_reads_is_refused_by_name() -> None:
    model = causal("mamba")
    report = vismt.adapt(model, "lora", rank=2)
    assert {spec.path.split(".")[-1] for spec in report.specs} == {"in_proj"}
    for name in ("x_proj", "dt_proj", "out_proj", "conv1d"):
        with pytest.raises(UserError, match=rf"mixer\.{name}' is read by the fused scan of a MambaMixer on a GPU"):
            vismt.adapt(causal("mamba"), "lora", [name], rank=1)


def test_experts_in_one_parameter_are_remarked() -> None:
    report = vismt.adapt(causal("mixtral"), "lora", rank=2)
    remark = next(text for text in report.skipped if "dimensions" in text)
    assert (
        "experts" in remark and "and 3 more: experts in one parameter of three dimensions, which stays frozen" in remark
    )
    assert remark.endswith("name them in targets: ['experts.gate_up_proj', 'experts.down_proj']")
    report = vismt.adapt(causal("mixtral"), "lora", ["q_proj", "experts.gate_up_proj", "experts.down_proj"], rank=2)
    assert len(report.specs) == 6 and not report.skipped
    for targets in (r".*_proj", ["q_proj"]):
        report = vismt.adapt(causal("mixtral"), "lora", targets, rank=2)
        assert {spec.kind for spec in report.specs} == {"linear"}
        assert any("name them in targets" in text for text in report.skipped) == (targets == r".*_proj")
    report = vismt.adapt(causal("mixtral"), "peft:ia3", r".*_proj")
    assert len(report.specs) == 8 and "stays frozen" in report.skipped[0] and "name them" not in report.skipped[0]
    assert not vismt.adapt(causal("mixtral"), "lora", r".*_proj", exclude=["experts.gate_up_proj", "down_proj"]).skipped


def test_the_reasons_are_listed_where_nothing_can_be_adapted() -> None:
    class Gained(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # as in training alone, which one probe would not see
            return (1 + self.training) * super().forward(x)

    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "a": Gained(4, 4), "b": Gained(4, 4)})
    with pytest.raises(UserError) as error:
        vismt.adapt(model, "lora", dropout=0.1)
    text = str(error.value)
    assert "nothing to adapt for 'all-linear'. Left out: 'a' is a Gained with another forward" in text
    assert (
        "(1 more); 'mha.in_proj_weight' lies inside nn.MultiheadAttention" in text
        and text.count("another forward") == 1
    )
