"""Morphological thinning of many binary maps at once, with 64 pixels of a row in a word.

The two-subiteration algorithm A1 of Lam, Lee and Suen (IEEE PAMI 14(9), 1992) until nothing changes, which is what Matlab's
bwmorph(map, 'thin', Inf) does. The conditions are Boolean functions of the 8 neighbours x1 (east) to x8, counter-clockwise:

    G1   exactly one i of 1..4 has x_{2i-1} = 0 and (x_{2i} or x_{2i+1})                     the pixel does not connect two parts
    G2   2 <= min(#{k: x_{2k-1} or x_{2k}}, #{k: x_{2k} or x_{2k+1}}) <= 3                   it is neither an end nor inside
    G3   not ((x2 or x3 or not x8) and x1),  in the second subiteration with every index + 4

Pixels beyond the border are 0.
"""

from __future__ import annotations

import numpy as np

from vismt.base.compiled import Compiled


def thin(maps: np.ndarray) -> np.ndarray:
    """Return the thinned maps, bool (..., h, w).

    maps: Maps bool (..., h, w).
    """
    flat = maps.reshape(-1, *maps.shape[-2:])
    count, height, width = flat.shape
    # Pixel x of a row is bit x mod 64 of its word x // 64.
    packed = np.packbits(flat, axis=-1, bitorder="little")
    octets = np.zeros((count, height, 8 * -(-width // 64)), dtype=np.uint8)
    octets[..., : packed.shape[-1]] = packed
    words = octets.view("<u8").astype(np.uint64)
    padded = np.pad(words, ((0, 0), (1, 1), (1, 1)))
    for number, single in enumerate(padded):
        words[number] = _thinned(single)[1:-1, 1:-1]
    octets = np.ascontiguousarray(words.astype("<u8")).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=width, bitorder="little").view(bool).reshape(maps.shape)


@Compiled
def _thinned(now: np.ndarray) -> np.ndarray:
    """Return the thinned map of a map as words (h + 2, w + 2), with a border of one row and one word. `now` is overwritten."""
    one, last = np.uint64(1), np.uint64(63)  # numba makes floats of uint64 and int
    after = np.zeros_like(now)
    step, changed = 0, 0  # the last step that changed something
    while step - changed < 2:
        step += 1
        odd = step % 2 == 1
        removed = np.uint64(0)
        for y in range(1, now.shape[0] - 1):
            up, row, down = now[y - 1], now[y], now[y + 1]
            for x in range(1, now.shape[1] - 1):
                x1, x5 = (row[x] >> one) | (row[x + 1] << last), (row[x] << one) | (row[x - 1] >> last)
                x2, x4 = (up[x] >> one) | (up[x + 1] << last), (up[x] << one) | (up[x - 1] >> last)
                x8, x6 = (down[x] >> one) | (down[x + 1] << last), (down[x] << one) | (down[x - 1] >> last)
                x3, x7 = up[x], down[x]
                # G1: one of a to d. At least one and not two of four are tallied by pairs.
                a, b, c, d = ~x1 & (x2 | x3), ~x3 & (x4 | x5), ~x5 & (x6 | x7), ~x7 & (x8 | x1)
                meets = (a | b | c | d) & ~((a & b) | (c & d) | ((a | b) & (c | d)))
                # G2: at least two in both tallies, and not four in both.
                a, b, c, d = x1 | x2, x3 | x4, x5 | x6, x7 | x8
                meets &= (a & b) | (c & d) | ((a | b) & (c | d))
                all_odd = a & b & c & d
                a, b, c, d = x2 | x3, x4 | x5, x6 | x7, x8 | x1
                meets &= ((a & b) | (c & d) | ((a | b) & (c | d))) & ~(all_odd & a & b & c & d)
                blocked = (x2 | x3 | ~x8) & x1 if odd else (x6 | x7 | ~x4) & x5
                gone = row[x] & meets & ~blocked
                after[y, x] = row[x] ^ gone
                removed |= gone
        if removed:
            changed = step
        now, after = after, now
    return now
