"""The active set of an attack: images that are wrong when clean or already broken are left out of the rest.

For worst-case accuracy this is exact: an image counts as robust when no restart, target or step breaks it, so nothing more
is to be learned from a broken one. A wave is a batch of trials, one for each image, restart and target; when a trial breaks
its image, all trials of this image leave the wave. The random numbers of an image are a function of its own seed, so they
do not depend on the other images of a batch. Images for another model are computed without an active set: all trials run to
their end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.robustness.victim import Victim
from vismt.seeds import mix_seed

CPU_FILL = 48  # trials in a batch beyond which a CPU computes no faster


@dataclass
class Outcome:
    """What the attacks have found so far.

    clean (b, 3, h, w), labels (b,), seeds: one for each image. adversarial: the broken images, for the others the last trial.
    broken (b,): wrong when clean, or broken by an attack. order (b, k): classes by descending clean logit. exhaust: run every
    trial of every image to its end.
    """

    clean: Tensor
    labels: Tensor
    seeds: Sequence[int]
    adversarial: Tensor
    broken: Tensor
    order: Tensor
    exhaust: bool = False

    @classmethod
    def start(
        cls, victim: Victim, clean: Tensor, labels: Tensor, seeds: Sequence[int], batch: int, *, exhaust: bool
    ) -> Outcome:
        """Return the outcome before any attack: images that are wrong when clean count as broken."""
        rows = torch.arange(len(clean), device=clean.device)
        order = victim.predictions(clean, rows, batch).argsort(dim=1, descending=True, stable=True)
        broken = (order[:, 0] != labels) & (not exhaust)
        return cls(clean, labels, seeds, clean.clone(), broken, order, exhaust)

    def target(self, rows: Tensor, rank: int) -> Tensor:
        """Return the class that is `rank`-th among the classes other than the label, by descending clean logit."""
        ranked = self.order[rows]
        others = ranked[ranked != self.labels[rows, None]].view(len(rows), -1)
        return others[:, rank - 1]


@dataclass(frozen=True)
class Round:
    """One pass over the active images: the number of the restart, and the clean rank of the target class or None."""

    restart: int
    rank: int | None = None


class Wave:
    """The trials of a batch that are still needed. All tensors have one entry for each trial, (m, ...).

    fill: trials that the device computes at once without loss.
    """

    def __init__(self, outcome: Outcome, rows: Tensor, rounds: Sequence[Round], name: str, fill: int) -> None:
        self.outcome, self.fill = outcome, fill
        self.rows = rows.repeat(len(rounds))
        self.clean = outcome.clean[self.rows]
        self.labels = outcome.labels[self.rows]
        ranked = [round for round in rounds if round.rank is not None]
        self.targets = torch.cat([outcome.target(rows, round.rank or 0) for round in ranked]) if ranked else None
        self.restart = torch.cat([torch.full_like(rows, round.restart) for round in rounds])
        self.seeds = [mix_seed(outcome.seeds[row], name, round.restart) for round in rounds for row in rows.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def settle(self, images: Tensor, logits: Tensor, inside: Tensor | None = None) -> Tensor | None:
        """Record the images that are now broken, and drop all their trials.

        Args:
            images: of the trials (m, 3, h, w), within the budget.
            logits: of the images, (m, k).
            inside: (m,) whether an image lies within the budget, None for all.

        Returns:
            Positions of the trials that stay, or None where all of them do; callers index their tensors with it.
        """
        if self.outcome.exhaust:
            return None
        wrong = logits.argmax(1) != self.labels
        if inside is not None:
            wrong &= inside
        hits = wrong.nonzero().flatten()
        if not len(hits):
            return None
        outcome = self.outcome
        outcome.adversarial[self.rows[hits]] = images[hits].detach()
        outcome.broken[self.rows[hits]] = True
        keep = (~outcome.broken[self.rows]).nonzero().flatten()
        self.rows, self.clean, self.labels, self.restart = select(
            keep, self.rows, self.clean, self.labels, self.restart
        )
        if self.targets is not None:
            self.targets = self.targets[keep]
        self.seeds = [self.seeds[position] for position in keep.tolist()]
        return keep

    def finish(self, images: Tensor) -> None:
        """Keep the last trial of the images that were not broken."""
        self.outcome.adversarial[self.rows] = images.detach()


def select(keep: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors at the positions that `Wave.settle` returned."""
    return tensors if keep is None else tuple(tensor[keep] for tensor in tensors)


def waves(outcome: Outcome, rounds: Sequence[Round], batch: int, name: str) -> Iterator[Wave]:
    """Yield the waves of an attack until its rounds end or every image is broken.

    Few survivors run several rounds in one wave, up to the batch that the device needs to be busy.
    """
    fill = batch if outcome.clean.device.type != "cpu" else min(batch, CPU_FILL)
    todo = list(rounds)
    while todo:
        rows = (~outcome.broken).nonzero().flatten()
        if not len(rows):
            return
        count = max(1, fill // len(rows))
        now, todo = todo[:count], todo[count:]
        for part in rows.split(batch):
            yield Wave(outcome, part, now, name, fill)
