"""Largest one-to-one matching of boundary pixels within a radius, for many maps of the same image.

The matching is extended along augmenting paths until there is none, which proves that it is the largest (Berge). All paths of a
round come from a single breadth-first search from all free true pixels (Azad, Buluc, Pothen, IEEE TPDS 28(1), 2017): its trees
share no pixel, so each can contribute a path. What one search does not reach, no later one of the same map does. A map starts
from the matching of the map before, because maps of neighbouring thresholds differ little, and its pairs are selected from
those of half as many maps, down from all. scipy's maximum_bipartite_matching takes exponential time on pixels along lines (scipy
issue 26147, open at 1.17: no result within minutes on a map of 240 x 320), and its maximum_flow, the reference of the tests, 0.1
to 0.4 s a map.
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
        return int(self.sizes(chosen[None])[0])

    def sizes(self, maps: np.ndarray) -> np.ndarray:
        """Return the size of the largest matching with each map, int64 (n,); maps: bool (n, h, w), as in `size`."""
        if not len(self.pixels):
            return np.zeros(len(maps), dtype=np.int64)
        present = maps.reshape(len(maps), -1)[:, self.pixels]
        return np.array(self._sizes(present, self.true, self.candidate), dtype=np.int64)

    def _sizes(self, present: np.ndarray, true: np.ndarray, candidate: np.ndarray) -> list[int]:
        """Return the sizes by map. present: bool (n, candidates); true, candidate: pairs with all of these candidates."""
        used = present.any(0)[candidate]
        true, candidate = true[used], candidate[used]
        if len(present) == 1:
            return [self._size(present[0], true, candidate)]
        half = len(present) // 2
        return [*self._sizes(present[:half], true, candidate), *self._sizes(present[half:], true, candidate)]

    def _size(self, present: np.ndarray, true: np.ndarray, candidate: np.ndarray) -> int:
        """Return the size of the largest matching of the given pairs; present: bool (candidates,)."""
        mate = self.mate
        mate[(mate >= 0) & ~present[mate]] = -1
        owner = np.full(len(self.pixels), -1, dtype=np.int32)
        owner[mate[mate >= 0]] = np.nonzero(mate >= 0)[0]
        _grow(true, candidate, mate, owner)
        counts = np.bincount(true, minlength=len(mate))
        while (reached := _augment(true, candidate, counts, mate, owner)) is not None:
            kept = reached[true]
            true, candidate = true[kept], candidate[kept]
            counts[~reached] = 0
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


def _augment(
    true: np.ndarray, candidate: np.ndarray, counts: np.ndarray, mate: np.ndarray, owner: np.ndarray
) -> np.ndarray | None:
    """Augment the matching along disjoint paths; return the true pixels that the search reached, None without a path.

    counts: pairs of each true pixel.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order

    source = len(mate)
    roots = np.nonzero((mate < 0) & (counts > 0))[0]
    holder = owner[candidate]  # int32, which scipy takes as it is
    free = np.nonzero(holder < 0)[0]
    if not len(roots) or not len(free):
        return None
    # A true pixel can displace another one from its candidate; exits are pixels with a free candidate.
    exits = np.full(source + 1, -1)
    exits[true[free[::-1]]] = candidate[free[::-1]]
    holder[free] = source  # an edge that leads nowhere costs less than to leave it out
    indices = np.concatenate([holder, roots.astype(np.int32)])
    rows = np.zeros(source + 2, dtype=np.int32)
    np.cumsum(counts, out=rows[1:-1])
    rows[-1] = len(indices)
    graph = csr_matrix((np.ones(len(indices)), indices, rows), shape=(source + 1, source + 1))
    order, parent = breadth_first_order(graph, source)
    ends = order[exits[order] >= 0]
    if not len(ends):
        return None
    reached = np.zeros(source + 1, dtype=bool)
    reached[order] = True
    # For each free candidate and for each tree keep the shortest path alone.
    ends = ends[np.sort(np.unique(exits[ends], return_index=True)[1])]
    ends = ends[np.unique(_tree(parent, source)[ends], return_index=True)[1]]
    taken = exits[ends]
    while len(ends):
        released = mate[ends]
        mate[ends] = taken
        owner[taken] = ends
        ends, taken = parent[ends[released >= 0]], released[released >= 0]
    return reached[:source]


def _tree(parent: np.ndarray, source: int) -> np.ndarray:
    """Return the root, a child of the source, of each reached node."""
    above = np.where((parent < 0) | (parent == source), np.arange(len(parent)), parent)
    while True:
        higher = above[above]
        if (higher == above).all():
            return above
        above = higher
