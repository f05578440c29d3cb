"""Initialisers against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from vismt.lowrank.svd import kaiming, principal


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
def test_product_is_the_top_part_for_any_scale(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(*shape, generator=generator(1))
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    A, B = principal(weight, 3, scale, generator=generator())
    top = (U[:, :3] * S[:3]) @ Vh[:3]
    # Forgetting 1/scale under the root is right for scale 1 alone.
    assert torch.allclose(scale * (B @ A).double(), top, atol=1e-5)
    balanced = torch.diag(S[:3] / scale)
    assert torch.allclose((A @ A.T).double(), balanced, atol=1e-5)
    assert torch.allclose((B.T @ B).double(), balanced, atol=1e-5)
    rest = torch.linalg.matrix_norm(weight.double() - scale * (B @ A).double(), 2)
    assert torch.allclose(rest, S[3], rtol=1e-5)


def test_golden_diagonal() -> None:
    A, B = principal(torch.diag(torch.tensor([4.0, 9.0, 1.0])), 1, 1.0, generator=generator())
    # The largest singular value is 9 at index 1: |A| = |B| = sqrt(9) = 3 there.
    assert torch.allclose(A.abs(), torch.tensor([[0.0, 3.0, 0.0]]))
    assert torch.allclose(B.abs(), torch.tensor([[0.0], [3.0], [0.0]]))


def test_randomised_range_finder_is_seeded_and_accurate() -> None:
    spectrum = 2 * 0.9 ** torch.arange(48.0)
    left, right = (torch.linalg.qr(torch.randn(48, 48, generator=generator(s))).Q for s in (2, 3))
    weight = (left * spectrum) @ right
    exact = principal(weight, 4, 1.0, generator=generator())
    first, again, other = (principal(weight, 4, 1.0, method="randomized", generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    for pair in (first, other):
        product, best = pair[1] @ pair[0], exact[1] @ exact[0]
        assert torch.linalg.matrix_norm(product - best) < 0.05 * torch.linalg.matrix_norm(best)


def test_rank_deficient_weight_gives_finite_factors() -> None:
    weight = torch.outer(torch.arange(1.0, 5.0), torch.ones(6))
    A, B = principal(weight, 3, 1.0, generator=generator())
    assert torch.isfinite(A).all() and torch.isfinite(B).all() and torch.allclose(B @ A, weight, atol=1e-5)
    A, B = principal(torch.zeros(3, 3), 2, 1.0, generator=generator())
    assert torch.equal(B @ A, torch.zeros(3, 3))


def test_kaiming_bounds_and_zero() -> None:
    A, B = kaiming(torch.zeros(7, 100), 50, generator())
    # U(-b, b) with b = 1 / sqrt(100) = 0.1 has standard deviation b / sqrt(3) = 0.0577
    assert A.abs().max() <= 0.1 and abs(float(A.std()) - 0.0577) < 0.002 and not B.any()
