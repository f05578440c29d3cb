"""What happened in one episode, and the .npz from which a report draws it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vismt.files import atomic_write
from vismt.metatune.labelled import Episode

PER_CLASS = 5


@dataclass
class Outcome:
    """One episode: images float (s, 3, h, w) and (m, 3, h, w), query predictions (m,) by condition, "clean" first.

    adversarial (m, 3, h, w) are the query images under the first attack, None without one. mixture (P,): the weights of a
    pool's experts in this task, None for a classifier without.
    """

    episode: Episode
    support: Tensor
    query: Tensor
    predictions: dict[str, Tensor]
    adversarial: Tensor | None
    mixture: Tensor | None = None

    def accuracies(self) -> dict[str, float]:
        """Share of right query predictions under each condition."""
        truth = self.episode.query_labels
        return {name: float((guess == truth).double().mean()) for name, guess in self.predictions.items()}

    def record(self) -> dict[str, object]:
        """The accuracies, and under "mixture" the mixture, to 6 digits."""
        found: dict[str, object] = dict(self.accuracies())
        if self.mixture is not None:
            found["mixture"] = [round(weight, 6) for weight in self.mixture.tolist()]
        return found


def write_panel(path: Path, outcome: Outcome, names: Sequence[str] | None = None) -> None:
    """Write the first 5 support and query images of each class (8 bit), labels, predictions and class names to an .npz.

    Arrays: support, query uint8 (., 3, h, w); support_labels, query_labels, predictions int64; classes unicode in label
    order; with an attack also adversarial uint8, adversarial_predictions int64 and its text `condition`.
    """
    episode = outcome.episode
    near, far = _first_of_each(episode.support_labels), _first_of_each(episode.query_labels)
    arrays = {
        "support": _bytes(outcome.support[near]),
        "support_labels": episode.support_labels[near].numpy(),
        "query": _bytes(outcome.query[far]),
        "query_labels": episode.query_labels[far].numpy(),
        "predictions": outcome.predictions["clean"][far].numpy(),
        "classes": np.array([str(names[c]) if names else str(c) for c in episode.classes.tolist()]),
    }
    if outcome.adversarial is not None:
        condition = next(name for name in outcome.predictions if name != "clean")
        arrays["adversarial"] = _bytes(outcome.adversarial.cpu()[far])
        arrays["adversarial_predictions"] = outcome.predictions[condition][far].numpy()
        arrays["condition"] = np.array(condition)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def _first_of_each(labels: Tensor) -> Tensor:
    """Positions of the first PER_CLASS entries of each label, ascending."""
    rank = (labels[:, None] == labels[None, :]).tril(-1).sum(1)
    return (rank < PER_CLASS).nonzero().flatten()


def _bytes(images: Tensor) -> np.ndarray:
    return images.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
