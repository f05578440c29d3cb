"""By which factor a merged weight holds an update, against weights that are made with a known one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from vismt.lowrank.factors import LowRank
from vismt.lowrank.update import Update
from vismt.verification.fit import BITS, fit_merge

HALF = (torch.bfloat16, torch.float16)


def drawn(
    ratio: float, dtype: torch.dtype, *, rank: int = 4, seed: int = 0, rows: int = 96, columns: int = 80
) -> tuple[Tensor, Update]:
    """Return a weight on the grid of a dtype, and an update of this relative size with scale 2."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator).to(dtype)
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    size = ratio * float(W.float().norm()) / Update((LowRank(B, A, scale=2.0),)).norm()
    return W, Update((LowRank(size * B, A, scale=2.0),))


def merged(W: Tensor, update: Update, factor: float, dtype: torch.dtype) -> Tensor:
    return (W.float() + factor * update.blocks[0].delta()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("factor", "rule"),
    [
        (0.0, "nothing"),
        (2.0, "twice"),
        (-1.0, "subtracted"),
        (4.0, "divided by the rank"),
        (0.5, "half"),
        (2.0, "twice the scale"),
    ],
)
def test_a_factor_is_named(dtype: torch.dtype, factor: float, rule: str) -> None:
    W, update = drawn(0.01, dtype)
    found = fit_merge(W, merged(W, update, factor, dtype), update, 4)
    assert found.kind == "factor" and found.factor == factor and rule in found.rule


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_factor_that_no_rule_makes_is_measured(dtype: torch.dtype) -> None:
    W, update = drawn(0.05, dtype)
    found = fit_merge(W, merged(W, update, 1.3, dtype), update, 4)
    assert found.kind == "factor" and found.factor == pytest.approx(1.3, abs=0.03) and not found.rule
    assert found.residual * 2.0 ** BITS[dtype] == pytest.approx(0.425, rel=0.05)  # the rounding of the merged weight


@pytest.mark.parametrize("dtype", HALF)
def test_a_right_merge_in_the_dead_zone_of_rounding_is_right(dtype: torch.dtype) -> None:
    """c is far from 1 there: a test of c against 1 calls this merge wrong."""
    W, update = drawn(1e-3 if dtype == torch.bfloat16 else 1e-4, dtype)
    found = fit_merge(W, merged(W, update, 1.0, dtype), update, 4)
    assert found.kind == "right" and found.scale < 0.7
    assert found.lost / found.norm > 0.5


def test_both_ways_to_round_are_right() -> None:
    W, update = drawn(3e-3, torch.bfloat16)
    twice = (W.float() + update.blocks[0].delta().bfloat16().float()).bfloat16()
    assert not torch.equal(twice, merged(W, update, 1.0, torch.bfloat16))
    assert fit_merge(W, twice, update, 4).kind == "right"
    wide = W.float() + 1e-4 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))  # rounded first
    assert fit_merge(wide, (wide.bfloat16().float() + update.blocks[0].delta()).bfloat16(), update, 4).kind == "right"


def test_an_update_that_moves_no_element_is_unresolved() -> None:
    W, update = drawn(1e-7, torch.bfloat16)
    assert fit_merge(W, merged(W, update, 1.0, torch.bfloat16), update, 4).kind == "unresolved"
    assert fit_merge(W, W + 1, update, 4).kind != "unresolved"


def test_other_changes_are_no_factor() -> None:
    W, update = drawn(0.05, torch.float32)
    _, other = drawn(0.05, torch.float32, seed=5)
    assert fit_merge(W, merged(W, other, 1.0, torch.float32), update, 4).kind == "other"
    both = merged(merged(W, update, 1.0, torch.float32), other, 1.0, torch.float32)
    found = fit_merge(W, both, update, 4)
    assert found.kind == "other" and found.cosine == pytest.approx(0.5**0.5, abs=0.05)
    assert fit_merge(W, W, Update((LowRank(torch.zeros(96, 4), torch.ones(4, 80)),)), 4).kind == "none"


def test_rslora_has_its_own_mistakes() -> None:
    W, update = drawn(0.05, torch.float32, rank=16)
    assert "rsLoRA" in fit_merge(W, merged(W, update, 0.25, torch.float32), update, 16, rslora=True).rule
    assert "rsLoRA" in fit_merge(W, merged(W, update, 4.0, torch.float32), update, 16).rule


def test_dora_scales_rows() -> None:
    W, plain = drawn(0.05, torch.float32)
    update = Update(plain.blocks, 1.1 * W.norm(dim=1))
    total = W + plain.blocks[0].delta()
    M = total * (update.magnitude / total.norm(dim=1))[:, None]  # type: ignore[operator]
    assert fit_merge(W, M, update, 4).kind == "right"
    assert fit_merge(W, total, update, 4).kind == "other"  # the magnitudes were left out
    assert fit_merge(W, W, update, 4).factor == 0.0

    def again(weight: Tensor, factor: float = 1.0) -> Tensor:
        total = weight + factor * plain.blocks[0].delta()
        return total * (update.magnitude / total.norm(dim=1))[:, None]  # type: ignore[operator]

    assert fit_merge(W, again(M), update, 4).rule == "it was merged twice"
    assert fit_merge(W, again(W, 2.0), update, 4).rule.startswith("twice the scale")


def test_no_false_alarm_over_sizes_and_dtypes() -> None:
    """150 right merges; 300 wrong ones of which only those below the resolution that is printed may pass."""
    generator = torch.Generator().manual_seed(0)
    for number in range(150):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        ratio = 10 ** float(-5 + 4.5 * torch.rand(1, generator=generator))
        W, update = drawn(ratio, dtype, rank=1 + number % 16, seed=number, rows=64, columns=72)
        assert fit_merge(W, merged(W, update, 1.0, dtype), update, 1 + number % 16).kind in ("right", "unresolved"), (
            number
        )
        for factor in (0.0, 2.0):
            found = fit_merge(W, merged(W, update, factor, dtype), update, 1 + number % 16)
            assert found.kind in ("factor", "other", "unresolved") or found.resolution > 0.1, (number, factor)


@pytest.mark.slow
def test_the_counts_of_the_guide_are_those_of_a_run() -> None:
    """1,500 random merges: no right one is called wrong, no listed factor is missed above the resolution."""
    generator = torch.Generator().manual_seed(0)

    def uniform() -> float:
        return float(torch.rand(1, generator=generator))

    counts: Counter[tuple[str, str]] = Counter()
    for number in range(1500):
        rows, columns = (64 + int(64 * uniform()) for _ in range(2))
        rank, scale = 1 + int(16 * uniform()), (0.5, 1, 2, 4)[int(4 * uniform())]
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        ratio = 10 ** (-5 + 4.5 * uniform())
        W = (torch.randn(rows, columns, generator=generator) / 8).to((dtype, torch.float32)[int(2 * uniform())])
        B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        size = ratio * float(W.float().norm()) / Update((LowRank(B, A, scale=scale),)).norm()
        update = Update((LowRank(size * B, A, scale=scale),))
        D, listed = update.blocks[0].delta(), (1.0, 1.0, 0.0, 2.0, -1.0, 0.5, 1 / scale, rank, rank**0.5, 0.8, 1.3)
        factor, twice = listed[number % 11], number % 11 == 3
        if uniform() < 0.5 and factor and dtype != torch.float32:
            M = (W.float() + (factor * D).to(dtype).float()).to(dtype)
        elif twice:
            M = ((W.float() + D).to(dtype).float() + D).to(dtype)
        else:
            M = (W.float() + factor * D).to(dtype)
        found = fit_merge(W, M, update, rank)
        near = found.kind == "factor" and abs((found.factor or 0.0) - factor) < 0.03 * max(1.0, abs(factor))
        group = "right" if abs(factor - 1) < 1e-3 else "other" if factor in (0.8, 1.3) else "listed"
        counts[group, "named" if group != "right" and near else found.kind] += 1
    assert counts["right", "right"] == 341 and counts["right", "unresolved"] == 2
    assert counts["listed", "named"] == 882 and counts["listed", "unresolved"] == 3
    assert counts["other", "named"] == 208 and counts["other", "right"] == 46 and counts.total() == 1500
