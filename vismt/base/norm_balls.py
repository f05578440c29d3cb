"""Balls of changes of images, ||d||_p <= epsilon with x + d in [0, 1]: sizes, projections, steepest steps, random starts.

    linf   step  s sign(g)              projection  clip(d, -epsilon, epsilon)
    l2     step  s g / ||g||            projection  d min(1, epsilon / ||d||)
    l1     step  s sign(g) on the top 1 % of |g| whose pixels can still move, divided by their number (SLIDE: Tramer and
           Boehme, arXiv 1904.13000)    projection  Euclidean onto ball and box at once

The l1 projection solves min ||z - d|| subject to ||z||_1 <= epsilon, 0 <= x + z <= 1: z_i = sign(d_i) clip(|d_i| - t, 0, r_i)
with r_i the room in the direction of d_i and the least t >= 0 that meets the budget (Croce and Hein, arXiv 2103.01208). In linf
and l2, ball and box are treated one after the other. In linf this is exact, and in l2 the result stays inside both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vismt.base.seeds import mix_seed

PIXELS = "pixel units of [0, 1] (8/255, not 8)"  # unit of a radius, in errors
NORMS = ("linf", "l2", "l1")
TINY = 1e-12
_TOLERANCE = 1e-6
BISECTIONS = 60  # steps for the threshold of the l1 projection (the interval shrinks below double precision)
SLIDE_SHARE = 0.01


def column(values: Tensor) -> Tensor:
    """Return values (b,) as (b, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def size(change: Tensor, norm: str) -> Tensor:
    """Return the norm (b,) of each change (b, c, h, w)."""
    flat = change.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    return flat.norm(dim=1) if norm == "l2" else flat.abs().sum(1)


def size_of_all(images: Tensor, norm: str) -> float:
    """Return the norm of a change by 1 of every number of an image, for images (b, c, h, w)."""
    return images[0].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[norm]


def rounding(images: Tensor, epsilon: float, norm: str) -> float:
    """Return by how much a change of norm epsilon may seem longer, because float32 rounds every number of the image."""
    return _TOLERANCE * max(1.0, epsilon) + torch.finfo(torch.float32).eps / 2 * size_of_all(images, norm)


def project(clean: Tensor, moved: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return images in the ball around `clean` and in [0, 1], near `moved`. All are (b, c, h, w)."""
    change = moved - clean
    inside = _project_l1(clean, change, epsilon) if norm == "l1" else clip(change, epsilon, norm)
    return (clean + inside).clamp(0, 1)


def clip(change: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return the nearest changes (b, c, h, w) in the ball of linf or l2, for any pixels."""
    if norm == "linf":
        return change.clamp(-epsilon, epsilon)
    return change * column((epsilon / size(change, norm).clamp_min(TINY)).clamp(max=1))


def _project_l1(clean: Tensor, change: Tensor, epsilon: float) -> Tensor:
    room = torch.where(change > 0, 1 - clean, clean).flatten(1).double()
    length = change.abs().flatten(1).double()
    low = torch.zeros(len(clean), 1, dtype=torch.float64, device=clean.device)
    high = length.amax(1, keepdim=True)
    inside = torch.minimum(length, room).sum(1, keepdim=True) <= epsilon
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = torch.minimum((length - middle).clamp_min(0), room).sum(1, keepdim=True) > epsilon
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    kept = torch.minimum((length - torch.where(inside, torch.zeros_like(high), high)).clamp_min(0), room)
    return kept.view_as(change).to(change.dtype) * change.sign()


def steepest(gradient: Tensor, images: Tensor, step: Tensor | float, norm: str) -> Tensor:
    """Return the step of length `step` (a number or (b, 1, 1, 1)) that raises the loss most, in the norm of the ball."""
    if norm == "linf":
        return step * gradient.sign()
    if norm == "l2":
        return step * gradient / column(size(gradient, norm).clamp_min(TINY))
    # Pixels at the border of [0, 1] that the gradient pushes outwards cannot move.
    blocked = ((gradient > 0) & (images >= 1)) | ((gradient < 0) & (images <= 0))
    useful = gradient.masked_fill(blocked, 0)
    flat = useful.abs().flatten(1)
    count = max(1, int(SLIDE_SHARE * flat.shape[1]))
    least = flat.topk(count, 1).values[:, -1]
    direction = useful.sign() * (useful.abs() >= column(least))
    return step * direction / column(size(direction, norm).clamp_min(1))


def draw(images: Tensor, seeds: Sequence[int], kind: str) -> Tensor:
    """Draw an array for each image from its own seed, on the CPU.

    kind: "uniform" in [-1, 1], "normal" or "signs".
    """
    drawn = []
    for image, seed in zip(images, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        if kind == "normal":
            drawn.append(torch.randn(image.shape, generator=generator))
        else:
            uniform = 2 * torch.rand(image.shape, generator=generator) - 1
            drawn.append(uniform.sign() if kind == "signs" else uniform)
    return torch.stack(drawn).to(images)


def random_start(images: Tensor, epsilon: float, norm: str, seeds: Sequence[int], *, edge: bool) -> Tensor:
    """Return a start for each image in its ball and in [0, 1], as a function of the image's seed.

    edge: Whether to scale it to the ball's surface (APGD). Otherwise it is uniform in linf, and has a uniform radius in a
    random direction in l2 and l1.
    """
    direction = draw(images, seeds, "uniform" if norm == "linf" else "normal")
    if edge or norm != "linf":
        direction = direction / column(size(direction, norm).clamp_min(TINY))
    if not edge and norm != "linf":
        radii = [torch.rand((), generator=torch.Generator().manual_seed(mix_seed(seed, "radius"))) for seed in seeds]
        direction = direction * column(torch.stack(radii).to(images))
    return project(images, images + epsilon * direction, epsilon, norm)


def within_budget(clean: Tensor, adversarial: Tensor, epsilon: float, norm: str, what: object) -> Tensor:
    """Return `adversarial`, clamped to [0, 1] within the tolerance.

    Raise RuntimeError if an image leaves its budget or [0, 1], or is not finite. That is a fault of the attack `what` and not
    of the user.
    """
    worst, low, high = float(size(adversarial - clean, norm).max()), float(adversarial.min()), float(adversarial.max())
    allowed = epsilon + rounding(clean, epsilon, norm)
    # Written so that a NaN fails.
    if not (worst <= allowed and low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise RuntimeError(
            f"attack {what}: left its budget: {norm} {worst:.8g} > {epsilon:.8g}, or pixels {low}..{high}"
        )
    return adversarial.clamp(0, 1)
