"""Several few-shot tasks as one classifier: each image is classified by the task that its row belongs to.

    logits of row q = s_t cos(f(x_q), p_t),    t the task of q

Attacks leave a few surviving queries in each task; packed, they fill the batches of the backbone that the tasks share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.metatune.functional import Functional
from vismt.metatune.protonet import PrototypeClassifier


class PackedClassifier(nn.Module):
    """The classifiers of tasks with equal `pack_key`; counts: the number of query images of each.

    `rows_of(images, rows)` classifies images (b, 3, h, w), where rows (b,) are positions in the concatenated queries.
    """

    def __init__(self, tasks: Sequence[PrototypeClassifier], counts: Sequence[int]) -> None:
        super().__init__()
        self.backbone = tasks[0].backbone
        prototypes = torch.stack([task.prototypes for task in tasks]).float()
        self.register_buffer("directions", F.normalize(prototypes, dim=2, eps=1e-12), persistent=False)
        self.register_buffer("scales", torch.stack([task.scale.float() for task in tasks]), persistent=False)
        owner = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))
        self.register_buffer("owner", owner.to(prototypes.device), persistent=False)
        self.training = tasks[0].training

    def rows_of(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return logits (b, k) of each image under the task of its row."""
        features = F.normalize(self.backbone(images).float(), dim=1, eps=1e-12)
        task = self.owner[rows]
        return self.scales[task, None] * torch.einsum("bd,bkd->bk", features, self.directions[task])


def pack_key(classifier: nn.Module) -> Hashable | None:
    """Return a key that is equal for classifiers that can be packed; None for one that cannot be.

    They have the same number of prototypes, and the same backbone with the same weights.
    """
    if type(classifier) is not PrototypeClassifier:
        return None
    backbone = classifier.backbone
    weights: tuple[tuple[str, int], ...] = ()
    if isinstance(backbone, Functional):
        weights = tuple((name, weight.data_ptr()) for name, weight in backbone.weights.items())
        backbone = backbone.module
    return id(backbone), weights, tuple(classifier.prototypes.shape)
