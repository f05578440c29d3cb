"""Fused projections: classes with a known order of q, k and v, classes with another order, and classes that never call them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from helpers.language_models import outputs, random_lm
from helpers.tiny import shake, tiny_vit
from timm.layers.diff_attention import DiffAttention
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.maxxvit import AttentionCl
from timm.models.swin_transformer_v2 import WindowAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import UnitSelection, select_units
from vismt.llm.s2ft.structures import structures
from vismt.lowrank.layers.base import adapter_layers

HEADS = {"num_attention_heads": 8}


def lm(kind: str, **changes: object) -> nn.Module:
    return shake(random_lm(kind, **{**HEADS, **changes}), 0.2)


def bigcode(multi_query: bool) -> nn.Module:
    return lm("gpt_bigcode", multi_query=multi_query, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def beit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return shake(timm.create_model("beit_base_patch16_224", **shape, **options).eval())


def eva() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return shake(timm.create_model("eva_giant_patch14_224", **shape).eval())


STACKED: dict[str, Callable[[], nn.Module]] = {
    "bigcode-mqa": lambda: bigcode(True),
    "gpt2": lambda: lm("gpt2"),
    "phi3": lambda: lm("phi3", pad_token_id=0),
    "vit": lambda: shake(tiny_vit()),
    "beit-separate": lambda: separate(beit()),
}
OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "bigcode-mha": lambda: bigcode(False),
    "neox": lambda: lm("gpt_neox"),
    "bloom": lambda: lm("bloom", hidden_dropout=0.0, attention_dropout=0.0),
    "falcon": lambda: lm("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon-mqa": lambda: lm("falcon", multi_query=True, alibi=False),
    "codegen": lambda: lm("codegen", rotary_dim=2),
    "mpt": lambda: lm("mpt", n_heads=8, d_model=32),
    "persimmon": lambda: lm("persimmon"),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "tiny-vit": lambda: TinyVitAttention(32, 8, num_heads=4, attn_ratio=1, resolution=(2, 2)),
    "efficientformer": lambda: EfficientFormerAttention(32, 8, 4, attn_ratio=4, resolution=2),
    "maxvit": lambda: AttentionCl(32, dim_head=8, head_first=True),
    "gcvit": lambda: WindowAttentionGlobal(32, 4, (2, 2), use_global=True),
}


def separate(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


@torch.no_grad()
def silenced(make: Callable[[], nn.Module], path: str, part: str, units: list[int]) -> Tensor:
    """Outputs where the rows of v or the columns of o of some units are zero."""
    model = make()
    block = structures(model)[path].parts[part]
    module = model.get_submodule(block.path)
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
    weight.index_fill_(block.dim, block.features(units), 0.0)
    if part == "v":
        for bias in (getattr(module, "bias", None), getattr(model.get_submodule(path), "v_bias", None)):
            if bias is not None:
                bias.index_fill_(0, block.features(units) - (block.start if bias.numel() < block.start else 0), 0.0)
    return outputs(model)


@pytest.mark.parametrize("name", STACKED)
def test_without_the_values_of_a_group_its_heads_say_nothing(name: str) -> None:
    """Zero rows of v and zero columns of o of the heads that read them are the same function, in the right layout alone."""
    make = STACKED[name]
    path, structure = next(
        (path, structure) for path, structure in structures(make()).items() if "o" in structure.parts
    )
    groups = structure.parts["v"].units
    size, group = structure.parts["o"].units // groups, groups - 1
    without_v = silenced(make, path, "v", [group])
    without_o = silenced(make, path, "o", list(range(group * size, (group + 1) * size)))
    assert torch.allclose(without_v, without_o, atol=1e-5) and not torch.allclose(without_v, outputs(make()), atol=1e-3)


@pytest.mark.parametrize("name", OTHERWISE)
def test_rows_of_another_order_are_never_taken(name: str) -> None:
    """Such a model offers no values, and what it offers starts as the model."""
    model = OTHERWISE[name]()
    by_path = structures(model)
    assert not any("v" in structure.parts for structure in by_path.values())
    units = {path: {"o": (2, 5)} for path, structure in by_path.items() if "o" in structure.parts}
    assert bool(units) == (name == "bigcode-mha")
    expected, reason = outputs(model), r"'c_attn' is not known for a GPTBigCodeAttention"
    if units:
        with pytest.raises(UserError, match=rf"nothing known to take part 'v' from: .*{reason}"):
            select_units(model, parts="v")
        with pytest.raises(UserError, match=rf"has no part 'v': .*{reason}"):
            vismt.adapt(model, "s2ft", selection=UnitSelection({"transformer.h.0.attn": {"v": (1,)}}))
        vismt.adapt(model, "s2ft", selection=UnitSelection(units))
    channels = {path: {"d": (1, 7)} for path, structure in by_path.items() if "d" in structure.parts}
    if channels and not units:
        vismt.adapt(model, "s2ft", selection=UnitSelection(channels))
    assert torch.allclose(outputs(model), expected, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", MODULES)
def test_heads_first_and_missing_queries_leave_the_columns_of_o_alone(name: str) -> None:
    module = MODULES[name]()
    (structure,) = [structure for structure in structures(module).values() if "o" in structure.parts]
    assert (structure.parts["o"].units, set(structure.parts), structure.parts["o"].path) == (4, {"o"}, "proj")
    assert "'qkv' is not known for a" in structure.without_v


def test_known_by_the_class_that_computes() -> None:
    """A subclass with another forward may read the rows differently; cross-attention has no queries in c_attn."""

    class Own(AttentionCl):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)[..., :32])

    inherits = type("Inherits", (AttentionCl,), {})
    assert set(structures(inherits(32, dim_head=8, head_first=False))[""].parts) == {"v", "o"}
    assert set(structures(Own(32, dim_head=8, head_first=False))[""].parts) == {"o"}
    model = lm("gpt2", add_cross_attention=True)
    assert set(structures(model)["transformer.h.0.crossattention"].parts) == {"o"}
    assert structures(DiffAttention(32, num_heads=4)) == {}


@pytest.mark.parametrize("make", [beit, eva], ids=["beit", "eva"])
def test_a_weight_that_is_read_without_a_call_is_refused(make: Callable[[], nn.Module]) -> None:
    """The owner applies the weight with other biases, so that an update in the linear's place would do nothing."""
    reason = r"'blocks\.0\.attn' adds q_bias itself .* set its qkv_bias_separate to True"
    for targets in (["attn.qkv"], [r"blocks.0.attn.qkv"]):
        with pytest.raises(UserError, match=rf"adapt\.targets: 'blocks\.0\.attn\.qkv' is never called: {reason}"):
            vismt.adapt(make(), "lora", targets=targets, rank=2)
    report = vismt.adapt(make(), "lora", rank=2)
    assert "is never called" in str(report) and not any(spec.path.endswith("qkv") for spec in report.specs)
    with pytest.raises(UserError, match=rf"nothing known to take part 'v' from: {reason}"):
        vismt.adapt(make(), "s2ft", parts=("v",), ratio=0.25)
    assert all("v" not in structure.parts for structure in structures(make()).values())
    model = separate(make())
    expected = outputs(make())
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    vismt.adapt(model, "s2ft", parts=("v",), ratio=0.25)
    outputs(model).square().sum().backward()
    grads = [layer.slice_values.grad for layer in adapter_layers(model).values()]
    assert len(grads) == 2 and all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_swin_v2_is_refused_and_unbiased_attention_is_not() -> None:
    swin = nn.Sequential(WindowAttention(32, (2, 2), 4))
    with pytest.raises(UserError, match=r"'0\.qkv' is never called: '0' adds q_bias itself"):
        vismt.adapt(swin, "lora", targets=["qkv"], rank=2)
    plain = beit(qkv_bias=False)
    vismt.adapt(plain, "lora", targets=["attn.qkv"], rank=2)
    outputs(plain).square().sum().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in adapter_layers(plain).values())
