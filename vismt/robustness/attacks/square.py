"""Square attack: random search with square changes, which needs only logits (Andriushchenko et al., arXiv 1912.00049).

A query changes a square window of the image to a corner of the ball. The change is kept if the margin z_y - max z_j falls. The
share of the pixels in the window starts at 80 % and is halved at nine points of the search. linf starts from vertical stripes
of +-epsilon. l2 starts from a grid of bumps and moves norm from one window to another. Windows and signs are functions of the
seed, the restart and the query, and are the same for all images. Starts are functions of the seed of each image.

Most queries are not kept. If few images are left, they therefore ask several queries ahead in one batch, as if none of them were
kept. An image that keeps a query continues from there and asks the later queries again. The result is the same as with one query
after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vismt.base.norm_balls import TINY, column, draw, project, size
from vismt.robustness.attacks.active_set import Wave, restart_seed, select
from vismt.robustness.attacks.losses import margin
from vismt.robustness.attacks.victim import Victim

FIRST_SHARE = 0.8
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
TILES = 5  # of a side, in the l2 start


@dataclass(frozen=True)
class _Moves:
    """What each query changes: a window by its side (q,) and upper left corner (q, 2), signs (q, c, 1, 1).

    In l2 there are also the corner of the window that gives its norm, and whether the bump is turned (q,).
    """

    side: Tensor
    corner: Tensor
    signs: Tensor
    source: Tensor
    turned: Tensor

    def at(self, numbers: Tensor) -> _Moves:
        """Return the moves of some queries."""
        return _Moves(*(getattr(self, item.name)[numbers] for item in fields(self)))


@torch.no_grad()
def square(victim: Victim, wave: Wave, *, epsilon: float, norm: str, queries: int, seed: int) -> None:
    """Ask `queries` queries for each image."""
    images = _stripes(wave, epsilon) if norm == "linf" else _bumps(wave, epsilon)
    propose = _propose_linf if norm == "linf" else _propose_l2
    restarts = wave.restart.unique()
    seeds = [restart_seed(seed, restart) for restart in restarts.tolist()]
    drawn = [_draw_moves(wave.clean, norm, queries, torch.Generator().manual_seed(start)) for start in seeds]
    moves = _Moves(*(torch.cat([getattr(part, item.name) for part in drawn]) for item in fields(_Moves)))
    logits = victim.logits(images, wave.rows).clone()  # it is written to, and may be the model's own
    images, logits = select(wave.settle(images, logits), images, logits)
    done = torch.ones_like(wave.rows)  # queries that an image has behind it
    while len(wave) and int(done.min()) < queries:
        ahead = max(1, wave.fill // len(wave))
        numbers = done[:, None] + torch.arange(ahead, device=done.device)
        trial, place = (numbers < queries).nonzero(as_tuple=True)
        clean, labels = wave.clean[trial], wave.labels[trial]
        asked = queries * torch.searchsorted(restarts, wave.restart[trial]) + numbers[trial, place]
        proposals = propose(clean, images[trial], epsilon, moves.at(asked))
        answers = victim.logits(proposals, wave.rows[trial])
        better = torch.zeros_like(numbers, dtype=torch.bool)
        better[trial, place] = margin(answers, labels) > margin(logits[trial], labels)
        # The later queries of an image were asked from an image that is not kept.
        keeps, first = better.any(1), better.int().argmax(1)
        kept = keeps[trial] & (place == first[trial])
        images[trial[kept]], logits[trial[kept]] = proposals[kept], answers[kept]
        done = done + torch.where(keeps, first + 1, ahead)
        images, logits, done = select(wave.settle(images, logits), images, logits, done)
    wave.finish(images, logits)


def _share(number: int, queries: int) -> float:
    """Return the share of the pixels that query `number` changes."""
    scaled = number / queries * 10_000
    return FIRST_SHARE / 2 ** sum(scaled > point for point in HALVED_AT)


def _stripes(wave: Wave, epsilon: float) -> Tensor:
    signs = draw(wave.clean[:, :, :1, :], wave.seeds, "signs")
    return (wave.clean + epsilon * signs).clamp(0, 1)


def _draw_moves(images: Tensor, norm: str, queries: int, generator: torch.Generator) -> _Moves:
    """Draw what each query changes in images (m, c, h, w)."""
    _, channels, height, width = images.shape
    sides, places, signs = [], [], []

    def number(end: int) -> int:
        return int(torch.randint(end, (1,), generator=generator))

    for query in range(queries):
        side = round((_share(query, queries) * height * width) ** 0.5)
        side = min(max(1, side) if norm == "linf" else max(3, side) | 1, height, width)
        corners = [number(end - side + 1) for end in (height, width) * (1 if norm == "linf" else 2)]
        signs.append(torch.randint(2, (channels, 1, 1), generator=generator) * 2 - 1)
        sides.append(side)
        places.append([*corners[:2], *corners[-2:], number(2) if norm == "l2" else 0])
    drawn = torch.tensor(places).to(images.device)
    side_of = torch.tensor(sides).to(images.device)
    return _Moves(side_of, drawn[:, :2], torch.stack(signs).to(images), drawn[:, 2:4], drawn[:, 4] == 1)


def _windows(corner: Tensor, side: Tensor, images: Tensor) -> Tensor:
    """Return masks (m, 1, h, w) of windows."""
    top, left = corner[:, :1], corner[:, 1:]
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[-2:])
    high = (rows >= top) & (rows < top + side[:, None])
    wide = (columns >= left) & (columns < left + side[:, None])
    return high[:, None, :, None] & wide[:, None, None, :]


def _propose_linf(clean: Tensor, images: Tensor, epsilon: float, moves: _Moves) -> Tensor:
    window = _windows(moves.corner, moves.side, images)
    return project(clean, images + 2 * epsilon * moves.signs * window, epsilon, "linf")


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


def _propose_l2(clean: Tensor, images: Tensor, epsilon: float, moves: _Moves) -> Tensor:
    """Replace the change in one window by a bump, with the norm of a second window and what the box has left."""
    change = images - clean
    into, out = (_windows(corner, moves.side, images) for corner in (moves.corner, moves.source))
    budget = (epsilon**2 - change.square().flatten(1).sum(1)).clamp_min(0)[:, None, None, None] / clean.shape[1]
    budget = budget + (change * (into | out)).square().sum((2, 3), keepdim=True)
    placed = clean.new_zeros(len(clean), 1, *clean.shape[-2:])  # the bump of each window in an empty image
    bumps = {side: _bump(side).to(clean) for side in set(moves.side.tolist())}
    listed = zip(moves.side.tolist(), moves.corner.tolist(), moves.turned.tolist(), strict=True)
    for image, (side, (top, left), turned) in zip(placed[:, 0], listed, strict=True):
        image[top : top + side, left : left + side] = bumps[side].T if turned else bumps[side]
    new = _unit(moves.signs * placed + _unit(change * into)) * budget.sqrt()
    return _on_sphere(clean, torch.where(into, new, change.masked_fill(out, 0)), epsilon)


def _unit(change: Tensor) -> Tensor:
    """Return changes (m, c, h, w) scaled to a norm of 1 in each channel."""
    return change / change.square().sum((2, 3), keepdim=True).sqrt().clamp_min(TINY)
