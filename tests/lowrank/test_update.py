"""An update of one weight is one matrix, whatever it is made of."""

from __future__ import annotations

import pytest
import torch

from vismt.lowrank.factors import LowRank
from vismt.lowrank.update import Update


def drawn(rows: int, rank: int, columns: int, scale: float, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(*factors, scale=scale)


def test_the_rows_of_blocks_follow_each_other() -> None:
    blocks = drawn(3, 2, 5, 2.0, 0), drawn(4, 1, 5, -0.5, 1), drawn(2, 2, 5, 1.0, 2)
    update, D = Update(blocks), torch.cat([block.delta() for block in blocks])
    assert update.shape == D.shape == (9, 5)
    for start in range(9):
        for stop in range(start + 1, 11):  # chunks may end below the last row
            assert torch.allclose(update.delta(slice(start, stop)), D[start:stop], atol=1e-6)
    E = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    assert update.norm() == pytest.approx(float(D.norm()), rel=1e-6)
    assert update.product(E) == pytest.approx(float((E * D).sum()), rel=1e-4)
    assert torch.allclose(update.step(E[2:8], slice(2, 8), 0.5), 0.5 * D[2:8], atol=1e-6)


def test_magnitudes_give_the_rows_their_lengths() -> None:
    block, W, m = drawn(4, 2, 6, 2.0, 0), torch.ones(4, 6), torch.tensor([1.0, 2.0, 3.0, 4.0])
    merged = W[1:3] + Update((block,), m).step(W[1:3], slice(1, 3), 1.0)
    assert torch.allclose(merged.norm(dim=1), m[1:3])
    assert torch.allclose(
        merged / merged.norm(dim=1, keepdim=True), torch.nn.functional.normalize((W + block.delta())[1:3])
    )
