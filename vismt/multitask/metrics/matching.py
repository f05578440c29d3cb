"""Largest one-to-one matching of boundary pixels within a radius, for many maps of the same image.

The matching is extended along augmenting paths until there is none, which proves that it is the largest (Berge). All paths of a
round come from a single breadth-first search from all free true pixels (Azad, Buluc, Pothen, IEEE TPDS 28(1), 2017): its trees
share no pixel, so each can contribute a path. A map starts from the matching of the map before, because maps of neighbouring
thresholds differ little. scipy's maximum_bipartite_matching takes exponential time on pixels along lines (scipy issue 26147,
open at 1.17: no result within minutes on a map of 240 x 320), and its maximum_flow, the reference of the tests, 0.1 to 0.4 s a
map.
"""

from __future__ import annotations

import numpy as np


class PixelMatching:
    """Matchings of true pixels with candidate pixels at most `radius` apart; truth and candidates: bool (h, w)."""

    def __init__(self, truth: np.ndarray, candidates: np.ndarray, radius: float) -> None:
        (height, width), (rows, columns) = truth.shape, np.nonzero(truth)
        reach = min(int(radius), max(height, width))
        span = np.arange(-reach, reach + 1)
        offsets = np.stack(np.meshgrid(span, span), -1).reshape(-1, 2)
        squared = (offsets**2).sum(1)
        # Nearest first, and the sort below is stable: a pixel takes the nearest free candidate.
        offsets = offsets[np.argsort(squared, kind="stable")][: (squared <= radius * radius).sum()]
        true, pixel = [], []
        for dy, dx in offsets:
            y, x = rows + dy, columns + dx
            inside = np.nonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))[0]
            near = inside[candidates[y[inside], x[inside]]]
            true.append(near)
            pixel.append(y[near] * width + x[near])
        order = np.argsort(np.concatenate(true), kind="stable")
        self.true = np.concatenate(true)[order]  # one entry for each pair, ascending
        self.pixels, self.candidate = np.unique(np.concatenate(pixel)[order], return_inverse=True)
        self.mate = np.full(len(rows), -1)  # the candidate of each true pixel, -1 for none

    def size(self, chosen: np.ndarray) -> int:
        """Return the size of the largest matching with the pixels of `chosen`, bool (h, w), a subset of the candidates."""
        if not len(self.pixels):
            return 0
        present = chosen.ravel()[self.pixels]
        pairs = present[self.candidate]
        true, candidate = self.true[pairs], self.candidate[pairs]
        mate = self.mate
        mate[(mate >= 0) & ~present[mate]] = -1
        owner = np.full(len(self.pixels), -1)
        owner[mate[mate >= 0]] = np.nonzero(mate >= 0)[0]
        _grow(true, candidate, mate, owner)
        while _augment(true, candidate, mate, owner):
            pass
        return int((mate >= 0).sum())


def _grow(true: np.ndarray, candidate: np.ndarray, mate: np.ndarray, owner: np.ndarray) -> None:
    """Match free true pixels with free candidates until none of the given pairs is free on both sides."""
    while True:
        free = (mate[true] < 0) & (owner[candidate] < 0)
        true, candidate = true[free], candidate[free]
        if not len(true):
            return
        pixels, first = np.unique(true, return_index=True)
        matched, winner = np.unique(candidate[first], return_index=True)
        mate[pixels[winner]] = matched
        owner[matched] = pixels[winner]


def _augment(true: np.ndarray, candidate: np.ndarray, mate: np.ndarray, owner: np.ndarray) -> bool:
    """Augment the matching along disjoint paths; return False without a path."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order

    free = owner[candidate] < 0
    roots = np.unique(true[mate[true] < 0])
    if not len(roots) or not free.any():
        return False
    source = len(mate)
    # A true pixel can displace another one from its candidate; exits are pixels with a free candidate.
    exits = np.full(source + 1, -1)
    exits[true[free][::-1]] = candidate[free][::-1]
    displaced = np.concatenate([owner[candidate[~free]], roots])
    rows = np.cumsum(np.append(np.bincount(true[~free], minlength=source), len(roots)))
    graph = csr_matrix((np.ones(len(displaced)), displaced, np.append(0, rows)), shape=(source + 1, source + 1))
    order, parent = breadth_first_order(graph, source)
    ends = order[exits[order] >= 0]
    if not len(ends):
        return False
    # For each free candidate and for each tree keep the shortest path alone.
    ends = ends[np.sort(np.unique(exits[ends], return_index=True)[1])]
    ends = ends[np.unique(_tree(parent, source)[ends], return_index=True)[1]]
    taken = exits[ends]
    while len(ends):
        released = mate[ends]
        mate[ends] = taken
        owner[taken] = ends
        ends, taken = parent[ends[released >= 0]], released[released >= 0]
    return True


def _tree(parent: np.ndarray, source: int) -> np.ndarray:
    """Return the root, a child of the source, of each reached node."""
    above = np.where((parent < 0) | (parent == source), np.arange(len(parent)), parent)
    while True:
        higher = above[above]
        if (higher == above).all():
            return above
        above = higher
