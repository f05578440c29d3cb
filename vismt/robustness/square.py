"""Square attack: random search with square changes, by logits alone (Andriushchenko et al., arXiv 1912.00049).

A query changes a square window of the image to a corner of the ball and is kept when the margin z_y - max z_j falls. The
window's share of the pixels starts at 80 % and is halved at nine points of the search. linf starts from vertical stripes of
+-epsilon; l2 starts from a grid of bumps and moves norm from one window to another. Windows and signs are functions of the
seed and the query, the same for all images; starts are functions of each image's seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.robustness.active_set import Wave, select
from vismt.robustness.losses import margin
from vismt.robustness.norms import TINY, column, draw, project, size
from vismt.robustness.victim import Victim

FIRST_SHARE = 0.8
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
TILES = 5  # of a side, in the l2 start


def square(victim: Victim, wave: Wave, *, epsilon: float, norm: str, queries: int, seed: int) -> None:
    """Ask `queries` queries for each image."""
    generator = torch.Generator().manual_seed(seed)
    images = _stripes(wave, epsilon) if norm == "linf" else _bumps(wave, epsilon)
    value, images = _query(victim, wave, images, images, None)
    for number in range(1, queries):
        if not len(wave):
            return
        propose = _propose_linf if norm == "linf" else _propose_l2
        proposal = propose(wave.clean, images, epsilon, _share(number, queries), generator)
        value, images = _query(victim, wave, images, proposal, value)
    wave.finish(images)


@torch.no_grad()
def _query(victim: Victim, wave: Wave, images: Tensor, proposal: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ask for the logits of the proposals; return the largest margins of other classes so far and their images."""
    logits = victim.logits(proposal, wave.rows)
    new = margin(logits, wave.labels)
    better = new > value if value is not None else torch.ones_like(new, dtype=torch.bool)
    images = torch.where(column(better), proposal, images)
    value = new if value is None else torch.where(better, new, value)
    images, value = select(wave.settle(proposal, logits), images, value)
    return value, images


def _share(number: int, queries: int) -> float:
    """Return the share of the pixels that query `number` changes."""
    scaled = number / queries * 10_000
    return FIRST_SHARE / 2 ** sum(scaled > point for point in HALVED_AT)


def _stripes(wave: Wave, epsilon: float) -> Tensor:
    signs = draw(wave.clean[:, :, :1, :], wave.seeds, "signs")
    return (wave.clean + epsilon * signs).clamp(0, 1)


def _corner(height: int, width: int, side: int, generator: torch.Generator) -> tuple[int, int]:
    """Draw the upper left corner of a window."""
    top = int(torch.randint(height - side + 1, (1,), generator=generator))
    return top, int(torch.randint(width - side + 1, (1,), generator=generator))


def _propose_linf(clean: Tensor, images: Tensor, epsilon: float, share: float, generator: torch.Generator) -> Tensor:
    _, channels, height, width = clean.shape
    side = min(max(1, round((share * height * width) ** 0.5)), height, width)
    top, left = _corner(height, width, side, generator)
    signs = torch.randint(2, (channels, 1, 1), generator=generator).to(clean) * 2 - 1
    moved = images.clone()
    window = (..., slice(top, top + side), slice(left, left + side))
    moved[window] = moved[window] + 2 * epsilon * signs
    return project(clean, moved, epsilon, "linf")


def _bump(side: int) -> Tensor:
    """Return a change (side, side) of norm 1 that decays from its middle, one half positive and the other negative."""
    half = side // 2
    pattern = torch.cat([_peak(half, side), -_peak(side - half, side)])
    return pattern / pattern.norm().clamp_min(TINY)


def _peak(height: int, width: int) -> Tensor:
    """Return sums of nested squares (height, width) around the middle: the k-th, 2k - 1 pixels wide, adds 1 / k^2."""
    count = max(height, width) // 2 + 1
    across, along = (torch.arange(length) - length // 2 for length in (height, width))
    distance = torch.maximum(across.abs()[:, None], along.abs()[None, :])
    heights = (1 / torch.arange(1, count + 1, dtype=torch.float64) ** 2).flip(0).cumsum(0).flip(0)
    return heights[distance.clamp(max=count - 1)].float()


def _bumps(wave: Wave, epsilon: float) -> Tensor:
    clean = wave.clean
    height, width = clean.shape[-2:]
    side = max(1, min(height, width) // TILES)
    rows, columns = height // side, width // side
    signs = draw(clean[:, :, :rows, :columns], wave.seeds, "signs")
    bump = (_bump(side) if side > 1 else torch.ones(1, 1)).to(clean)
    tiles = torch.einsum("bcyx,hw->bcyhxw", signs, bump).reshape(*signs.shape[:2], rows * side, columns * side)
    change = torch.zeros_like(clean)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    change[..., top : top + rows * side, left : left + columns * side] = tiles
    return _on_sphere(clean, change, epsilon)


def _on_sphere(clean: Tensor, change: Tensor, epsilon: float) -> Tensor:
    return (clean + change * column(epsilon / size(change, "l2").clamp_min(TINY))).clamp(0, 1)


def _propose_l2(clean: Tensor, images: Tensor, epsilon: float, share: float, generator: torch.Generator) -> Tensor:
    """Replace the change in one window by a bump, with the norm of a second window and what the box has left."""
    _, channels, height, width = clean.shape
    side = min(max(3, round((share * height * width) ** 0.5)) | 1, height, width)
    change = images - clean
    corners = [_corner(height, width, side, generator) for _ in range(2)]
    into, out = ((..., slice(top, top + side), slice(left, left + side)) for top, left in corners)
    both = torch.zeros(height, width, dtype=torch.bool, device=clean.device)
    both[into[1:]] = True
    both[out[1:]] = True
    budget = (epsilon**2 - change.square().flatten(1).sum(1)).clamp_min(0)[:, None, None, None] / channels
    budget = budget + (change * both).square().sum((2, 3), keepdim=True)
    signs = (torch.randint(2, (channels, 1, 1), generator=generator).to(clean) * 2 - 1)[None]
    bump = _bump(side).to(clean)
    bump = bump.T if bool(torch.randint(2, (1,), generator=generator)) else bump
    old = change[into] / change[into].square().sum((2, 3), keepdim=True).sqrt().clamp_min(TINY)
    new = signs * bump + old
    new = new / new.square().sum((2, 3), keepdim=True).sqrt().clamp_min(TINY) * budget.sqrt()
    change = change.clone()
    change[out] = 0
    change[into] = new
    return _on_sphere(clean, change, epsilon)
