"""Test-time merging: the support set of a task weights the experts of a pool (AMT: Yang, Liu, Wei, NeurIPS 2024).

    zeta = rule(support)    (selection_rules.py),        W(zeta) = W_res + sum_i zeta_i B_i A_i    (pool.py)

A rule of `combine` in place of zeta merges the updates of the experts once, for all tasks.

A task has one zeta for all adapted weights. The prototypes are computed from the clean support under W(zeta). Queries are not
used. The released code scores augmented images (DiffAugment, two forward passes for each expert). The paper does not, and vismt
follows the paper. At one shot every C_i is 1. Trimming keeps the leading singular values of chosen *merged* weights, exactly. The
released code trims by a randomised SVD without a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismt.lowrank.model.targets import pattern_values
from vismt.lowrank.svd import principal
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import COMBINED, RULES, MergeSettings
from vismt.metatune.features import features
from vismt.metatune.functional import WithWeights
from vismt.metatune.protonet import PrototypeClassifier, cosine_logits, prototypes


class PoolNet(nn.Module):
    """A pool as a few-shot model: `classifier(support, labels)` computes the mixture once and freezes it."""

    def __init__(self, pool: ExpertPool, settings: MergeSettings) -> None:
        super().__init__()
        self.pool, self.settings = pool, settings
        if settings.strategy == "expert":
            pool.index(str(settings.expert))
        self._trims = pattern_values("merging.trim", settings.trim, pool.paths)
        self._kept: dict[tuple[float, ...] | None, dict[str, Tensor]] = {}  # weights that other tasks use too

    @torch.no_grad()
    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module:
        """Return the query classifier of a support of images (s, 3, h, w) in [0, 1] and labels (s,).

        Its attribute `mixture` (P,) is the zeta in use. The average of logits and the rules of `combine` have no mixture. The
        pool is not changed.
        """
        strategy, pool = self.settings.strategy, self.pool
        equal = pool.uniform()
        experts = torch.eye(len(pool)).to(equal)  # the mixtures of one expert alone
        if strategy == "logits":
            return LogitAverage([self._task(zeta, support_images, support_labels) for zeta in experts])
        if strategy in COMBINED:
            return self._task(None, support_images, support_labels)
        if strategy == "expert":
            zeta = experts[pool.index(str(self.settings.expert))]
        elif strategy == "average" or len(pool) == 1:
            zeta = equal
        else:
            cosines = self.cosines(support_images, support_labels)
            zeta = RULES[strategy](cosines, support_labels, pool.scale, self.settings)
        return self.task(zeta, support_images, support_labels)

    @torch.no_grad()
    def task(self, zeta: Tensor, support_images: Tensor, support_labels: Tensor) -> PrototypeClassifier:
        """Return the query classifier under a given mixture (P,), with the prototypes of the clean support."""
        task = self._task(zeta, support_images, support_labels)
        task.register_buffer("mixture", zeta, persistent=False)
        return task

    def weights(self, zeta: Tensor | None) -> dict[str, Tensor]:
        """Return the trimmed weights W(zeta) by parameter name. None takes the rule of `combine` in the settings."""
        if not self.lasting(zeta):
            return self._computed(zeta)
        key = None if zeta is None else tuple(zeta.tolist())
        if key not in self._kept:
            self._kept[key] = self._computed(zeta)
        return dict(self._kept[key])

    def lasting(self, zeta: Tensor | None) -> bool:
        """Return whether other tasks have the same weights: the weights of one expert, or weights that no task chooses."""
        return zeta is None or self.settings.strategy == "average" or int(zeta.count_nonzero()) == 1

    def _computed(self, zeta: Tensor | None) -> dict[str, Tensor]:
        single = [] if zeta is None else zeta.nonzero()[:, 0].tolist()
        if zeta is None:
            weights = self.pool.combined(self.settings.strategy)
        else:
            weights = dict(self.pool.expert_weights(single[0])) if len(single) == 1 else self.pool.weights(zeta)
        for path, share in self._trims.items():
            weights[f"vit.{path}.weight"] = trim(weights[f"vit.{path}.weight"], share)
        return weights

    def cosines(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cosines (P, s, N) between the features of a support and its class means, under each expert.

        images: Images (s, 3, h, w). labels: Labels (s,).
        """
        found = []
        for index in range(len(self.pool)):
            expert = WithWeights(self.pool.backbone, self.pool.expert_weights(index), lasting=True)
            own = features(expert, images)
            found.append(cosine_logits(own, prototypes(own, labels), 1.0))
        return torch.stack(found)

    def _apply(self, fn: object, recurse: bool = True) -> PoolNet:
        self._kept.clear()  # these are on the old device, in the old dtype
        return super()._apply(fn, recurse)

    def _task(self, zeta: Tensor | None, support: Tensor, labels: Tensor) -> PrototypeClassifier:
        backbone = WithWeights(self.pool.backbone, self.weights(zeta), lasting=self.lasting(zeta))
        centres = prototypes(features(backbone, support), labels)
        task = PrototypeClassifier(backbone, centres, torch.tensor(self.pool.scale).to(centres))
        task.training = self.training
        return task


class LogitAverage(nn.Module):
    """The mean of the logits of several classifiers. Merging is compared with this ensemble, which costs P times as much."""

    def __init__(self, classifiers: list[PrototypeClassifier]) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([classifier(images) for classifier in self.classifiers]).mean(0)


def trim(weight: Tensor, share: float) -> Tensor:
    """Return the best approximation of a weight, as a matrix (o, i), of rank int(min(o, i) * share), at least 1."""
    matrix = weight.flatten(1)
    rank = max(1, int(min(matrix.shape) * share))
    A, B = principal(matrix, rank, 1.0, generator=torch.Generator())
    return (B @ A).view(weight.shape).to(weight.dtype)
