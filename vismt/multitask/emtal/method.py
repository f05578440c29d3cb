"""EMTAL's adapter, MoEfied LoRA: plain LoRA in every block, and while training a router that weighs experts of each FFN (ffn.py).

Zhong et al., NeurIPS 2024, arXiv 2501.06884. Paper and released code differ, and the form of the code is used. Each linear has
one pair (A, B). (The paper has one pair for each expert, which is `pairs: expert`, expert_pairs.py.) Attention has updates too,
the scale is 1, and A and B are both drawn from N(0, 0.02^2). With that start, training does not begin at the pre-trained
function. init="zero" starts B at zero, and then training does begin there, as far as the router lets it. The number of
trainable values with rank r in L blocks of width D and hidden width 4 D is L (16 D r + D K).

The released code orders the units of the FFN weights by expert and leaves them permuted. Here a unit keeps its place and has
the label of its expert. Left out: gated FFNs (a unit has two pre-activations there), models other than ViTs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.lowrank.layers.base import adapter_modules
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.stock_modules import kind_of
from vismt.lowrank.model.inject import InjectOptions, LayerChoice, attach, inject
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.starts import site_generator
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.methods import Method, register_method
from vismt.multitask.emtal.clusters import cluster_ffns, explained_variance, fc1_weight, random_neurons
from vismt.multitask.emtal.expert_pairs import ExpertPairs
from vismt.multitask.emtal.fading import RouterFade
from vismt.multitask.emtal.ffn import Fade, MoEfiedMlp, RouterSettings, check_unit_labels, checked_fade, starter

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
PERMUTATIONS = ("clusters", "random")
_PAIRS = ("shared", "expert")
# The projections of a block's attention, fused or not, wherever the block keeps it.
PROJECTION = re.compile(rf"{_BLOCK.pattern}\.(?:.*\.)?attn[^.]*\.(?:qkv|q_proj|k_proj|v_proj|proj)")


def emtal(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    n_experts: int = 16,
    temperature: float = 5.0,
    init: str = "normal",
    cluster: bool | Sequence[Tensor] = True,
    permute: str = "clusters",
    pairs: str = "shared",
    fade: float | Fade = 0.0,
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add LoRA at `targets` (None: qkv, proj, fc1, fc2 of all blocks) and a router in the FFN of every block.

    n_experts: Number K of experts, a divisor of the hidden width. temperature: Temperature of the router's softmax. init:
    "normal" or "zero". cluster: How units are assigned to experts. True clusters the units of each FFN by their weights
    (minutes for a ViT-B, then cached), False takes neighbours, and a sequence gives the labels of each block, as
    `cluster_model` returns them. permute: "random" draws the experts by the seed instead of clustering, the control that tells
    what the clusters add. pairs: "expert" gives each expert a pair of its own in fc1 and fc2, with as many parameters as the
    shared pair of `rank`. fade: Start value, or the FadeState that all routers follow. `set_fade` changes it. Further options
    are the options of `inject`.
    """
    refuse_adapted(model)
    start, fade = starter(init), checked_fade(fade)
    mlps = ffns(model)
    settings = RouterSettings(n_experts, temperature)
    for path, mlp in mlps.items():
        MoEfiedMlp.check(path, mlp, settings)
    linears = [f"{path}.{name}" for path in mlps for name in ("fc1", "fc2")]
    find_targets(model, linears)  # clusters need plain weights
    require_known("emtal: permute", [permute], PERMUTATIONS)
    require_known("emtal: pairs", [pairs], _PAIRS)
    if permute == "random" and cluster is not True:
        raise UserError("emtal: permute 'random' draws the experts; leave cluster out, or take permute: clusters.")
    labels = _labels(mlps, cluster, permute, n_experts, seed)
    shares = _explained([fc1_weight(mlp) for mlp in mlps.values()], labels, n_experts)
    if targets is None:
        attention = [path for path, module in model.named_modules() if kind_of(module) == "linear"]
        targets = [*filter(PROJECTION.fullmatch, attention), *linears]
    layer: LayerChoice = {}
    if pairs == "expert":
        layer = {"layer": ExpertPairs, "settings": {"n_experts": n_experts}}
    report = inject(model, "emtal", start, offset=False, targets=targets, seed=seed, **layer, **options)
    wrappers: dict[str, MoEfiedMlp] = {}
    for path in mlps:
        router_seed = int(torch.randint(2**62, (), generator=site_generator(seed, path)))
        wrappers[path] = MoEfiedMlp(model.get_submodule(path), None, n_experts, temperature, init, router_seed)
    attach(model, wrappers, dict.fromkeys(wrappers, settings))
    for number, wrapper in enumerate(wrappers.values()):
        wrapper.fade = fade
        if labels is not None:
            wrapper.assign(labels[number])
    shapes = [wrapper.lora_router.weight.shape for wrapper in wrappers.values()]
    trainable, total = count_parameters(model)
    routers = [f"router in {len(shapes)} FFNs, {shapes[0][0]} x {shapes[0][1]}   {sum(k * d for k, d in shapes):,}"]
    return replace(report, trainable=trainable, total=total, extras=[*routers, *shares])


def ffns(model: nn.Module) -> dict[str, nn.Module]:
    """Return the two-layer Mlp of every block by path. Raise UserError with the reason if a block has none."""
    from timm.layers import Mlp

    blocks = {path: module for path, module in model.named_modules() if _BLOCK.fullmatch(path)}
    if not blocks:
        raise UserError(f"emtal: {type(model).__name__} has no blocks; it needs a timm ViT, whose FFNs it routes.")
    mlps: dict[str, nn.Module] = {}
    for prefix, block in blocks.items():
        in_block = {
            f"{prefix}.{path}": module
            for path, module in block.named_modules()
            if type(module).forward is Mlp.forward and not any(name.startswith("attn") for name in path.split("."))
        }
        if not in_block and isinstance(getattr(block, "mlp", None), nn.Module):
            MoEfiedMlp.check(f"{prefix}.mlp", block.mlp, RouterSettings(1, 1.0))
        if not in_block:
            raise UserError(
                f"emtal: '{prefix}' is a {type(block).__name__} without an FFN (fc1, activation, fc2) to route."
            )
        mlps.update(in_block)
    return mlps


def set_fade(model: nn.Module, fade: float | Fade) -> None:
    """Set the fade of every router of a model: a number (0 routed, 1 faded), or a FadeState to follow.

    Raise UserError for a model without routers and for a number outside of [0, 1].
    """
    routed = [wrapper for wrapper in adapter_modules(model).values() if isinstance(wrapper, MoEfiedMlp)]
    if not routed:
        raise UserError("set_fade: this model has no router; adapt it with 'emtal' first.")
    for wrapper in routed:
        wrapper.fade = fade


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, settings: Any) -> RouterFade | None:
    """Return the fade that all routers of `model` follow from now on. None leaves them at their value.

    It is None without settings (a FadeConfig), and in a training of no steps.
    """
    if settings is None or not steps:
        return None
    fade = RouterFade(steps, settings.start, settings.end)
    set_fade(model, fade)
    return fade


def _explained(weights: Sequence[Tensor], labels: Sequence[Tensor] | None, n_experts: int) -> list[str]:
    if labels is None or weights[0].is_meta or not 1 < n_experts < len(weights[0]):
        return []
    shares = [100 * explained_variance(weight, own, n_experts) for weight, own in zip(weights, labels)]
    mean = sum(shares) / len(shares)
    return [
        f"experts explain {mean:.1f} % of the variance within random groups ({min(shares):.1f} to {max(shares):.1f})"
    ]


def _labels(
    mlps: Mapping[str, nn.Module], cluster: bool | Sequence[Tensor], permute: str, n_experts: int, seed: int
) -> Sequence[Tensor] | None:
    weights = [fc1_weight(mlp) for mlp in mlps.values()]
    if permute == "random":
        seeds = [int(torch.randint(2**62, (), generator=site_generator(seed, f"{path}.permute"))) for path in mlps]
        return [random_neurons(len(weight), n_experts, own) for weight, own in zip(weights, seeds)]
    if not isinstance(cluster, bool):
        labels = list(cluster) if isinstance(cluster, Iterable) else []
        if len(labels) != len(mlps) or not all(isinstance(label, Tensor) for label in labels):
            seen = f"{len(labels)} entries ({type(cluster).__name__})"
            raise UserError(f"emtal: cluster holds {seen}, needed labels (tensors) of {len(mlps)} FFNs.")
        for weight, label in zip(weights, labels):
            check_unit_labels(label, len(weight), n_experts)
        return labels
    if not cluster or n_experts == 1 or weights[0].is_meta:
        return None
    return cluster_ffns(list(mlps.values()), n_experts, seed)


register_method(
    Method("emtal", emtal, layers=(LowRankLayer, ExpertPairs, MoEfiedMlp), schedule=schedule, section="fade")
)
