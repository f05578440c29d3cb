"""Both ends of a spectrum: energies against the optimum, seeds, scales, and hard shapes; and the start values made from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vismt.lowrank import svd as solvers
from vismt.lowrank.svd import kaiming, principal, top_exact, top_randomized


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, columns: int, spectrum: Tensor, seed: int = 1) -> Tensor:
    small = len(spectrum)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator(seed), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator(seed + 1), dtype=torch.float64)).Q
    return ((left * spectrum) @ right.T).float()


def lost(weight: Tensor, U: Tensor, rank: int) -> float:
    """Share of the optimal captured energy that U (o, r) misses."""
    best = torch.linalg.svdvals(weight.double())[:rank].square().sum()
    return 1 - float((U.double().T @ weight.double()).square().sum() / best)


INDEX = torch.arange(160, dtype=torch.float64)
SPECTRA = {
    "slow decay": 2 * 0.98**INDEX,
    "power law": 1 / (1 + INDEX) ** 0.3,
    "flat": torch.linspace(1, 0.8, 160, dtype=torch.float64),
    "outlier": torch.cat([torch.tensor([1e3]).double(), 1 - INDEX[1:] / 300]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(160, 160), (200, 160), (160, 200)])
def test_range_finder_captures_the_optimal_energy_where_power_steps_do_not(name: str, shape: tuple[int, int]) -> None:
    weight, rank = matrix(*shape, SPECTRA[name]), 8
    U, S, Vh = top_randomized(weight, rank, generator())
    plain = lost(weight, torch.svd_lowrank(weight, q=rank, niter=4)[0], rank)
    assert abs(lost(weight, U, rank)) < (5e-3 if name == "flat" else 1e-3)
    assert plain < 1e-3 or lost(weight, U, rank) < plain / 10
    assert torch.allclose(U.T @ U, torch.eye(rank), atol=1e-5) and torch.allclose(Vh @ Vh.T, torch.eye(rank), atol=1e-4)
    # Projected exactly on the side that was iterated, the smaller one.
    projected, expected = (weight @ Vh.T, U * S) if shape[0] > shape[1] else (U.T @ weight, S[:, None] * Vh)
    assert torch.allclose(projected, expected, atol=1e-5 * float(S[0]))
    assert (S[:-1] >= S[1:] - 1e-5 * S[0]).all()


def test_four_power_steps_miss_a_flat_spectrum() -> None:
    weight = torch.randn(160, 160, generator=generator(7))
    assert lost(weight, torch.svd_lowrank(weight, q=8, niter=4)[0], 8) > 0.03
    assert lost(weight, top_randomized(weight, 8, generator())[0], 8) < 1e-3


def test_more_steps_capture_more(monkeypatch) -> None:
    weight = torch.randn(160, 160, generator=generator(7))
    losses = []
    for steps in (1, 2, 5, 10, 20):
        monkeypatch.setattr(solvers, "_STEPS", steps)
        losses.append(lost(weight, top_randomized(weight, 8, generator())[0], 8))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-4 < losses[1]


def test_large_matrices_go_without_the_gram_matrix(monkeypatch) -> None:
    weight = matrix(160, 200, SPECTRA["slow decay"])
    with_gram = top_randomized(weight, 8, generator())
    monkeypatch.setattr(solvers, "GRAM_PAYS", 0)
    without = top_randomized(weight, 8, generator())
    products = [(U * S) @ Vh for U, S, Vh in (with_gram, without)]
    assert torch.allclose(*products, atol=1e-4)


def test_the_seed_decides_and_no_other_random_state_is_touched() -> None:
    weight = torch.randn(40, 50, generator=generator(3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = top_randomized(weight, 4, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = top_randomized(weight, 4, generator(5)), top_randomized(weight, 4, generator(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("finder", [top_exact, lambda weight, rank: top_randomized(weight, rank, generator())])
def test_zero_small_and_deficient_matrices(finder) -> None:
    for weight in (torch.zeros(6, 4), torch.ones(6, 4), torch.randn(3, 5, generator=generator()), torch.eye(4) * 1e-12):
        rank = min(weight.shape)
        U, S, Vh = finder(weight, rank)
        assert all(value.isfinite().all() for value in (U, S, Vh)) and U.shape == (len(weight), rank)
        assert torch.allclose(((U * S) @ Vh).float(), weight, atol=1e-5 * float(weight.abs().max()))


def test_the_number_of_threads_changes_no_bit() -> None:
    from helpers.tiny import tiny_vit

    import vismt

    before = torch.get_num_threads()
    factors = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = tiny_vit()
            vismt.adapt(model, "pissa", rank=4)
            factors.append(model.blocks[1].mlp.fc2.lora_A)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*factors)


# ---- start values
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
    A, B = kaiming(torch.zeros(7, 100), 50, 1.0, generator())
    # U(-b, b) with b = 1 / sqrt(100) = 0.1 has standard deviation b / sqrt(3) = 0.0577
    assert A.abs().max() <= 0.1 and abs(float(A.std()) - 0.0577) < 0.002 and not B.any()
