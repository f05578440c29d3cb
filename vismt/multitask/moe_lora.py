"""MoEfied LoRA: plain LoRA in every block, and while training a router that weighs the experts of each FFN (moefied.py).

EMTAL, Zhong et al., NeurIPS 2024, arXiv 2501.06884. Paper and released code differ, and we take the code's form: one pair
(A, B) a linear (paper: one for each expert), updates in attention too, scale 1, A and B both from N(0, 0.02^2). With that
start, training does not begin at the pre-trained function; init="zero" starts B at zero and does, as far as the router
lets it. Trainable with rank r in L blocks of width D and hidden width 4 D: L (16 D r + D K).

Clustering orders the user's own FFN tensors by expert, in place, for as long as the model is adapted; merge, unadapt and
every file put the units back in stock order, bit for bit. The released code has no merge and leaves the weights permuted.
Left out: pairs for each expert, gated FFNs (a unit has two pre-activations there), models other than ViTs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.inject import attach, inject, refuse_adapted, site_generator
from vismt.lowrank.layer_spec import AdaptReport
from vismt.lowrank.memory import count_parameters
from vismt.lowrank.targets import Targets, find_targets, kind_of
from vismt.lowrank.wrappers import parts_of
from vismt.multitask.experts import cluster_model
from vismt.multitask.moefied import Fade, MoEfiedMlp, check_labels, checked_fade, starter
from vismt.registry import register_method

BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
ATTENTION = ("qkv", "q_proj", "k_proj", "v_proj", "proj")


@register_method("moe_lora")
def moe_lora(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    n_experts: int = 16,
    temperature: float = 5.0,
    init: str = "normal",
    cluster: bool | Sequence[Tensor] = True,
    fade: float | Fade = 0.0,
    **options: Any,
) -> AdaptReport:
    """LoRA at `targets` (None: qkv, proj, fc1, fc2 of all blocks) and a router in the FFN of every block.

    n_experts: K, a divisor of the hidden width. temperature: of the router's softmax. init: "normal" or "zero". cluster:
    True clusters the units of each FFN by their weights (minutes for a ViT-B, then cached), False takes them as they lie,
    a sequence gives the labels of each block, as `cluster_model` does. fade: start value, or the FadeState that all
    routers follow; `set_fade` changes it. Further options: those of `inject`.
    """
    refuse_adapted(model)
    start, fade = starter(init), checked_fade(fade)
    found = ffns(model)
    settings = {"n_experts": n_experts, "temperature": temperature}
    for path, mlp in found.items():
        MoEfiedMlp.check(path, mlp, settings)
    linears = [f"{path}.{name}" for path in found for name in ("fc1", "fc2")]
    find_targets(model, linears)  # their units are moved, so they have to be as plain as what is adapted
    labels = _labels(list(found.values()), cluster, n_experts, seed)
    if targets is None:
        attention = [path for path, module in model.named_modules() if kind_of(module) == "linear" and _projects(path)]
        targets = [*attention, *linears]
    report = inject(
        model, "moe_lora", start, offset=False, targets=targets, rank=rank, alpha=alpha, seed=seed, **options
    )
    parts = []
    for number, path in enumerate(found):
        own_seed = int(torch.randint(2**62, (), generator=site_generator(seed, path)))
        parts.append(MoEfiedMlp(model.get_submodule(path), None, n_experts, temperature, init, own_seed))
        attach(model, path, parts[-1])
        parts[-1].fade = fade
        if labels is not None:
            parts[-1].assign(labels[number])
    trainable, total = count_parameters(model)
    shapes = [tuple(part.lora_router.weight.shape) for part in parts]
    routers = [f"router in {len(shapes)} FFNs, {shapes[0][0]} x {shapes[0][1]}   {sum(k * d for k, d in shapes):,}"]
    return replace(report, trainable=trainable, total=total, beside=routers)


def ffns(model: nn.Module) -> dict[str, nn.Module]:
    """The two-layer Mlp of every block by path; UserError with the reason where a block has none."""
    from timm.layers import Mlp

    blocks = {path: module for path, module in model.named_modules() if BLOCK.fullmatch(path)}
    if not blocks:
        raise UserError(f"moe_lora: {type(model).__name__} has no blocks; it needs a timm ViT, whose FFNs it routes.")
    found: dict[str, nn.Module] = {}
    for prefix, block in blocks.items():
        own = {
            f"{prefix}.{path}": module
            for path, module in block.named_modules()
            if type(module).forward is Mlp.forward and not any(name.startswith("attn") for name in path.split("."))
        }
        if not own and isinstance(getattr(block, "mlp", None), nn.Module):
            MoEfiedMlp.check(f"{prefix}.mlp", block.mlp, {"n_experts": 1, "temperature": 1.0})
        if not own:
            raise UserError(
                f"moe_lora: '{prefix}' is a {type(block).__name__} without an FFN of its own (fc1, activation, fc2) to route."
            )
        found.update(own)
    return found


def set_fade(model: nn.Module, fade: float | Fade) -> None:
    """Let every router of a model stand at `fade` (0 routed, 1 faded), or follow it where it is a FadeState."""
    routed = [part for part in parts_of(model).values() if isinstance(part, MoEfiedMlp)]
    if not routed:
        raise UserError("set_fade: this model has no router; adapt it with 'moe_lora' first.")
    for part in routed:
        part.fade = fade


def routes(model: nn.Module) -> bool:
    """Whether a router of the model still weighs experts, so that no merged weights say the same."""
    return any(isinstance(part, MoEfiedMlp) and part.fade_value != 1 for part in parts_of(model).values())


def _projects(path: str) -> bool:
    """A projection of a block's attention, fused or not."""
    block = BLOCK.match(path)
    names = path[block.end() + 1 :].split(".") if block else []
    return len(names) > 1 and names[-2].startswith("attn") and names[-1] in ATTENTION


def _labels(
    mlps: list[nn.Module], cluster: bool | Sequence[Tensor], n_experts: int, seed: int
) -> Sequence[Tensor] | None:
    """Labels of each FFN; None where the units stay as they lie."""
    if not isinstance(cluster, bool):
        labels = list(cluster)
        if len(labels) != len(mlps) or not all(isinstance(label, Tensor) for label in labels):
            raise UserError(
                f"moe_lora: cluster holds {len(labels)} entries, needed labels (tensors) of {len(mlps)} FFNs."
            )
        for mlp, label in zip(mlps, labels):
            check_labels(label, len(mlp.fc1.weight), n_experts)
        return labels
    if not cluster or n_experts == 1 or mlps[0].fc1.weight.is_meta:
        return None
    holder = nn.Module()
    holder.blocks = mlps
    return cluster_model(holder, n_experts, seed)
