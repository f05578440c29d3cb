"""Sums of adapters: exact for any ranks, cores and scales, and a single adapter is itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank.test_factors import dense, draw

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.combining import combine

CORES, SCALES = ["none", "diagonal", "matrix"], [1.0, 0.25, -3.0]


def test_by_hand():
    # a = 2 * [1, 0]^T [1, 1] = [[2, 2], [0, 0]];  b = 0.5 * [0, 4]^T [1, -1] = [[0, 0], [2, -2]].
    # 3 a - 1 b = [[6, 6], [-2, 2]]. Forgetting the scales would give [[3, 3], [-4, 4]].
    a = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 1.0]]), None, 2.0)
    b = LowRank(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0, -1.0]]), None, 0.5)
    expected = torch.tensor([[6.0, 6.0], [-2.0, 2.0]])
    assert torch.equal(combine([a, b], [3, -1]).delta(), expected)
    assert torch.allclose(combine([a, b], [3, -1], "svd").delta(), expected, atol=1e-5)
    # singular values 6 sqrt 2 and 2 sqrt 2: rank 1 leaves 2 sqrt 2
    left_over = expected - combine([a, b], [3, -1], "svd", rank=1).delta()
    assert float(torch.linalg.norm(left_over)) == pytest.approx(2 * math.sqrt(2), abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_both_methods_are_the_weighted_sum(data):
    out, inp = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    count = data.draw(st.integers(1, 4))
    parts = [
        draw(
            data.draw(st.integers(0, 999)),
            out,
            inp,
            data.draw(st.integers(1, 4)),
            data.draw(st.sampled_from(CORES)),
            data.draw(st.sampled_from(SCALES)),
        )
        for _ in range(count)
    ]
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    expected = sum(w * dense(p) for w, p in zip(weights, parts))
    for method in ("cat", "svd"):
        assert torch.allclose(combine(parts, weights, method).delta(), expected, rtol=0, atol=1e-10), method
    if weights != [1.0]:  # a single adapter is returned as it is
        assert combine(parts, weights, "svd").rank <= min(out, inp)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_one_adapter_of_weight_one_is_itself(core, scale, method):
    a = draw(4, 6, 5, 3, core, scale, torch.float32)
    b = combine([a], [1.0], method)
    assert torch.equal(a.B, b.B) and torch.equal(a.A, b.A) and a.scale == b.scale
    assert (a.core is None and b.core is None) or torch.equal(a.core, b.core)


def test_weight_zero_and_identical_parts():
    a, b = draw(1, 6, 5, 2), draw(2, 6, 5, 2)
    assert torch.allclose(combine([a, b], [1.0, 0.0], "svd").delta(), a.delta(), atol=1e-12)
    halves = combine([a, a], [0.3, 0.7], "svd")
    assert halves.rank == 2 and torch.allclose(halves.delta(), a.delta(), atol=1e-12)
    assert combine([a, a], [1.0, 1.0], "svd", rank=4).rank == 2  # a rank above that of the sum is accepted


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 adapters but 1 weights"),
        ([1.0, math.nan], "weight 1 is nan"),
        ([math.inf, 1.0], "weight 0 is inf"),
        (["a", 1.0], "weight 0 is 'a'"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        combine([draw(0, 4, 4, 2), draw(1, 4, 4, 2)], weights)


def test_other_errors():
    a, b = draw(0, 4, 4, 2), draw(1, 4, 5, 2)
    with pytest.raises(UserError, match=r"adapter 1 is for a \(4, 5\) weight, adapter 0 for \(4, 4\)"):
        combine([a, b], [1.0, 1.0])
    with pytest.raises(UserError, match="at least one"):
        combine([], [])
    with pytest.raises(UserError, match=r"no method 'svdd'\. Near: 'svd'"):
        combine([a], [1.0], "svdd")
    with pytest.raises(UserError, match="needs method='svd'"):
        combine([a], [0.5], "cat", rank=1)
    with pytest.raises(UserError, match=r"outside 1\.\.2"):
        combine([a], [0.5], "svd", rank=3)
    for rank in (1.5, 1.0, True, "1"):
        with pytest.raises(UserError, match=rf"rank is {rank!r}, give a whole number"):
            combine([a], [0.5], "svd", rank=rank)


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        ((draw(0, 4, 4, 2) for _ in range(1)), [1.0], "adapters is one generator"),
        ("folder", [1.0], "adapters is one str"),
        (draw(0, 4, 4, 2), [1.0], "adapters is one LowRank"),
        ([draw(0, 4, 4, 2)], 1.0, "weights is one float"),
        ([draw(0, 4, 4, 2)], (w for w in [1.0]), "weights is one generator"),
        ({"a": draw(0, 4, 4, 2)}, [1.0], "one dict"),
    ],
)
def test_single_values_in_place_of_lists_are_refused(adapters, weights, message):
    with pytest.raises(UserError, match=f"{message}; give a list"):
        combine(adapters, weights)


def test_weights_may_be_an_array():
    a, b = draw(0, 4, 4, 2), draw(1, 4, 4, 2)
    assert torch.equal(combine((a, b), np.array([0.5, -2.0])).delta(), combine([a, b], [0.5, -2.0]).delta())


def test_a_fifth_of_the_entries_is_dropped_by_default():
    parts = [draw(seed, 30, 30, 10, "none", 1.0) for seed in (0, 1)]
    by_default, fifth, more = (
        combine(parts, [1, 1], "core_dare", **drop).delta() for drop in ({}, {"drop": 0.2}, {"drop": 0.4})
    )
    assert torch.equal(by_default, fifth) and not torch.allclose(fifth, more)
