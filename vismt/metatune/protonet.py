"""Cosine prototypes: p_c is the mean feature of class c, a query's logit is s * cos(f(x), p_c).

Snell et al., arXiv 1703.05175, with the cosine classifier of Hu et al. (P>M>F), arXiv 2204.07305, as AMT uses it. Features are
averaged without normalisation and normalised only inside the cosine. The additive bias of the released classifier shifts every
logit equally and is left out. Training on class labels takes a learned vector of each class in place of p_c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.lowrank.files.save_load import check_tensors
from vismt.metatune.features import features
from vismt.metatune.protocol.episodes import Episode

Augmentation = Callable[[Tensor, int], Tensor]


def prototypes(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean feature of each class.

    Args:
        features: Features, floating (s, d).
        labels: Integers (s,) in 0..N-1, every class present.

    Returns:
        (N, d) in the features' dtype. Half precision is averaged in float32, also under autocast.

    Raises:
        UserError: If a class has no feature, or shapes do not fit.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise UserError(
            f"prototypes: features {tuple(features.shape)}, labels {tuple(labels.shape)}: need (s, d) and (s,), s > 0."
        )
    if int(labels.min()) < 0:
        raise UserError(f"prototypes: label {int(labels.min())}: labels run from 0 to ways - 1.")
    wide = features if features.dtype == torch.float64 else features.float()
    members = F.one_hot(labels.long()).to(wide.dtype)
    counts = members.sum(0)
    if not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0])
        raise UserError(f"prototypes: no support image of class {missing} of {len(counts)}: every way needs one.")
    with torch.autocast(features.device.type, enabled=False):
        means = members.T @ wide / counts[:, None]
    return means.to(features.dtype)


def cosine_logits(features: Tensor, prototypes: Tensor, scale: float | Tensor = 10.0) -> Tensor:
    """Return scale * cos(feature, prototype), (M, N), of features (M, d) and prototypes (N, d).

    Norms below 1e-12 count as 1e-12, so that a zero feature has zero logits.
    """
    with torch.autocast(features.device.type, enabled=False):
        wide = features if features.dtype == torch.float64 else features.float()
        directions = F.normalize(prototypes.to(wide.dtype), dim=1, eps=1e-12)
        return scale * (F.normalize(wide, dim=1, eps=1e-12) @ directions.T)


class PrototypeClassifier(nn.Module):
    """Images (b, 3, h, w) in [0, 1] -> logits (b, N) against fixed prototypes."""

    prototypes: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module, prototypes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("prototypes", prototypes.detach().clone(), persistent=False)
        self.register_buffer("scale", scale.detach().clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return cosine_logits(features(self.backbone, images), self.prototypes, self.scale)


class ProtoNet(nn.Module):
    """A backbone, images (b, 3, h, w) in [0, 1] -> features (b, d), with a cosine prototype classifier on top.

    Queries never enter the prototypes, so the logits of a query do not depend on the other queries.

    scale: Parameter () that starts at 10 and is trained with the adapters, as by the authors. vectors: Parameter (C, d) that
    replaces the prototypes in training, or None. No run saves it.
    """

    vectors: nn.Parameter | None

    not_sharded = "few-shot training calls parts of the backbone on whole weights; take torchrun"

    def __init__(self, backbone: nn.Module, scale: float = 10.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.initial_scale = float(scale)
        reference = next(backbone.parameters(), None)
        device = reference.device if reference is not None else None
        self.scale = nn.Parameter(torch.empty((), device=device))
        self.register_parameter("vectors", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to its initial value."""
        nn.init.constant_(self.scale, self.initial_scale)

    def centres(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the prototypes of support features (s, d) and labels (s,), or the learned vectors."""
        return prototypes(features, labels) if self.vectors is None else self.vectors

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a run saves with the adapter."""
        return {"scale": self.scale}

    def load_own_tensors(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Copy the `own_tensors` of another net. what: Name of the source in errors."""
        check_tensors(what, {"scale": ()}, tensors)
        with torch.no_grad():
            self.scale.copy_(tensors["scale"])

    def forward(self, support_images: Tensor, support_labels: Tensor, query_images: Tensor) -> Tensor:
        """Return query logits (M, N) from (s, 3, h, w), (s,) and (M, 3, h, w). Gradients reach both image sets and the scale."""
        support, query = self.features(support_images, query_images)
        return cosine_logits(query, self.centres(support, support_labels), self.scale)

    def features(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Return the features (b, d) of each batch of images, from one pass, because a CPU multiplies few rows slowly."""
        return self.backbone(torch.cat(images)).split([len(part) for part in images])

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> PrototypeClassifier:
        """Return the query classifier of a task. It shares the backbone. Prototypes and scale are frozen copies."""
        with torch.no_grad():
            centres = prototypes(features(self.backbone, support_images), support_labels)
            task = PrototypeClassifier(self.backbone, centres, self.scale)
        task.training = self.training  # not .train(): the backbone is shared
        return task


class EpisodeObjective(nn.Module):
    """objective(batch) -> {"loss", "accuracy"} for a batch of `EpisodeBatches`.

    proto: Module that maps (support, support_labels, query) to query logits, such as `ProtoNet`.
    """

    def __init__(self, proto: nn.Module) -> None:
        super().__init__()
        self.proto = proto

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return two scalars of a batch: support (s, 3, h, w), support_labels (s,), query (m, 3, h, w), query_labels (m,)."""
        logits = self.proto(batch["support"], batch["support_labels"], batch["query"])
        labels = batch["query_labels"]
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits.float(), labels), "accuracy": accuracy}


class EpisodeBatches:
    """batches(k) -> the k-th training episode as image tensors.

    sources: Pair (pixels by index, episode by number) of each source set. A batch draws one set uniformly. augment: Function
    from (images, seed) to images. classes: Whether all images of an episode are queries, labelled by their class in the set.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[int], Episode]]],
        *,
        seed: int,
        augment: Augmentation | None,
        classes: bool = False,
    ) -> None:
        self.sources, self.seed, self.augment, self.classes = sources, seed, augment, classes

    def __call__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "source", number))
        pixels, sampler = self.sources[int(torch.randint(len(self.sources), (1,), generator=generator))]
        episode = sampler(number)
        images = pixels(torch.cat([episode.support, episode.query]))
        if self.augment is not None:
            images = self.augment(images, mix_seed(self.seed, "augment", number))
        first, last = episode.support_labels, episode.query_labels
        if self.classes:
            first, last = first[:0], episode.classes[torch.cat([first, last])]
        support, query = images.split([len(first), len(last)])
        return {
            "support": support,
            "support_labels": first,
            "query": query,
            "query_labels": last,
            "number": torch.tensor(number),
        }
