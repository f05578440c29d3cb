"""Checkpointed, recomputed and compiled blocks train as plain ones do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.amt_parts import adapted, episode
from helpers.language_models import random_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import vismt
from scripts.bench.accounting import kept_bytes
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import blocks, loop, runtime
from vismt.engine.blocks import find_blocks, running_blocks
from vismt.metatune.amt.method import AdversarialObjective, Adversary
from vismt.metatune.maml import LinearLearner, MamlObjective, MamlSettings

SAVING = {"recompute": {"recompute": "cheap"}, "checkpointing": {"checkpointing": True}}
SAVING["both"] = {**SAVING["recompute"], **SAVING["checkpointing"]}


class Gated(nn.Module):
    """A gated language model: gates hold during the forward pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = random_lm("llama")
        vismt.adapt(self.lm, "ilora", rank=2, n_experts=2, gate=None)
        shake(self.lm)

    def forward(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        with vismt.llm.instance_gates(torch.rand(2, 2, generator=generator)):
            return {"loss": self.lm(input_ids=tokens(seed=number), labels=tokens(seed=number), use_cache=False).loss}


class Dropping(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.vit = tiny_vit(**options)
        vismt.adapt(self.vit, "lora", rank=2, also_train=["head"])
        shake(self.vit)

    def forward(self, number: int) -> dict[str, Tensor]:
        return {"loss": self.vit(images(seed=number)).square().mean()}


def amt() -> AdversarialObjective:
    """The weight attack replaces the factors for one pass, after which the module has its own again."""
    return AdversarialObjective(adapted(), Adversary(gamma=0.5, steps=2))


def maml() -> MamlObjective:
    torch.manual_seed(0)
    backbone = Backbone(tiny_vit(num_classes=0))
    vismt.adapt(backbone.vit, "lora", rank=2)
    shake(backbone)
    settings = MamlSettings(algorithm="maml", inner_lr=0.5, inner_steps=2)
    return MamlObjective(LinearLearner(backbone, 3), settings)


OBJECTIVES = {
    "dropout": (lambda: Dropping(proj_drop_rate=0.5), lambda number: number),
    "gates": (Gated, lambda number: number),
    "weight attack": (amt, episode),
    "second order": (maml, episode),
}


def trained(folder: Path, name: str, **options: object) -> dict[str, Tensor]:
    make, batches = OBJECTIVES[name]
    objective = make()
    config = TrainConfig(steps=2, lr=1e-2, accumulate=2, log_every=1, **options)
    loop.train(objective, batches, config, folder, "hash", runtime.accelerator(config.precision), seed=3)
    parts = list(objective.modules())[1:]  # accelerate replaces the objective's own forward under bf16
    assert not any("forward" in module.__dict__ or module._compiled_call_impl for module in parts)
    return {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_parameters_bit_for_bit(tmp_path: Path, name: str) -> None:
    plain = trained(tmp_path / "plain", name)
    for saving, options in SAVING.items():
        saved = trained(tmp_path / saving, name, **options)
        assert plain and all(torch.equal(value, saved[key]) for key, value in plain.items()), saving


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    model = Dropping(depth=6)
    plain = kept_bytes(lambda: model(0)["loss"])
    with running_blocks(model, TrainConfig(checkpointing=True)):
        assert kept_bytes(lambda: model(0)["loss"]) < plain / 3
    assert kept_bytes(lambda: model(0)["loss"]) == plain


class Operations(TorchDispatchMode):
    """Lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of a CPU")
def test_short_attention_in_bf16_is_computed_by_its_products() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    long = torch.randn(1, 1, blocks.SHORT + 1, 8, requires_grad=True)

    def fused(*parts: Tensor, **options: object) -> tuple[bool, Tensor]:
        with torch.autocast("cpu", torch.bfloat16), Operations() as seen:
            out = scaled_dot_product_attention(*parts, **options)
        return any("attention" in name for name in seen.names), out

    everywhere, expected = fused(q, k, v)
    with running_blocks(nn.Linear(2, 2), TrainConfig(precision="bf16")):
        by_kernel, out = fused(q, k, v)
        assert everywhere and not by_kernel and out.dtype == expected.dtype == torch.bfloat16
        assert fused(long, long, long)[0] and fused(q, k, v, is_causal=True)[0]
        assert fused(q, k, v, attn_mask=torch.zeros(5, 5), dropout_p=0.0)[0]
        with torch.no_grad():
            assert fused(q, k, v)[0]
    with running_blocks(nn.Linear(2, 2), TrainConfig()):
        assert fused(q, k, v)[0]
    gradients = [torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, expected)]
    for found, known in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(found, known, atol=4 * torch.finfo(torch.bfloat16).eps, rtol=0.05)


def test_checkpointed_blocks_in_bf16_train_as_plain_ones(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", "weight attack", precision="bf16")
    saved = trained(tmp_path / "saved", "weight attack", precision="bf16", **SAVING["both"])
    assert all(torch.equal(value, saved[key]) for key, value in plain.items())


@pytest.mark.slow
def test_compiled_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager")
    for name in ("weight attack", "gates"):
        plain = trained(tmp_path / f"{name} plain", name)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = trained(tmp_path / f"{name} compiled", name, compile=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
        for key, value in plain.items():
            torch.testing.assert_close(value, compiled[key], atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_blocks_without_the_private_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._functorch.config", None)
    with blocks._kept_buffers() as setting:
        assert setting is None


def test_blocks_of_two_nets_and_not_those_of_heads() -> None:
    net = nn.ModuleDict(
        {"a": tiny_vit(), "b": tiny_vit(), "heads": nn.ModuleList([nn.Linear(32, 3), nn.Linear(32, 3)])}
    )
    assert find_blocks(net) == [*net["a"].blocks, *net["b"].blocks]


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"leave out train\.checkpointing"):
        TrainConfig(compile=True, checkpointing=True)
    with pytest.raises(UserError, match=r"leave out train\.recompute"):
        TrainConfig(compile=True, recompute="cheap")
    model = tiny_vit()
    with (
        pytest.raises(UserError, match="no list of equal blocks"),
        running_blocks(nn.Linear(2, 2), TrainConfig(checkpointing=True)),
    ):
        pass
    if not torch.cuda.is_available():
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(UserError, match=r"C\+\+ compiler"), running_blocks(model, TrainConfig(compile=True)):
            pass
    vismt.adapt(model, "lisa")
    with pytest.raises(UserError, match="freezes parameters in turn"), running_blocks(model, TrainConfig(compile=True)):
        pass
