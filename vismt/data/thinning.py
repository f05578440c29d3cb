"""Morphological thinning of many binary maps at once, 64 pixels of a row to a word.

The two-subiteration algorithm A1 of Lam, Lee and Suen (IEEE PAMI 14(9), 1992) until nothing changes, which is what Matlab's
bwmorph(map, 'thin', Inf) does. The conditions are Boolean functions of the 8 neighbours x1 (east) to x8, counter-clockwise:

    G1   exactly one i of 1..4 has x_{2i-1} = 0 and (x_{2i} or x_{2i+1})                     the pixel does not connect two parts
    G2   2 <= min(#{k: x_{2k-1} or x_{2k}}, #{k: x_{2k} or x_{2k+1}}) <= 3                   it is neither an end nor inside
    G3   not ((x2 or x3 or not x8) and x1),  in the second subiteration with every index + 4

Pixels beyond the border are 0. A block, a band of rows of one map, takes part while something has changed in it or in the bands
beside it in the last two subiterations: most of the maps of a probability at many thresholds are thin long before the thickest.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

ROWS = 16  # of a block
BLOCKS = 128  # evaluated together, so that intermediate results stay in the cache
ONE, LAST = np.uint64(1), np.uint64(63)


def thin(maps: np.ndarray) -> np.ndarray:
    """Return the thinned maps, bool (..., h, w); maps: bool (..., h, w)."""
    flat = maps.reshape(-1, *maps.shape[-2:])
    count, height, width = flat.shape
    words = _packed(flat)
    bands, across = -(-height // ROWS), words.shape[-1]
    padded = np.zeros((count, bands * ROWS + 2, across + 2), dtype=np.uint64)
    padded[:, 1 : height + 1, 1:-1] = words
    by_map, by_row, by_word = padded.strides
    strides = (by_map, ROWS * by_row, by_row, by_word)
    blocks = as_strided(
        padded, (count, bands, ROWS + 2, across + 2), strides
    )  # with a border that overlaps the next block
    inner = as_strided(padded[:, 1:, 1:], (count, bands, ROWS, across), strides)
    changed = np.zeros((count, bands + 2), dtype=np.int64)  # the step after which band i last changed, at i + 1
    step = 0
    while True:
        near = np.maximum(np.maximum(changed[:, :-2], changed[:, 1:-1]), changed[:, 2:])
        which, band = np.nonzero(step - near < 2)
        if not len(which):
            return _unpacked(padded[:, 1 : height + 1, 1:-1], width).reshape(maps.shape)
        parts = [slice(start, start + BLOCKS) for start in range(0, len(which), BLOCKS)]
        removed = np.concatenate([_removable(blocks[which[part], band[part]], 4 * (step % 2)) for part in parts])
        step += 1
        moved = np.nonzero(removed.reshape(len(removed), -1).any(1))[0]
        inner[which[moved], band[moved]] ^= removed[moved]
        changed[which[moved], band[moved] + 1] = step


def _packed(maps: np.ndarray) -> np.ndarray:
    """Return words (n, h, ceil(w / 64)) of maps (n, h, w): pixel x is bit x mod 64 of word x // 64."""
    count, height, width = maps.shape
    packed = np.packbits(maps, axis=-1, bitorder="little")
    padded = np.zeros((count, height, 8 * -(-width // 64)), dtype=np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return padded.view("<u8").astype(np.uint64)


def _unpacked(words: np.ndarray, width: int) -> np.ndarray:
    """Return the maps (n, h, w) of words."""
    octets = np.ascontiguousarray(words.astype("<u8")).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=width, bitorder="little").view(bool)


def _removable(blocks: np.ndarray, turn: int) -> np.ndarray:
    """Return the pixels that meet G1, G2 and G3, words (b, h, w); turn: 0 or 4, what G3 adds to its indices.

    blocks: words (b, h + 2, w + 2), with a border of one row and one word.
    """
    centre = blocks[..., 1:-1]
    east = (centre >> ONE) | (blocks[..., 2:] << LAST)
    west = (centre << ONE) | (blocks[..., :-2] >> LAST)
    up, middle, down = slice(None, -2), slice(1, -1), slice(2, None)
    places = [(east, middle), (east, up), (centre, up), (west, up)]
    places += [(west, middle), (west, down), (centre, down), (east, down)]
    x = [np.ascontiguousarray(side[:, rows]) for side, rows in places]  # x1 to x8
    x.append(x[0])
    any_join, two_joins, _ = _tally([~x[2 * i] & (x[2 * i + 1] | x[2 * i + 2]) for i in range(4)])
    _, odd_two, odd_four = _tally([x[2 * k] | x[2 * k + 1] for k in range(4)])
    _, even_two, even_four = _tally([x[2 * k + 1] | x[2 * k + 2] for k in range(4)])
    blocked = (x[(1 + turn) % 8] | x[(2 + turn) % 8] | ~x[(7 + turn) % 8]) & x[turn]
    return centre[:, middle] & any_join & ~two_joins & odd_two & even_two & ~(odd_four & even_four) & ~blocked


def _tally(four: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where at least one, at least two, and all of four are set."""
    a, b, c, d = four
    ab, cd = a | b, c | d
    both_ab, both_cd = a & b, c & d
    return ab | cd, both_ab | both_cd | (ab & cd), both_ab & both_cd
