"""Rules that weight the experts of a pool for a task: from the labelled support to zeta (P,), zeta >= 0, sum zeta = 1.

f_i(x_s) (d,) is the feature of expert i, p_ik (d,) its mean over class k, c_isk = cos(f_i(x_s), p_ik). Classes weigh the same.

    paper       zeta = softmax(beta * score) over the top-k scores, 0 elsewhere (Yang, Liu, Wei, NeurIPS 2024),
                score_i = balance * C_i - (1 - balance) * V_i,    C_i = mean_k mean_{s: y_s = k} c_isk    compactness
                V_i = mean_k mean_{s: y_s = k} 1/(N-1) sum_{j != k} c_isj                               divergence
    min_ce      the expert with the least cross-entropy of its logits scale * c_is on the support

The scored image is part of the mean of its class, as in paper and code. The paper's V lacks 1/(N-1), without which the meaning
of `balance` depends on N. No rule uses the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.registry import Registry
from vismt.config.typed import Checked, Names, within
from vismt.lowrank.cores import CORE_RULES

# cosines (P, s, N) of the experts on a support, its labels (s,), scale of the cosines in logits, settings -> zeta (P,)
Rule = Callable[[Tensor, Tensor, float, "MergeSettings"], Tensor]
RULES: Registry[Rule] = Registry("merging.strategy: no rule")
# Rules of `combine`, one merge for all tasks. regmean needs inputs.
COMBINED = tuple(rule for rule in CORE_RULES if rule != "regmean")


def merging_rules() -> tuple[str, ...]:
    """Return the strategies of the model "merged", as configurations name them."""
    return (*RULES, "average", *COMBINED)


def strategies() -> tuple[str, ...]:
    """Return the names of `MergeSettings.strategy`."""
    return (*merging_rules(), "logits", "expert")


def expert_scores(cosines: Tensor, labels: Tensor, balance: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Score the experts of a pool on a support set (equations in this file's header).

    Args:
        cosines: Cosines (P, S, N) between S support images and the N prototypes of each of P experts.
        labels: Integers (S,) in 0..N-1, N >= 2, every class present. All classes have the same weight.
        balance: Weight of compactness, in [0, 1].

    Returns:
        Scores, compactness and divergence, each (P,), in fp32, or in fp64 for cosines in fp64.

    Raises:
        UserError: If shapes or labels do not fit.
    """
    if cosines.ndim != 3 or labels.shape != cosines.shape[1:2] or cosines.shape[2] < 2:
        shapes = f"cosines {tuple(cosines.shape)}, labels {tuple(labels.shape)}"
        raise UserError(f"expert scores: {shapes}: need (P, S, N) with N > 1 and (S,).")
    wide = cosines if cosines.dtype == torch.float64 else cosines.float()
    ways = wide.shape[2]
    if not 0 <= int(labels.min()) <= int(labels.max()) < ways:
        raise UserError(f"expert scores: labels run to {int(labels.max())} for {ways} prototypes.")
    members = F.one_hot(labels.long(), ways).to(wide)
    counts = members.sum(0)
    if not bool(counts.all()):
        raise UserError(f"expert scores: no support image of class {int((counts == 0).nonzero()[0])} of {ways}.")
    share = members / counts / ways  # (S, N): an image's weight, in its class's column
    compactness = (wide * share).sum((1, 2))
    others = (wide.sum(2) * share.sum(1)).sum(1) - compactness
    divergence = others / (ways - 1)
    return balance * compactness - (1 - balance) * divergence, compactness, divergence


def mixture_weights(scores: Tensor, beta: float = 1.0, top_k: int = 2) -> Tensor:
    """Return zeta (P,): softmax(beta * score) over the `top_k` highest of scores (P,), zero elsewhere.

    Among equal scores the first are kept.
    """
    if scores.ndim != 1 or top_k < 1 or not len(scores):
        raise UserError(f"mixture: scores {tuple(scores.shape)}, top_k {top_k}: need (P,) with P > 0 and top_k >= 1.")
    kept = torch.sort(scores, descending=True, stable=True).indices[:top_k]
    zeta = torch.zeros_like(scores)
    zeta[kept] = torch.softmax(beta * scores[kept], 0)
    return zeta


@RULES.register("paper")
def paper(cosines: Tensor, labels: Tensor, scale: float, settings: MergeSettings) -> Tensor:
    """Return zeta by compactness and divergence."""
    return mixture_weights(expert_scores(cosines, labels, settings.balance)[0], settings.beta, settings.top_k)


@RULES.register("min_ce")
def min_ce(cosines: Tensor, labels: Tensor, scale: float, settings: MergeSettings) -> Tensor:
    """Return the one-hot zeta of the expert with the least cross-entropy on the support."""
    losses = torch.stack([F.cross_entropy(scale * by_expert, labels) for by_expert in cosines])
    return F.one_hot(losses.argmin(), len(losses)).float()


@dataclass(frozen=True)
class MergeSettings(Checked):
    """Settings of merging.

    Args:
        strategy: a rule of RULES (paper, min_ce, or your own), average, a rule of `combine` (core_ties, knots_ties, core_dare,
            tsv), logits (mean of the experts' logits) or expert (the expert with the label `expert`).
        beta: sharpness of the mixture, at least 0.
        balance: weight of compactness in [0, 1] (the paper's lambda).
        top_k: number of experts that are kept.
        trim: {path pattern of adapted modules: share of the singular values kept, in (0, 1]}.
        expert: label of the expert of the strategy expert.
    """

    KEY: ClassVar = "merging"
    strategy: Annotated[str, Names("vismt.metatune.amt.selection_rules:strategies", only=True)] = "paper"
    beta: Annotated[float, within(0)] = 1.0
    balance: Annotated[float, within(0, 1)] = 0.6
    top_k: Annotated[int, within(1)] = 2
    trim: Mapping[str, Annotated[float, within(above=0, most=1)]] = field(default_factory=dict)
    expert: str | None = None
