"""Projected gradient ascent: PGD and its single step FGSM on the cross-entropy, and Auto-PGD, which halves its own step.

    PGD     x <- project(x + steepest step along the gradient),    from a random start in the ball
    APGD    z = project(x_k + eta step(g_k)),    x_{k+1} = project(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1}))

PGD: Madry et al., arXiv 1706.06083. FGSM, which starts at the image itself: Goodfellow et al., arXiv 1412.6572. The step is a
multiple of epsilon. 2.5 epsilon / steps reaches the boundary from any start. epsilon / 10, the step of the few-shot papers,
hardly does in 10 steps. An image counts as broken at the first iterate that is wrong.

APGD: Croce and Hein, arXiv 2003.01690. a = 1 in the first step, then 0.75. eta starts at 2 epsilon. The distance between
checkpoints shrinks from 22 % of the steps by 3 % a time down to 6 %. At a checkpoint, eta is halved and the search goes on from
the best point in two cases: if the loss rose in no more than 75 % of the steps since the last checkpoint, or if neither eta nor
the best loss has changed since then.

In l1 the step goes to the largest entries of the gradient, whose share follows the sparsity of the best point. eta is divided
by 1.5 between epsilon and epsilon / 10 (Croce and Hein, arXiv 2103.01208). The three stages of growing radius in that paper are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vismt.base.norm_balls import column, project, random_start, steepest
from vismt.robustness.attacks.active_set import Wave, select
from vismt.robustness.attacks.losses import Loss, cross_entropy
from vismt.robustness.attacks.victim import Victim

MOMENTUM = 0.75
RISING = 0.75  # share of rising steps up to which a window counts as oscillating
_FIRST, SHRINK, _LEAST = 0.22, 0.03, 0.06  # of the steps: the first window, its decrease, the shortest one
L1_FIRST, L1_DECREASE, L1_SPARSER, L1_RANGE = 0.04, 1.5, 0.95, 10.0


def pgd(victim: Victim, wave: Wave, *, epsilon: float, norm: str, step: float, steps: int, start: bool) -> None:
    """Run `steps` steps of size `step`. start: Whether to start at a random point, and not at the image."""
    images = random_start(wave.clean, epsilon, norm, wave.seeds, edge=False) if start else wave.clean.clone()
    for _ in range(steps):
        logits, _, gradient = victim.gradient(images, wave.rows, wave.labels, None, cross_entropy)
        images, gradient = select(wave.settle(images, logits), images, gradient)
        if not len(wave):
            return
        images = project(wave.clean, images + steepest(gradient, images, step, norm), epsilon, norm)
    with torch.no_grad():
        logits = victim.logits(images, wave.rows)
    images, logits = select(wave.settle(images, logits), images, logits)
    wave.finish(images, logits)


@dataclass
class _State:
    """The trials of a wave, with one entry for each trial."""

    images: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_logits: Tensor
    step: Tensor  # (m,)
    rises: Tensor  # (m,) steps with a higher loss since the last checkpoint
    checked_loss: Tensor  # (m,) best loss at the last checkpoint
    reduced: Tensor  # (m,) whether the last checkpoint halved the step
    density: Tensor  # (m,) l1: share of the pixels that a step changes
    count: Tensor  # (m,) l1: changed pixels of the best point at the last checkpoint

    def keep(self, positions: Tensor | None) -> None:
        """Keep the trials that `Wave.settle` left."""
        if positions is not None:
            for item in fields(self):
                setattr(self, item.name, getattr(self, item.name)[positions])


def apgd(victim: Victim, wave: Wave, *, epsilon: float, norm: str, steps: int, loss: Loss) -> None:
    """Run `steps` steps on a loss of `losses`. The wave has targets if the loss needs them."""
    state = _start(victim, wave, epsilon, norm, loss)
    window, shortest, shrink = _windows(steps, norm)
    since = 0
    for number in range(steps):
        if not len(wave):
            return
        moved = _move(wave, state, epsilon, norm, first=number == 0)
        state.previous, state.images = state.images, moved
        _evaluate(victim, wave, state, loss, last=number == steps - 1)
        since += 1
        if since == window:
            if norm == "l1":
                _check_sparsity(wave, state, epsilon)
            else:
                _check_progress(state, window)
            since, window = 0, max(window - shrink, shortest)
    wave.finish(state.best, state.best_logits)


def _windows(steps: int, norm: str) -> tuple[int, int, int]:
    """Return the first and the shortest distance of checkpoints, and the decrease from one to the next."""
    if norm == "l1":
        constant = max(1, int(L1_FIRST * steps))
        return constant, constant, 0
    return max(1, int(_FIRST * steps)), max(1, int(_LEAST * steps)), max(1, int(SHRINK * steps))


def _start(victim: Victim, wave: Wave, epsilon: float, norm: str, loss: Loss) -> _State:
    images = random_start(wave.clean, epsilon, norm, wave.seeds, edge=True)
    logits, value, gradient = victim.gradient(images, wave.rows, wave.labels, wave.targets, loss)
    factor = 1.0 if norm == "l1" else 2.0
    zeros, pixels = torch.zeros_like(value), wave.clean.shape[1:].numel()
    state = _State(
        images=images,
        previous=images,
        gradient=gradient,
        loss=value,
        best=images,
        best_gradient=gradient,
        best_loss=value,
        best_logits=logits,
        step=torch.full_like(value, factor * epsilon),
        rises=zeros,
        checked_loss=value,
        reduced=torch.ones_like(value, dtype=torch.bool),
        density=torch.full_like(value, 0.2),
        count=torch.full_like(value, pixels),
    )
    state.keep(wave.settle(images, logits))
    return state


def _move(wave: Wave, state: _State, epsilon: float, norm: str, *, first: bool) -> Tensor:
    """Return the next images (m, 3, h, w)."""
    images, step = state.images, column(state.step.to(state.images.dtype))
    if norm == "l1":
        # The signs of the largest entries of the gradient, `density` of them, with l1 norm 1.
        size = state.gradient.abs().flatten(1)
        kept = (state.density * size.shape[1]).long().clamp(1, size.shape[1])
        least = size.sort(1, descending=True).values.gather(1, kept[:, None] - 1)[:, 0]
        signs = state.gradient.sign() * (state.gradient.abs() >= column(least))
        sparse = signs / column(signs.abs().flatten(1).sum(1).clamp_min(1))
        return project(wave.clean, images + step * sparse, epsilon, norm)
    target = project(wave.clean, images + steepest(state.gradient, images, step, norm), epsilon, norm)
    a = 1.0 if first else MOMENTUM
    return project(wave.clean, images + a * (target - images) + (1 - a) * (images - state.previous), epsilon, norm)


def _evaluate(victim: Victim, wave: Wave, state: _State, loss: Loss, *, last: bool) -> None:
    """Take loss and gradient at the new images, drop broken trials and keep the best points. The last step needs no gradient."""
    if last:
        with torch.no_grad():
            logits = victim.logits(state.images, wave.rows)
            value, gradient = loss(logits.double(), wave.labels, wave.targets), state.gradient
    else:
        logits, value, gradient = victim.gradient(state.images, wave.rows, wave.labels, wave.targets, loss)
    state.rises = state.rises + (value > state.loss)
    state.loss, state.gradient = value, gradient
    keep = wave.settle(state.images, logits)
    state.keep(keep)
    (logits,) = select(keep, logits)
    better = state.loss > state.best_loss
    state.best_logits = torch.where(better[:, None], logits, state.best_logits)
    state.best = torch.where(column(better), state.images, state.best)
    state.best_gradient = torch.where(column(better), state.gradient, state.best_gradient)
    state.best_loss = torch.where(better, state.loss, state.best_loss)


def _check_progress(state: _State, window: int) -> None:
    oscillates = state.rises <= RISING * window
    stuck = ~state.reduced & (state.checked_loss >= state.best_loss)
    state.reduced = oscillates | stuck
    state.checked_loss = state.best_loss
    state.rises = torch.zeros_like(state.rises)
    state.step = torch.where(state.reduced, state.step / 2, state.step)
    _return_to_best(state, state.reduced)


def _check_sparsity(wave: Wave, state: _State, epsilon: float) -> None:
    count = ((state.best - wave.clean).abs().flatten(1) > 0).sum(1).to(state.count)
    sparser = count / state.count.clamp_min(1) < L1_SPARSER
    state.density = count / wave.clean.shape[1:].numel() / L1_DECREASE
    state.step = torch.where(sparser, torch.full_like(state.step, epsilon), state.step / L1_DECREASE)
    state.step = state.step.clamp(epsilon / L1_RANGE, epsilon)
    state.count = count
    _return_to_best(state, sparser)


def _return_to_best(state: _State, where: Tensor) -> None:
    state.images = torch.where(column(where), state.best, state.images)
    state.gradient = torch.where(column(where), state.best_gradient, state.gradient)
