"""Largest one-to-one matching of boundary pixels within a radius, for many maps of the same image.

The matching is extended along augmenting paths until there is none, which proves that it is the largest (Berge): a search in
breadth from a free pixel of one side passes to those that hold a pixel of the other side within its radius, until one there is
free. Pixels that a search without result has reached lie on no path, and no later search of the same map visits them. Searches
start on the side with fewer free pixels. A map starts from the matching of the map before, because maps of neighbouring
thresholds differ little.

scipy's maximum_bipartite_matching takes exponential time on pixels along lines (scipy issue 26147, open at 1.17: no result
within minutes on a map of 240 x 320), and its maximum_flow, the reference of the tests, 0.1 to 0.4 s a map.
"""

from __future__ import annotations

import numpy as np

from vismt.base.compiled import Compiled

FREE, ABSENT = -1, -2


def matching_sizes(truth: np.ndarray, maps: np.ndarray, radius: float) -> np.ndarray:
    """Return the size of the largest matching of each map with the truth, int64 (n,).

    Args:
        truth: bool (h, w), the true pixels.
        maps: bool (n, h, w), the candidates.
        radius: largest distance of matched pixels, in pixels.
    """
    reach = min(int(radius), max(truth.shape))
    span = np.arange(-reach, reach + 1)
    offsets = np.stack(np.meshgrid(span, span), -1).reshape(-1, 2)
    squared = (offsets**2).sum(1)
    # Nearest first: a pixel takes the nearest free candidate.
    offsets = offsets[np.argsort(squared, kind="stable")][: (squared <= radius * radius).sum()]
    border = ((reach, reach), (reach, reach))  # which no offset leaves
    steps = offsets[:, 0] * (truth.shape[1] + 2 * reach) + offsets[:, 1]
    true = np.flatnonzero(np.pad(truth, border))
    padded = np.pad(maps, ((0, 0), *border)).reshape(len(maps), -1)
    # For each place of one side its partner's place on the other, FREE for none, ABSENT where this side has no pixel.
    candidate_of, true_of = np.full((2, padded.shape[1]), ABSENT, dtype=np.int32)
    candidate_of[true] = FREE
    sizes, before = [], true[:0]
    for present in padded:
        true_of[before] = ABSENT
        before = np.flatnonzero(present)
        true_of[before] = FREE
        held = candidate_of[true]
        candidate_of[true[(held >= 0) & ~present[held]]] = FREE
        matched = true[candidate_of[true] >= 0]
        true_of[candidate_of[matched]] = matched
        sides = [
            (candidate_of, true_of, true[candidate_of[true] < 0]),
            (true_of, candidate_of, before[true_of[before] < 0]),
        ]
        _extend(*min(sides, key=lambda side: len(side[2])), steps)
        sizes.append(np.count_nonzero(candidate_of[true] >= 0))
    return np.array(sizes, dtype=np.int64)


@Compiled
def _extend(partner: np.ndarray, other: np.ndarray, starts: np.ndarray, steps: np.ndarray) -> None:
    """Make a matching the largest, in place.

    partner, other: int32 (places,), the partners of the side of the free pixels `starts`, and of the other side. steps: from
    a place to those within the radius.
    """
    reached = np.zeros(len(partner), dtype=np.bool_)  # by this search, or by one that found no path
    above, queue = np.empty_like(partner), np.empty_like(partner)  # above: the place from which a search came
    for start in starts:
        queue[0], above[start], reached[start] = start, -1, True
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            place = queue[head]
            head += 1
            for step in steps:
                holder = other[place + step]
                if holder == FREE:
                    end = place + step
                    break
                if holder >= 0 and not reached[holder]:
                    above[holder], reached[holder], queue[tail] = place, True, holder
                    tail += 1
        if end >= 0:
            reached[queue[:tail]] = False
            while place >= 0:
                partner[place], end = end, partner[place]
                other[partner[place]] = place
                place = above[place]
