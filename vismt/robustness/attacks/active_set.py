"""The active set of an attack: images that are wrong when clean, or already broken, are not attacked further.

For worst-case accuracy this is exact. An image counts as robust if no restart, target or step breaks it, so a broken image
needs no more trials. A wave is a batch of trials, one for each image, restart and target. When a trial breaks its image, all
trials of this image leave the wave. The random numbers of an image are a function of its own seed and do not depend on the
other images of a batch.

Every image keeps the trial with the highest margin over all restarts, targets and parts of an ensemble. The margin is the largest
other logit minus the logit of the label. Images for another model are computed without an active set, and all trials run to their
end. The first step that breaks an image is a trial of its own. The same images break the source with and without an active set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.norm_balls import TINY
from vismt.base.seeds import mix_seed
from vismt.robustness.attacks.losses import margin
from vismt.robustness.attacks.victim import Victim

CPU_FILL = 48  # trials in a batch beyond which a CPU computes no faster
LOST_SHARE = 0.25  # of the clean margin, which rounding cannot give back to a broken image


@dataclass
class Outcome:
    """What the attacks have found so far.

    clean: Clean images (b, 3, h, w). labels: Labels (b,). seeds: One seed for each image. logits: Logits (b, k) of the clean
    images. adversarial: Trial with the highest margin of each image. Before the first trial, the clean image. heights: Margins
    (b,) of these trials. Before the first trial, -inf. broken: Whether an image is wrong when clean or broken by an attack,
    (b,). exhaust: Whether every trial of every image runs to its end.
    """

    clean: Tensor
    labels: Tensor
    seeds: Sequence[int]
    logits: Tensor
    adversarial: Tensor
    heights: Tensor
    broken: Tensor
    exhaust: bool = False

    @classmethod
    def start(
        cls, victim: Victim, clean: Tensor, labels: Tensor, seeds: Sequence[int], batch: int, *, exhaust: bool
    ) -> Outcome:
        """Return the outcome before any attack: images that are wrong when clean count as broken."""
        logits = victim.predictions(clean, torch.arange(len(clean), device=clean.device), batch)
        broken = logits.argmax(1) != labels
        heights = torch.full_like(logits[:, 0], -torch.inf)
        return cls(clean, labels, seeds, logits, clean.clone(), heights, broken, exhaust)

    @property
    def active(self) -> Tensor:
        """Whether an image is attacked, bool (b,)."""
        return ~self.broken | self.exhaust

    def forget(self, rows: Tensor) -> None:
        """Drop the trials of images, bool (b,), before an attack of another budget."""
        self.adversarial[rows] = self.clean[rows]
        self.heights[rows] = -torch.inf

    def keep(self, rows: Tensor, images: Tensor, logits: Tensor) -> None:
        """Keep the trials with a higher margin than their images have. rows: Images (m,) of the trials, also repeated ones."""
        heights = margin(logits, self.labels[rows]).float()
        wrong = logits.argmax(1) != self.labels[rows]
        heights = torch.where(wrong, heights.clamp_min(TINY), heights)  # a tie may also be wrong
        highest = self.heights.scatter_reduce(0, rows, heights, "amax")
        places = torch.arange(len(rows), device=rows.device)
        best = ((heights == highest[rows]) & (heights > self.heights[rows])).nonzero().flatten()
        # The first of equal trials: an assignment to a row that comes twice is undefined on CUDA.
        first = torch.full_like(self.labels, len(rows)).scatter_reduce(0, rows[best], places[best], "amin")
        raised = (first < len(rows)).nonzero().flatten()
        self.adversarial[raised] = images[first[raised]].detach()
        self.heights = highest
        self.broken = self.broken | (highest > 0)

    def lost(self, logits: Tensor, what: str) -> Tensor:
        """Return which images count as broken here and are right in an evaluation, bool (b,).

        Rounding differs from batch to batch, so an image at the boundary may be lost. Raises UserError if a lost image is further
        from the boundary than rounding explains. logits: Logits (b, k) of `adversarial` in the evaluation.
        """
        logits = logits.to(self.labels.device).float()
        lost = self.broken & (logits.argmax(1) == self.labels)
        clean = margin(self.logits, self.labels).abs()
        explained = LOST_SHARE * clean.clamp_min(clean.mean()) + torch.finfo(torch.bfloat16).eps * logits.amax(1).abs()
        far = lost & (-margin(logits, self.labels) > explained)
        if bool(far.any()):
            raise UserError(
                f"attack {what}: {int(far.sum())} of {int(self.broken.sum())} images that it broke are right when they are "
                "evaluated again: the model answers differently from call to call (noise, statistics of the batch?), so no "
                "accuracy is reported."
            )
        return lost

    def target(self, rows: Tensor, rank: int) -> Tensor:
        """Return the class that is `rank`-th among the classes other than the label, by descending clean logit."""
        ranked = self.logits[rows].argsort(dim=1, descending=True, stable=True)
        others = ranked[ranked != self.labels[rows, None]].view(len(rows), -1)
        return others[:, rank - 1]


@dataclass(frozen=True)
class Round:
    """One pass over the active images: the number of the restart, and the clean rank of the target class (or None)."""

    restart: int
    rank: int | None = None


class Wave:
    """The trials of a batch that are still needed. All tensors have one entry for each trial, (m, ...).

    fill: Number of trials that the device computes at once without loss of speed.
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
        """Record the images that are now broken, and drop all their trials unless every trial runs to its end.

        Args:
            images: Images (m, 3, h, w) of the trials, within the budget.
            logits: Logits (m, k) of the images.
            inside: Whether an image lies within the budget, (m,). None for all.

        Returns:
            Positions of the trials that stay, or None if all stay. Callers index their tensors with the positions.
        """
        outcome = self.outcome
        wrong = (logits.argmax(1) != self.labels) & (outcome.heights[self.rows] <= 0)
        if inside is not None:
            wrong &= inside
        hits = wrong.nonzero().flatten()
        if len(hits):
            outcome.keep(self.rows[hits], images[hits], logits[hits])
        if outcome.exhaust or not len(hits):
            return None
        keep = (~outcome.broken[self.rows]).nonzero().flatten()
        self.rows, self.clean, self.labels, self.restart = select(
            keep, self.rows, self.clean, self.labels, self.restart
        )
        if self.targets is not None:
            self.targets = self.targets[keep]
        self.seeds = [self.seeds[position] for position in keep.tolist()]
        return keep

    def finish(self, images: Tensor, logits: Tensor) -> None:
        """Keep the last images (m, 3, h, w) of the trials, with their logits (m, k), if they have the highest margin."""
        self.outcome.keep(self.rows, images, logits)


def select(keep: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors at the positions that `Wave.settle` returned."""
    return tensors if keep is None else tuple(tensor[keep] for tensor in tensors)


def restart_seed(seed: int, restart: int) -> int:
    """Return the seed of the random numbers that all images of a restart share. The first restart has the attack's own seed."""
    return mix_seed(seed, "restart", restart) if restart else seed


def waves(outcome: Outcome, rounds: Sequence[Round], batch: int, name: str) -> Iterator[Wave]:
    """Yield the waves of an attack until its rounds end or every image is broken.

    If few images are left, several rounds run in one wave, up to the batch that keeps the device busy. Images that are wrong when
    clean have waves of their own, so that the other images are in the same batches with and without an active set.
    """
    fill = batch if outcome.clean.device.type != "cpu" else min(batch, CPU_FILL)
    wrong = outcome.logits.argmax(1) != outcome.labels
    todo = list(rounds)
    while todo and bool(outcome.active.any()):
        groups = [(outcome.active & group).nonzero().flatten() for group in (~wrong, wrong)]
        count = max(1, fill // max(map(len, groups)))
        now, todo = todo[:count], todo[count:]
        for part in [part for rows in groups if len(rows) for part in rows.split(batch)]:
            yield Wave(outcome, part, now, name, fill)
