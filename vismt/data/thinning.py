"""Morphological thinning of many binary maps at once, 64 to a word.

The two-subiteration algorithm A1 of Lam, Lee and Suen (IEEE PAMI 14(9), 1992) until nothing changes, which is what Matlab's
bwmorph(map, 'thin', Inf) does. The conditions are Boolean functions of the 8 neighbours x1 (east) to x8, counter-clockwise:

    G1   exactly one i of 1..4 has x_{2i-1} = 0 and (x_{2i} or x_{2i+1})                     the pixel does not connect two parts
    G2   2 <= min(#{k: x_{2k-1} or x_{2k}}, #{k: x_{2k} or x_{2k+1}}) <= 3                   it is neither an end nor inside
    G3   not ((x2 or x3 or not x8) and x1),  in the second subiteration with every index + 4

Each bit of an integer is one map, so bitwise operators evaluate the conditions for all maps of a word. Pixels beyond the border
are 0. Maps are processed in bands of rows whose intermediate results stay in the cache, while something changes near a band.
"""

from __future__ import annotations

import numpy as np

AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))  # x1 to x8 as (row, column)
BAND = 8192  # words


def thin(maps: np.ndarray) -> np.ndarray:
    """Return the thinned maps, same shape and dtype.

    maps: (h, w) bool, or unsigned integers whose bits are one map each.
    """
    height, width = maps.shape
    rows_per_band = max(1, BAND // width)
    bands = [slice(start, min(start + rows_per_band, height)) for start in range(0, height, rows_per_band)]
    padded = np.pad(maps, 1)
    inner, removed = padded[1:-1, 1:-1], np.zeros_like(maps)
    # The step after which band i last changed, at i + 1. If no band near it changed in the last two subiterations, it is done.
    last = np.zeros(len(bands) + 2, dtype=np.int64)
    step = 0
    while step - last.max() < 2:
        live = [(number, rows) for number, rows in enumerate(bands) if step - last[number : number + 3].max() < 2]
        for _, rows in live:
            near, count = padded[rows.start : rows.stop + 2], rows.stop - rows.start
            x = [near[1 + dy : 1 + dy + count, 1 + dx : 1 + dx + width] for dy, dx in (*AROUND, AROUND[0])]
            removed[rows] = inner[rows] & _removable(x, 4 * (step % 2))
        step += 1
        for number, rows in live:
            if removed[rows].any():
                inner[rows] ^= removed[rows]
                last[number + 1] = step
    return inner.copy()


def _removable(x: list[np.ndarray], turn: int) -> np.ndarray:
    """Return the pixels that meet G1, G2 and G3. x: x1 to x8 and x1 again; turn: 0 or 4, what G3 adds to its indices."""
    any_join, two_joins, _ = _tally([~x[2 * i] & (x[2 * i + 1] | x[2 * i + 2]) for i in range(4)])
    _, odd_two, odd_four = _tally([x[2 * k] | x[2 * k + 1] for k in range(4)])
    _, even_two, even_four = _tally([x[2 * k + 1] | x[2 * k + 2] for k in range(4)])
    blocked = (x[(1 + turn) % 8] | x[(2 + turn) % 8] | ~x[(7 + turn) % 8]) & x[turn]
    return any_join & ~two_joins & odd_two & even_two & ~(odd_four & even_four) & ~blocked


def _tally(four: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where at least one, at least two, and all of four are set."""
    a, b, c, d = four
    ab, cd = a | b, c | d
    both_ab, both_cd = a & b, c & d
    return ab | cd, both_ab | both_cd | (ab & cd), both_ab & both_cd
