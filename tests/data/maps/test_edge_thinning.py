"""Thinning: by hand, and against skimage."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.blobs import blobs

from vismt.data.maps.edge_thinning import thin


def test_a_bar_is_thinned_to_its_middle_and_a_line_stays() -> None:
    bar = np.zeros((5, 9), dtype=bool)
    bar[1:4] = True
    rows = np.nonzero(thin(bar))[0]
    assert set(rows) == {2} and 6 <= len(rows) <= 9
    line = np.eye(6, dtype=bool)
    assert (thin(line) == line).all()


@pytest.mark.parametrize("size", [(23, 31), (40, 130), (16, 64)])  # a part of a word, several words, one whole word
def test_thinning_is_that_of_skimage_for_all_maps(size: tuple[int, int]) -> None:
    skimage = pytest.importorskip("skimage.morphology")
    maps = np.stack([blobs(*size, sigma, seed) > 0.5 for seed, sigma in enumerate(np.linspace(0.4, 5, 24))])
    before = maps.copy()
    thinned = thin(maps)
    assert (maps == before).all() and thinned.dtype == bool
    for single, found in zip(maps, thinned):
        assert (found == skimage.thin(single)).all() and (thin(single) == found).all()
