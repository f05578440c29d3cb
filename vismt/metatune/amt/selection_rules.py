"""Rules that weight the experts of a pool for a task: from the labelled support to zeta (P,), zeta >= 0, sum zeta = 1.

f_i(x_s) (d,) is the feature of expert i, p_ik (d,) its mean over class k, c_isk = cos(f_i(x_s), p_ik). Classes weigh the same.

    paper       zeta = softmax(beta * score) over the top-k scores, 0 elsewhere (Yang, Liu, Wei, NeurIPS 2024),
                score_i = balance * C_i - (1 - balance) * V_i,    C_i = mean_k mean_{s: y_s = k} c_isk    compactness
                V_i = mean_k mean_{s: y_s = k} 1/(N-1) sum_{j != k} c_isj                               divergence
    min_ce      the expert with the least cross-entropy of its logits scale * c_is on the support
    robust_loo  the expert with the best accuracy of h_is = (cos(f_i(x_s'), p_ik^-s))_k, x_s' a PGD attack on x_s
    ridge       w = argmin ||sum_i w_i h_i - Y||^2 + strength ||w||^2 without attack, zeta = max(w, 0) / sum max(w, 0):
                stacking (Wolpert 1992; Breiman 1996) in closed form

In the first two the scored image is part of the mean of its class, as in paper and code. The paper's V lacks 1/(N-1),
without which the meaning of `balance` depends on N. The leave-one-out mean p^-s of the image's own class is without the
image. Where the class has no other image (one shot), the image itself, shifted cyclically by an eighth of its sides, stands
for the class: a mirror image would be another class where orientation matters.

robust_loo runs PGD-2 on the cross-entropy of h, linf, steps of epsilon / 2 from the image. Accuracies over a few support
images are often equal; then the largest mean / standard deviation of the margin h_y - max_{k != y} h_k decides, as an expert
with contracted features has small cosine margins without more errors (were margins normal, Phi(mean / deviation) would be
the accuracy). ridge centres h and the one-hot Y over classes, which no softmax sees, and scales h_i to length 1, so that an
expert's order does not depend on the size of its cosines. No rule uses the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, near
from vismt.config.typed import Checked, Names, within
from vismt.lowrank.cores import RULES as CORE_RULES
from vismt.metatune.amt.input_attack import PLAIN, pyramid_attack
from vismt.metatune.features import IMAGES, features
from vismt.metatune.protonet import cosine_logits, prototypes

RIDGE = 0.1  # strength, beside columns of length 1


class SupportTask:
    """A support set as the experts of a pool see it; features are computed on first use.

    Args:
        experts: P modules, images (b, 3, h, w) in [0, 1] -> features (b, d).
        images: the support (s, 3, h, w).
        labels: integers (s,) in 0..N-1, every class present.
        scored: images whose features are scored in place of the support's, where they differ.
        scale: of the cosines in logits.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        images: Tensor,
        labels: Tensor,
        *,
        scored: Tensor | None = None,
        scale: float = 10.0,
    ) -> None:
        self.experts, self.images, self.labels = experts, images, labels
        self.scored_images, self.scale = scored, scale

    def features(self, images: Tensor) -> Tensor:
        """Return the features (P, b, d) of images."""
        return torch.stack([features(expert, images) for expert in self.experts])

    @cached_property
    def clean(self) -> Tensor:
        """Features (P, s, d) of the support."""
        return self.features(self.images)

    @cached_property
    def scored(self) -> Tensor:
        """Features (P, s, d) that are scored."""
        return self.clean if self.scored_images is None else self.features(self.scored_images)

    @cached_property
    def means(self) -> Tensor:
        """Class means (P, N, d) of the support."""
        return torch.stack([prototypes(features, self.labels) for features in self.clean])

    @cached_property
    def own_means(self) -> Tensor:
        """Mean (P, s, d) of each image's class without the image."""
        alone = bool((self.labels.bincount() == 1).any())
        height, width = self.images.shape[-2:]
        shifted = self.features(self.images.roll((height // 8, width // 8), (-2, -1))) if alone else self.clean
        return leave_one_out(self.clean, self.means, self.labels, shifted)

    def cosines(self) -> Tensor:
        """Return cosines (P, s, N) between scored images and class means."""
        return torch.stack([cosine_logits(*pair, 1.0) for pair in zip(self.scored, self.means)])


def expert_scores(cosines: Tensor, labels: Tensor, balance: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Score the experts of a pool on a support set (equations in this file's header).

    Args:
        cosines: (P, S, N) between S support images and the N prototypes of each of P experts.
        labels: Integers (S,) in 0..N-1, N >= 2, every class present. Classes have equal weight whatever their shots.
        balance: Weight of compactness, in [0, 1].

    Returns:
        scores, compactness and divergence, each (P,), in fp32, or fp64 for fp64.

    Raises:
        UserError: Shapes or labels that do not fit.
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


def leave_one_out(features: Tensor, means: Tensor, labels: Tensor, stand_ins: Tensor) -> Tensor:
    """Return the mean (P, s, d) of each image's class without the image, of features (P, s, d) with class means (P, N, d).

    stand_ins (P, s, d): features that take the place of the class where it has no other image.
    """
    counts = labels.bincount()[labels][:, None]
    others = (counts * means[:, labels] - features) / (counts - 1).clamp_min(1)
    return torch.where(counts > 1, others, stand_ins)


def held_out_cosines(features: Tensor, means: Tensor, own: Tensor, labels: Tensor) -> Tensor:
    """Return cosines (s, N) of features (s, d) with class means (N, d), for the image's own class with `own` (s, d)."""
    to_own = (F.normalize(features.float(), dim=1) * F.normalize(own.float(), dim=1)).sum(1, keepdim=True)
    return torch.where(F.one_hot(labels.long(), len(means)).bool(), to_own, cosine_logits(features, means, 1.0))


def best_expert(logits: Tensor, labels: Tensor) -> int:
    """Return the index of the most accurate expert by logits (P, s, N); ties go by the margin, then to the first."""
    shares = _shares(labels)
    members = F.one_hot(labels.long(), logits.shape[2]).bool()
    own = logits[:, members]
    margins = own - logits.masked_fill(members, -torch.inf).amax(2)
    accuracy = ((margins > 0) * shares).sum(1)
    mean = (margins * shares).sum(1)
    deviation = ((margins - mean[:, None]).square() * shares).sum(1).sqrt()
    steadiness = mean / deviation.clamp_min(1e-12)
    return max(range(len(logits)), key=lambda index: (round(float(accuracy[index]), 6), float(steadiness[index])))


def ridge_weights(logits: Tensor, labels: Tensor, strength: float = RIDGE) -> Tensor:
    """Return zeta (P,) of the ridge regression of one-hot labels on logits (P, s, N); 1/P where no weight is positive."""
    root = _shares(labels).double().sqrt()[:, None]
    target = F.one_hot(labels.long(), logits.shape[2]).double()
    rows = [(part - part.mean(-1, keepdim=True)) * root for part in (*logits.double(), target)]
    *columns, truth = F.normalize(torch.stack(rows).flatten(1), dim=1)
    X = torch.stack(columns)
    eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
    positive = torch.linalg.solve(X @ X.T + strength * eye, X @ truth).clamp_min(0)
    total = positive.sum()
    return torch.where(total > 0, positive / total, 1 / len(X)).float()


def _shares(labels: Tensor) -> Tensor:
    """Return the weight of each image (s,), the same for every class, with sum 1."""
    counts = labels.bincount()
    return 1 / (len(counts) * counts[labels])


# ---- rules


def paper(task: SupportTask, settings: MergeSettings) -> Tensor:
    """Return zeta by compactness and divergence."""
    scores = expert_scores(task.cosines(), task.labels, settings.balance)[0]
    return mixture_weights(scores, settings.beta, settings.top_k)


def min_ce(task: SupportTask, settings: MergeSettings) -> Tensor:
    """Return the one-hot zeta of the expert with the least cross-entropy on the support."""
    losses = [F.cross_entropy(task.scale * by_expert, task.labels) for by_expert in task.cosines()]
    return _one_hot(int(torch.stack(losses).argmin()), task)


def robust_loo(task: SupportTask, settings: MergeSettings, *, epsilon: float = 4.5 / 255) -> Tensor:
    """Return the one-hot zeta of the expert with the best leave-one-out accuracy under PGD-2 of radius `epsilon`."""
    attacked = [_attacked_cosines(task, index, epsilon) for index in range(len(task.experts))]
    return _one_hot(best_expert(torch.stack(attacked), task.labels), task)


def ridge(task: SupportTask, settings: MergeSettings) -> Tensor:
    """Return the weights of a ridge regression on leave-one-out logits."""
    parts = zip(task.clean, task.means, task.own_means)
    return ridge_weights(torch.stack([held_out_cosines(*part, task.labels) for part in parts]), task.labels)


Rule = Callable[[SupportTask, "MergeSettings"], Tensor]
RULES: dict[str, Rule] = {"paper": paper, "min_ce": min_ce, "robust_loo": robust_loo, "ridge": ridge}
COMBINED = tuple(rule for rule in CORE_RULES if rule != "regmean")  # of `combine`, for all tasks; regmean needs inputs
STRATEGIES = (*RULES, "average", *COMBINED, "logits", "expert")
ALIASES = {"merge": "paper", "uniform": "average"}  # earlier names, which run folders have
SELECT = (*RULES, "average", "uniform", *COMBINED)  # strategies of the model "merged", as configurations name them


def _attacked_cosines(task: SupportTask, index: int, epsilon: float) -> Tensor:
    """Return the leave-one-out cosines (s, N) of the support under attack on one expert."""
    cosines = []
    for images, labels, own in zip(*(part.split(IMAGES) for part in (task.images, task.labels, task.own_means[index]))):

        def logits(changed: Tensor, labels: Tensor = labels, own: Tensor = own) -> Tensor:
            features = task.experts[index](changed)
            return task.scale * held_out_cosines(features, task.means[index], own, labels)

        attacked = pyramid_attack(
            logits,
            images,
            epsilon=epsilon,
            step_size=epsilon / 2,
            levels=PLAIN,
            init="zero",
            labels=labels,
        )
        cosines.append(logits(attacked))
    return torch.cat(cosines)


def _one_hot(index: int, task: SupportTask) -> Tensor:
    return F.one_hot(torch.tensor(index, device=task.images.device), len(task.experts)).float()


@dataclass(frozen=True)
class MergeSettings(Checked):
    """Settings of merging.

    Args:
        strategy: a rule of selection_rules.py (paper, min_ce, robust_loo, ridge), average, a rule of `combine` (core_ties,
            knots_ties, core_dare, tsv), logits (mean of the experts' logits) or expert (the one with the label `expert`).
        beta: sharpness of the mixture, at least 0.
        balance: weight of compactness in [0, 1] (the paper's lambda).
        top_k: number of experts that are kept.
        augment: whether augmented support images are scored.
        trim: {path pattern of adapted modules: share of the singular values kept, in (0, 1]}.
        expert: label of the expert of the strategy expert.
        seed: of the augmentation.
        shares: {label: weight} of the strategy average, with sum 1; {} for equal ones.
    """

    KEY: ClassVar = "merging"
    strategy: Annotated[str, Names(STRATEGIES)] = "paper"
    beta: Annotated[float, within(0)] = 1.0
    balance: Annotated[float, within(0, 1)] = 0.6
    top_k: Annotated[int, within(1)] = 2
    augment: bool = False
    trim: Mapping[str, Annotated[float, within(above=0, most=1)]] = field(default_factory=dict)
    expert: str | None = None
    seed: int = 0
    # Not in the repr, which older records hold.
    shares: Mapping[str, float] = field(default_factory=dict, repr=False, metadata={"hashed": "if set"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strategy", ALIASES.get(self.strategy, self.strategy))
        if self.strategy not in STRATEGIES:
            raise UserError(f"merging.strategy: '{self.strategy}'.{near(self.strategy, STRATEGIES)}")
        if self.shares and not abs(sum(self.shares.values()) - 1) < 1e-6:
            raise UserError(f"merging.shares: {dict(self.shares)} sum to {sum(self.shares.values()):g}; need 1.")
