"""Clean episodic meta-tuning: cross-entropy of the query set against prototypes of the support set.

Snell et al., 2017, with the cosine classifier and trained scale of P>M>F (Hu et al., CVPR 2022). Batch k is a function of
(seed, k): a source set, an episode of it, its augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.seeds import mix_seed
from vismt.metatune.protocol.labelled import Episode

Augmentation = Callable[[Tensor, int], Tensor]


class EpisodeObjective(nn.Module):
    """objective(batch) -> {"loss", "accuracy"} for a batch of `EpisodeBatches`.

    proto: (support, support_labels, query) -> query logits, as `ProtoNet`.
    """

    def __init__(self, proto: nn.Module) -> None:
        super().__init__()
        self.proto = proto

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map support (s, 3, h, w), support_labels (s,), query (m, 3, h, w) and query_labels (m,) to two scalars."""
        logits = self.proto(batch["support"], batch["support_labels"], batch["query"])
        labels = batch["query_labels"]
        return {
            "loss": F.cross_entropy(logits.float(), labels),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }


class EpisodeBatches:
    """batches(k) -> the k-th training episode as image tensors.

    sources: (pixels by index, episode by number) of each source set; a batch draws one of them uniformly. augment: (images,
    seed) -> images.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[int], Episode]]],
        *,
        seed: int,
        augment: Augmentation | None,
    ) -> None:
        self.sources, self.seed, self.augment = sources, seed, augment

    def __call__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "source", number))
        pixels, sampler = self.sources[int(torch.randint(len(self.sources), (1,), generator=generator))]
        episode = sampler(number)
        images = pixels(torch.cat([episode.support, episode.query]))
        if self.augment is not None:
            images = self.augment(images, mix_seed(self.seed, "augment", number))
        support, query = images.split([len(episode.support), len(episode.query)])
        return {
            "support": support,
            "support_labels": episode.support_labels,
            "query": query,
            "query_labels": episode.query_labels,
            "number": torch.tensor(number),
        }
