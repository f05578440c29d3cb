"""Largest one-to-one matching of boundary pixels within a radius, for many maps of one image.

A matching is grown along augmenting paths until there is none, which proves it largest (Berge). All paths of a round come
from one breadth-first search out of all free true pixels (Azad, Buluc, Pothen, IEEE TPDS 28(1), 2017): its trees share no
pixel, so each can hand out one path. A map starts from the matching of the map before, as maps of neighbouring thresholds
differ little. scipy's maximum_bipartite_matching takes exponential time on pixels along lines (scipy issue 26147, open at
1.17: no answer within minutes on one map of 240 x 320), and its maximum_flow 0.1 to 0.4 s a map, which the tests compare with.
"""

from __future__ import annotations

import numpy as np


class PixelMatching:
    """Matchings of true pixels with candidates at most `radius` apart; truth and candidates: bool (h, w)."""

    def __init__(self, truth: np.ndarray, candidates: np.ndarray, radius: float) -> None:
        (height, width), (rows, columns) = truth.shape, np.nonzero(truth)
        reach = min(int(radius), max(height, width))
        span = np.arange(-reach, reach + 1)
        offsets = np.stack(np.meshgrid(span, span), -1).reshape(-1, 2)
        squared = (offsets**2).sum(1)
        # Nearest first, and the sort below is stable: among free candidates the nearest is taken.
        offsets = offsets[np.argsort(squared, kind="stable")][: (squared <= radius * radius).sum()]
        true, pixel = [], []
        for dy, dx in offsets:
            y, x = rows + dy, columns + dx
            inside = np.nonzero((y >= 0) & (y < height) & (x >= 0) & (x < width))[0]
            near = inside[candidates[y[inside], x[inside]]]
            true.append(near)
            pixel.append(y[near] * width + x[near])
        order = np.argsort(np.concatenate(true), kind="stable")
        self.true = np.concatenate(true)[order]  # one entry a pair, ascending
        self.pixels, self.candidate = np.unique(np.concatenate(pixel)[order], return_inverse=True)
        self.mate = np.full(len(rows), -1)  # the candidate of each true pixel, -1: none

    def size(self, chosen: np.ndarray) -> int:
        """How many true pixels can have a pixel of `chosen`, bool (h, w), a subset of the candidates, for their own."""
        if not len(self.pixels):
            return 0
        present = chosen.ravel()[self.pixels]
        kept = present[self.candidate]
        true, candidate = self.true[kept], self.candidate[kept]
        mate = self.mate
        mate[(mate >= 0) & ~present[mate]] = -1
        owner = np.full(len(self.pixels), -1)
        owner[mate[mate >= 0]] = np.nonzero(mate >= 0)[0]
        _grow(true, candidate, mate, owner)
        while _augment(true, candidate, mate, owner):
            pass
        return int((mate >= 0).sum())


def _grow(true: np.ndarray, candidate: np.ndarray, mate: np.ndarray, owner: np.ndarray) -> None:
    """Pair free true pixels with free candidates until none of the pairs given is free on both sides."""
    while True:
        free = (mate[true] < 0) & (owner[candidate] < 0)
        true, candidate = true[free], candidate[free]
        if not len(true):
            return
        wanting, first = np.unique(true, return_index=True)
        taken, winner = np.unique(candidate[first], return_index=True)
        mate[wanting[winner]], owner[taken] = taken, wanting[winner]


def _augment(true: np.ndarray, candidate: np.ndarray, mate: np.ndarray, owner: np.ndarray) -> bool:
    """One round of disjoint augmenting paths; False when there is none."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order

    free = owner[candidate] < 0
    roots = np.unique(true[mate[true] < 0])
    if not len(roots) or not free.any():
        return False
    source = len(mate)
    # A true pixel can push another one off its candidate; the exits are those that have a free candidate to go to.
    exits = np.full(source + 1, -1)
    exits[true[free][::-1]] = candidate[free][::-1]
    pushed = np.concatenate([owner[candidate[~free]], roots])
    ends = np.cumsum(np.append(np.bincount(true[~free], minlength=source), len(roots)))
    graph = csr_matrix((np.ones(len(pushed)), pushed, np.append(0, ends)), shape=(source + 1, source + 1))
    order, parent = breadth_first_order(graph, source)
    found = order[exits[order] >= 0]
    if not len(found):
        return False
    # One path for each free candidate and for each tree, the shortest.
    found = found[np.sort(np.unique(exits[found], return_index=True)[1])]
    found = found[np.unique(_tree(parent, source)[found], return_index=True)[1]]
    given = exits[found]
    while len(found):
        left = mate[found]
        mate[found], owner[given] = given, found
        found, given = parent[found[left >= 0]], left[left >= 0]
    return True


def _tree(parent: np.ndarray, source: int) -> np.ndarray:
    """The root, a child of the source, above each node that was reached."""
    above = np.where((parent < 0) | (parent == source), np.arange(len(parent)), parent)
    while True:
        higher = above[above]
        if (higher == above).all():
            return above
        above = higher
