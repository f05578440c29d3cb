"""FAB-T: steps to the linearised boundary of a target class (Croce and Hein, arXiv 1907.02044, targeted form 2003.01690).

With f = z_t - z_y, the boundary near x_k is w.x + b = 0, w = grad f(x_k), b = f(x_k) - w.x_k. With P the smallest change in
norm p that reaches it inside [0, 1], from x_k and from the image x:

    x_{k+1} = clip((1 - a)(x_k + 1.05 P(x_k)) + a (x + 1.05 P(x))),    a = min(||P(x_k)|| / (||P(x_k)|| + ||P(x)||), 0.1)

A point across the boundary but outside the budget is pulled back to x + 0.9 (x_{k+1} - x). FAB looks for the nearest broken
image. Here a trial ends at the first broken image within epsilon, which decides the image. P is found exactly. In linf and l2
the change is aligned with w and clipped to the room in [0, 1], and its multiplier is found by Newton's method. In l1 the
largest |w_i| are filled first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.norm_balls import TINY, column, random_start, size
from vismt.robustness.attacks.active_set import Wave, select
from vismt.robustness.attacks.losses import margin
from vismt.robustness.attacks.victim import Victim

OVERSHOOT, PULL_BACK, LARGEST_PULL = 1.05, 0.9, 0.1
NEWTON_STEPS, NEWTON_TOLERANCE = 50, 1e-9


def fab(victim: Victim, wave: Wave, *, epsilon: float, norm: str, steps: int) -> None:
    """Run `steps` steps towards the wave's targets. Later restarts begin at a random point at half the radius."""
    drawn = random_start(wave.clean, epsilon / 2, norm, wave.seeds, edge=True)
    images = torch.where(column(wave.restart > 0), drawn, wave.clean)
    for _ in range(steps):
        _, value, gradient = victim.gradient(images, wave.rows, wave.labels, wave.targets, margin)
        images = _step(wave.clean, images, value, gradient, norm)
        with torch.no_grad():
            logits = victim.logits(images, wave.rows)
        inside = size(images - wave.clean, norm) <= epsilon
        crossed = logits.argmax(1) != wave.labels
        keep = wave.settle(images, logits, inside)
        if not len(wave):
            return
        images, crossed = select(keep, images, crossed)
        images = torch.where(column(crossed), wave.clean + PULL_BACK * (images - wave.clean), images)
    wave.finish(wave.clean, wave.outcome.logits[wave.rows])


def _step(clean: Tensor, images: Tensor, value: Tensor, gradient: Tensor, norm: str) -> Tensor:
    w = gradient.flatten(1).double()
    here, origin = images.flatten(1).double(), clean.flatten(1).double()
    away = value + ((origin - here) * w).sum(1)  # the linearised f at the clean image
    both = torch.cat([here, origin]), torch.cat([w, w]), -torch.cat([value, away])
    change, pull = boundary_step(*both, norm).chunk(2)
    length = size(change.view_as(images), norm).clamp_min(1e-8)
    distance = size(pull.view_as(images), norm).clamp_min(1e-8)
    a = (length / (length + distance)).clamp(max=LARGEST_PULL)[:, None]
    moved = (1 - a) * (here + OVERSHOOT * change) + a * (origin + OVERSHOOT * pull)
    return moved.clamp(0, 1).view_as(images).to(images.dtype)


def boundary_step(points: Tensor, w: Tensor, rise: Tensor, norm: str) -> Tensor:
    """Return the smallest change d with w.d = rise and points + d in [0, 1]. If the box does not suffice, return all its room.

    points, w: Tensors in float64 (m, n). rise: Rises (m,).
    """
    direction = w.sign() * rise.sign()[:, None]
    room = torch.where(direction > 0, 1 - points, points)
    slope = w.abs()
    needed = rise.abs()[:, None]
    if norm != "l1":
        return direction * _fill_evenly(slope, room, needed, norm)
    order = slope.argsort(1, descending=True)  # the room of the largest slopes is used first
    gains = (slope * room).gather(1, order)
    before = gains.cumsum(1) - gains
    left = ((needed - before) / slope.gather(1, order).clamp_min(TINY)).clamp_min(0)
    return direction * torch.zeros_like(slope).scatter(1, order, torch.minimum(left, room.gather(1, order)))


def _fill_evenly(slope: Tensor, room: Tensor, needed: Tensor, norm: str) -> Tensor:
    """Return min(t, room) (linf) or min(t slope, room) (l2) with the least t whose product with `slope` is `needed`.

    The product is concave and piecewise linear in t, so Newton's steps from t = 0 rise to the solution and end there.
    """
    rate = slope if norm == "linf" else slope.square()  # of the product, for the pixels with room left
    last = room if norm == "linf" else room / slope.clamp_min(TINY)  # where a pixel's room ends
    last = last.masked_fill(slope == 0, 0)
    t, end = torch.zeros_like(needed), last.amax(1, keepdim=True)
    for _ in range(NEWTON_STEPS):
        free = rate * (last > t)
        missing = needed - (rate * torch.minimum(last, t)).sum(1, keepdim=True)
        before, t = t, torch.minimum(t + missing.clamp_min(0) / free.sum(1, keepdim=True).clamp_min(TINY), end)
        if bool((t - before <= NEWTON_TOLERANCE * t).all()):
            break
    return torch.minimum(last, t) if norm == "linf" else torch.minimum(last, t) * slope
