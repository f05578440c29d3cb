"""The outcome of one episode, and the .npz file from which a report draws the episode."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vismt.metatune.protocol.episodes import Episode
from vismt.storage.files import atomic_write
from vismt.uncertainty.probability_metrics import group_row

PER_CLASS = 5
UNSCALED, SCALED = "clean", "tempered"  # forms of the clean logits: unchanged, or divided by a temperature


@dataclass
class EpisodeOutcome:
    """The images and predictions of one episode.

    Args:
        episode: The episode.
        support: Support images, float (s, 3, h, w).
        query: Query images, float (m, 3, h, w).
        predictions: Predictions for the queries, int64 (m,), by condition, "clean" first.
        logits: Logits of the clean queries (m, N).
        adversarial: Queries under the first attack (m, 3, h, w). None without an attack.
        mixture: Weights (P,) of a pool's experts in this task. None for a classifier without a mixture.
        worst: Conditions of each worst case.
        strict: Conditions whose budget contains the clean image. A query counts under them only if it is right when clean.
        lost: Number of queries that an attack counted as broken and that are right here, by condition.
        asked: Means over the clean queries of the values that features compute.
    """

    episode: Episode
    support: Tensor
    query: Tensor
    predictions: dict[str, Tensor]
    logits: Tensor
    adversarial: Tensor | None = None
    mixture: Tensor | None = None
    worst: Mapping[str, Sequence[str]] = field(default_factory=dict)
    strict: Collection[str] = ()
    lost: dict[str, int] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)

    def right(self) -> dict[str, Tensor]:
        """Return whether each query counts as right, bool (m,), by condition, then by worst case."""
        truth = self.episode.query_labels
        right = {name: guess == truth for name, guess in self.predictions.items()}
        for name in self.strict:
            right[name] = right[name] & right["clean"]
        for name, conditions in self.worst.items():
            right[name] = torch.stack([right["clean"], *(right[condition] for condition in conditions)]).all(0)
        return right

    def probabilities(self, form: str = UNSCALED, temperature: float = 1.0) -> dict[str, object]:
        """Return the measures of p = softmax(logits / temperature), each a mean over the clean queries."""
        return group_row(form, (self.logits.double() / temperature).log_softmax(1), self.episode.query_labels)

    def record(self, forms: Mapping[str, float]) -> dict[str, object]:
        """Return accuracies, answers, probabilities, what features ask for, and a mixture to 6 digits under "mixture".

        Answers are a text with 1 for a right and 0 for a wrong answer to each query. forms: Temperature of each form of the
        logits whose probabilities are kept.
        """
        right = self.right()
        row: dict[str, object] = {name: float(hits.double().mean()) for name, hits in right.items()}
        row |= {right_field(name): "".join("01"[hit] for hit in hits.tolist()) for name, hits in right.items()}
        for form, temperature in forms.items():
            row |= self.probabilities(form, temperature)
        row |= self.asked | {lost_field(name): count for name, count in self.lost.items()}
        if self.mixture is not None:
            row["mixture"] = [round(weight, 6) for weight in self.mixture.tolist()]
        return row


def right_field(condition: str) -> str:
    """Return the field of a record with the answers to the queries under a condition."""
    return f"{condition} right"


def lost_field(condition: str) -> str:
    """Return the field of a record with the number of queries that an attack counted as broken and that are right here."""
    return f"{condition} lost"


def write_episode_panel(path: Path, outcome: EpisodeOutcome, model: str, names: Sequence[str] | None = None) -> None:
    """Write the first 5 support and query images of each class with labels, predictions and class names to an .npz.

    The arrays are the name of the model (model), the images (support, query: uint8 (., 3, h, w)), support_labels, query_labels
    and predictions (int64), and the class names in label order (classes). With an attack there are also adversarial (uint8),
    adversarial_predictions (int64), adversarial_right (bool) and the text of the attack (condition).
    """
    episode = outcome.episode
    support = _first_of_each(episode.support_labels)
    query = _first_of_each(episode.query_labels)
    arrays = {
        "model": np.array(model),
        "support": _bytes(outcome.support[support]),
        "support_labels": episode.support_labels[support].numpy(),
        "query": _bytes(outcome.query[query]),
        "query_labels": episode.query_labels[query].numpy(),
        "predictions": outcome.predictions["clean"][query].numpy(),
        "classes": np.array([str(names[c]) if names else str(c) for c in episode.classes.tolist()]),
    }
    if outcome.adversarial is not None:
        condition = next(name for name in outcome.predictions if name != "clean")
        arrays["adversarial"] = _bytes(outcome.adversarial.cpu()[query])
        arrays["adversarial_predictions"] = outcome.predictions[condition][query].numpy()
        arrays["adversarial_right"] = outcome.right()[condition][query].numpy()
        arrays["condition"] = np.array(condition)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # names of arrays, none of them "allow_pickle"
    atomic_write(path, buffer.getvalue())


def _first_of_each(labels: Tensor) -> Tensor:
    rank = (labels[:, None] == labels[None, :]).tril(-1).sum(1)
    return (rank < PER_CLASS).nonzero().flatten()


def _bytes(images: Tensor) -> np.ndarray:
    return images.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
