"""The low-rank factors: golden spectra by hand, and laws that hold for any shape, core and scale."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank


def draw(seed, out, inp, rank, core="none", scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    middle = {"none": None, "diagonal": normal(rank), "matrix": normal(rank, rank)}[core]
    return LowRank(normal(out, rank), normal(rank, inp), middle, scale)


def dense(a):
    """The definition, written with explicit sums over the core: an independent reference for every layout."""
    core = torch.eye(a.rank, dtype=a.B.dtype) if a.core is None else a.core
    core = torch.diag(core) if core.ndim == 1 else core
    return a.scale * torch.einsum("ok,kj,ji->oi", a.B, core, a.A)


anything = st.builds(
    draw,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(["none", "diagonal", "matrix"]),
    st.sampled_from([1.0, 0.5, -2.0, 16.0]),
)


def test_delta_and_apply_by_hand():
    # L = [[1, 0], [0, 2], [1, 1]], C = [[0, 3], [1, 0]], R = [[1, 2], [0, 1]], scale 1/2.
    # L C = [[0, 3], [2, 0], [1, 3]];  L C R = [[0, 3], [2, 4], [1, 5]];  halved [[0, 1.5], [1, 2], [.5, 2.5]].
    # A transposed core would give L C^T R = [[0, 1], [6, 12], [3, 7]].
    a = LowRank(
        torch.tensor([[1.0, 0], [0, 2], [1, 1]]),
        torch.tensor([[1.0, 2], [0, 1]]),
        torch.tensor([[0.0, 3], [1, 0]]),
        0.5,
    )
    expected = torch.tensor([[0, 1.5], [1, 2], [0.5, 2.5]])
    assert torch.equal(a.delta(), expected)
    assert a.shape == (3, 2) and a.rank == 2
    # x = (2, -1): (0 - 1.5, 2 - 2, 1 - 2.5) = (-1.5, 0, -1.5)
    assert torch.equal(a.apply(torch.tensor([[2.0, -1.0]])), torch.tensor([[-1.5, 0.0, -1.5]]))


def test_spectrum_by_hand():
    # L = 3-4-5 columns scaled: columns (3, 4)/5 * 2 and (-4, 3)/5, R = identity, scale 3 -> singular values 6 and 3.
    left = torch.tensor([[1.2, -0.8], [1.6, 0.6]], dtype=torch.float64)
    a = LowRank(left, torch.eye(2, dtype=torch.float64), None, 3.0)
    assert a.svd().core.tolist() == pytest.approx([6.0, 3.0], abs=1e-12)
    # stable rank = (36 + 9) / 36 = 1.25
    assert a.stable_rank() == pytest.approx(1.25, abs=1e-12)
    # the rank-1 truncation leaves an error of exactly the dropped singular value, 3
    assert float(torch.linalg.norm(a.delta() - a.truncate(1).delta())) == pytest.approx(3.0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_every_form_is_the_same_matrix(a):
    reference = dense(a)
    tolerance = 1e-11 * max(1.0, float(reference.abs().max()))
    x = torch.randn(2, 3, a.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forms = {"itself": a, "svd": a.svd(), "balanced": a.balanced(), "compact": a.compact(), "all": a.truncate(a.rank)}
    for name, form in forms.items():
        assert torch.allclose(form.delta(), reference, rtol=0, atol=tolerance), name
        assert torch.allclose(form.apply(x), x @ reference.T, rtol=0, atol=20 * tolerance), name


@settings(max_examples=60, deadline=None)
@given(anything)
def test_svd_is_the_dense_svd(a):
    values = torch.linalg.svdvals(dense(a))
    s = a.svd()
    m = min(a.rank, *a.shape)
    assert s.rank == m and s.scale == 1.0
    assert torch.allclose(s.core, values[:m], rtol=1e-10, atol=1e-10)
    eye = torch.eye(m, dtype=torch.float64)
    assert torch.allclose(s.B.T @ s.B, eye, atol=1e-11) and torch.allclose(s.A @ s.A.T, eye, atol=1e-11)
    assert a.stable_rank() == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-9)
    assert 1 - 1e-12 <= a.stable_rank() <= m + 1e-9


@settings(max_examples=40, deadline=None)
@given(anything, st.data())
def test_truncation_is_eckart_young(a, data):
    rank = data.draw(st.integers(1, a.rank))
    values = torch.linalg.svdvals(dense(a))
    error = torch.linalg.norm(dense(a) - a.truncate(rank).delta())
    assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-9)


def test_compact_drops_only_what_is_zero():
    a = draw(0, 8, 7, 3)
    doubled = LowRank(torch.cat([a.B, a.B], 1), torch.cat([a.A, a.A], 0), None, 0.5)
    assert doubled.rank == 6 and doubled.compact().rank == 3
    assert torch.allclose(doubled.compact().delta(), a.delta(), atol=1e-12)
    # singular values 4, 2, 1: a tolerance of 0.3 keeps those above 1.2, one of 0.5 keeps those strictly above 2
    b = LowRank(torch.eye(3), torch.eye(3), torch.tensor([4.0, 2.0, 1.0]))
    assert [b.compact(t).rank for t in (0.0, 0.3, 0.5)] == [3, 2, 1]


def test_zero_matrix():
    zero = LowRank(torch.zeros(5, 3), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert zero.stable_rank() == 0.0
    assert zero.compact().rank == 1
    assert zero.balanced().delta().abs().max() == 0


def test_balanced_splits_evenly():
    a = draw(3, 6, 5, 4, "matrix", 2.0).balanced()
    assert a.core is None and a.scale == 1.0
    assert torch.allclose(a.B.T @ a.B, a.A @ a.A.T, atol=1e-11)


def test_half_precision_accumulates_in_fp32():
    a = draw(5, 40, 30, 16, "matrix", 0.5, torch.bfloat16)
    exact = dense(a.to(dtype=torch.float64))
    assert a.delta().dtype == torch.float32 and a.svd().B.dtype == torch.float32
    assert float((a.delta() - exact).abs().max() / exact.abs().max()) < 1e-6
    x = torch.ones(2, 30, dtype=torch.float16)
    assert a.apply(x).dtype == torch.float16


def test_to_and_gradients():
    a = draw(2, 4, 5, 2, "diagonal", 2.0)
    assert a.to(dtype=torch.float32).core.dtype == torch.float32
    assert a.to("meta").B.is_meta and a.to("meta").scale == 2.0
    leaf = LowRank(*(t.clone().requires_grad_() for t in (a.B, a.A, a.core)), a.scale)
    leaf.apply(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    # d/dcore_k of scale * sum_o L_ok * core_k * sum_i R_ki = scale * (column sum of L) * (row sum of R)
    assert torch.allclose(leaf.core.grad, 2.0 * a.B.sum(0) * a.A.sum(1))


def test_the_full_matrix_is_never_formed():
    # a 200,000 x 200,000 matrix would need 160 GB
    wide = draw(0, 200_000, 200_000, 2, "matrix", 1.0, torch.float32)
    assert 1 <= wide.stable_rank() <= 2
    assert wide.truncate(1).shape == (200_000, 200_000)
    assert wide.apply(torch.ones(1, 200_000)).shape == (1, 200_000)


@pytest.mark.parametrize(
    ("left", "right", "core"),
    [
        ((4, 2), (3, 5), None),
        ((4, 2, 1), (2, 5), None),
        ((4, 0), (0, 5), None),
        ((4, 2), (2, 5), (3,)),
        ((4, 2), (2, 5), (2, 3)),
        ((4, 2), (2, 5), (1, 2, 2)),
    ],
)
def test_wrong_shapes_name_both(left, right, core):
    with pytest.raises(UserError) as caught:
        LowRank(torch.ones(left), torch.ones(right), None if core is None else torch.ones(core))
    assert str(left) in str(caught.value) and str(right) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_must_be_finite(scale):
    with pytest.raises(UserError, match="not finite"):
        LowRank(torch.ones(2, 1), torch.ones(1, 2), None, scale)


@pytest.mark.parametrize("rank", [0, 4])
def test_truncate_out_of_range(rank):
    with pytest.raises(UserError, match=r"outside 1\.\.3"):
        draw(0, 5, 5, 3).truncate(rank)
