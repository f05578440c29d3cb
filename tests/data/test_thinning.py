"""Thinning: by hand, and against skimage."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.blobs import blobs

from vismt.data import thinning
from vismt.data.thinning import thin


def test_a_bar_is_thinned_to_its_middle_and_a_line_stays() -> None:
    bar = np.zeros((5, 9), dtype=bool)
    bar[1:4] = True
    rows = np.nonzero(thin(bar))[0]
    assert set(rows) == {2} and 6 <= len(rows) <= 9
    line = np.eye(6, dtype=bool)
    assert (thin(line) == line).all()


@pytest.mark.parametrize("band", [40, 8192])
def test_thinning_is_that_of_skimage_for_all_maps_of_a_word(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    skimage = pytest.importorskip("skimage.morphology")
    monkeypatch.setattr(thinning, "BAND", band)  # bands of rows, few or many, change nothing
    maps = [blobs(23, 31, sigma, seed) > 0.5 for seed, sigma in enumerate(np.linspace(0.4, 5, 64))]
    words = np.zeros((23, 31), dtype=np.uint64)
    for bit, single in enumerate(maps):
        words |= single.astype(np.uint64) << np.uint64(bit)
    thinned = thin(words)
    for bit, single in enumerate(maps):
        want = skimage.thin(single)
        assert ((thinned >> np.uint64(bit) & np.uint64(1)) == want).all() and (thin(single) == want).all()
