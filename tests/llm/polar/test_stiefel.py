"""The landing field against its n x n definition, retractions, and the change of gauge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vismt.base.errors import UserError
from vismt.llm.polar.stiefel import (
    cayley_retraction,
    infeasibility,
    landing_field,
    orthonormalize,
    penalty_field,
    polar_retraction,
    pull,
    qr_retraction,
    stable_rank,
)
from vismt.lowrank.factors import LowRank


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(z, grad, attraction):
    """(G Z^T - Z G^T) Z + attraction Z (Z^T Z - I), with the n x n matrix."""
    return (grad @ z.T - z @ grad.T) @ z + attraction * z @ (z.T @ z - torch.eye(z.shape[1], dtype=z.dtype))


def test_by_hand():
    # Z = (2, 0)^T, G = (1, 3)^T, r = 1: K = 4; G K = (4, 12); G^T Z = 2; Z 2 = (4, 0); tangent (0, 12).
    # pull: attraction 0.5 * Z (4 - 1) = (3, 0). With 1/2 in the skew part it would be (0, 6), with the 4 (12, 0).
    field = landing_field(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [3.0]]), 0.5)
    assert field.tolist() == [[3.0], [12.0]]
    # the pull alone is Z (4 - 1) = (6, 0); the penalty adds half of it to G
    assert pull(torch.tensor([[2.0], [0.0]])).tolist() == [[6.0], [0.0]]
    assert penalty_field(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [3.0]]), 0.5).tolist() == [[4.0], [3.0]]
    # ||4 - 1||^2 = 9, the square
    assert float(infeasibility(torch.tensor([[2.0], [0.0]]))) == 9.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 6), st.integers(0, 6), st.floats(0, 3))
def test_field_equals_the_definition_and_its_terms_are_orthogonal(seed, rank, extra, attraction):
    n = rank + extra
    z, grad = normal(seed, n, rank), normal(seed + 1, n, rank)
    field = landing_field(z, grad, attraction)
    expected = by_definition(z, grad, attraction)
    assert torch.allclose(field, expected, rtol=1e-10, atol=1e-10)
    tangent = landing_field(z, grad, 0.0)
    pull = z @ (z.T @ z - torch.eye(rank, dtype=z.dtype))
    assert abs(float((tangent * pull).sum())) < 1e-9 * max(1.0, float(tangent.norm() * pull.norm()))
    # <T, G> = 1/2 ||G Z^T - Z G^T||_F^2 >= 0: never an ascent direction
    skew = grad @ z.T - z @ grad.T
    assert float((tangent * grad).sum()) == pytest.approx(0.5 * float(skew.square().sum()), rel=1e-8, abs=1e-9)


def test_tangent_on_the_manifold():
    z = torch.linalg.qr(normal(0, 9, 4))[0]
    tangent = landing_field(z, normal(1, 9, 4), 0.0)
    assert (z.T @ tangent + tangent.T @ z).abs().max() < 1e-12


def test_no_n_by_n_tensor():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Sizes():
        landing_field(normal(0, 300, 3), normal(1, 300, 3), 1.0)
        stable_rank(normal(0, 300, 3), normal(1, 3, 3), normal(2, 300, 3))
    assert max(sizes) == 900
    with Sizes():  # [P, Z] and [Z, -P] are the widest
        cayley_retraction(normal(0, 300, 3), normal(1, 300, 3))
    assert max(sizes) == 1800


def test_pull_is_the_gradient_of_a_quarter_of_the_infeasibility():
    z = normal(0, 7, 3).requires_grad_()
    infeasibility(z).backward()
    assert torch.allclose(4 * pull(z.detach()), z.grad)


def test_a_batch_is_its_members():
    z, step = torch.linalg.qr(normal(0, 4, 9, 3))[0], 0.1 * normal(1, 4, 9, 3)
    for function in (
        lambda z, step: landing_field(z + step, step, 0.3),
        lambda z, step: penalty_field(z + step, step, 0.3),
        qr_retraction,
        polar_retraction,
        cayley_retraction,
        lambda z, step: infeasibility(z + step),
        lambda z, step: stable_rank(z + step, step[..., :3, :], step),
    ):
        assert torch.allclose(function(z, step), torch.stack([function(*pair) for pair in zip(z, step)]), atol=1e-12)


def test_attraction_alone_reaches_the_manifold():
    # sigma <- sigma - 0.35 sigma (sigma^2 - 1): near 1 the error shrinks by 1 - 0.7 = 0.3 each step
    u, _, vh = torch.linalg.svd(normal(2, 12, 4), full_matrices=False)
    z = u @ torch.diag(torch.tensor([1.2, 1.05, 0.9, 0.8], dtype=torch.float64)) @ vh
    distances = []
    for _ in range(20):
        distances.append(float(infeasibility(z).sqrt()))
        z = z - 0.35 * landing_field(z, torch.zeros_like(z), 1.0)
    # start: (1.44 - 1, 1.1025 - 1, .81 - 1, .64 - 1) = (.44, .1025, -.19, -.36):
    # sqrt(.1936 + .010506 + .0361 + .1296) = sqrt(.369806) = .608117
    assert distances[0] == pytest.approx(0.608117, abs=1e-6)
    assert distances[5] < 1e-2 and distances[-1] < 1e-8
    assert distances[-1] / distances[-2] == pytest.approx(0.3, abs=0.01)


def test_retractions():
    z = torch.linalg.qr(normal(3, 10, 4))[0]
    step = landing_field(z, normal(4, 10, 4), 0.0)
    eye = torch.eye(4, dtype=torch.float64)
    gaps = []
    for eta in (1e-2, 1e-3):
        moved = [retract(z, -eta * step) for retract in (qr_retraction, polar_retraction, cayley_retraction)]
        assert all((end.T @ end - eye).abs().max() < 1e-12 for end in moved)
        gaps.append([float((end - z + eta * step).norm()) for end in moved])
    # all leave the tangent step at second order: a tenth of the step, a hundredth of the gap
    for coarse, fine in zip(*gaps):
        assert coarse / fine == pytest.approx(100, rel=0.1)
    # a bare QR flips signs and would move at a zero step
    for signed in (z, -z, z * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=z.dtype)):
        assert torch.allclose(qr_retraction(signed, torch.zeros_like(z)), signed, atol=1e-12)
    assert torch.allclose(polar_retraction(z, torch.zeros_like(z)), z, atol=1e-12)
    assert torch.allclose(cayley_retraction(z, torch.zeros_like(z)), z, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_cayley_equals_its_n_by_n_definition(rank):
    z, grad = torch.linalg.qr(normal(3, 10, rank))[0], normal(4, 10, rank)
    skew, eye = grad @ z.T - z @ grad.T, torch.eye(10, dtype=z.dtype)
    # (I + eta/2 A)^-1 (I - eta/2 A) Z, eta = 0.3
    expected = torch.linalg.solve(eye + 0.15 * skew, (eye - 0.15 * skew) @ z)
    assert torch.allclose(cayley_retraction(z, -0.3 * landing_field(z, grad, 0.0)), expected, atol=1e-12)
    # of any other step it follows the tangent part: Z S with symmetric S points off the manifold and moves nothing
    away = z @ (lambda s: s + s.T)(normal(5, rank, rank))
    assert torch.allclose(cayley_retraction(z, away), z, atol=1e-12)


def test_polar_is_the_nearest():
    target = normal(5, 7, 3)
    zero = torch.zeros_like(target)
    nearest, retracted = polar_retraction(target, zero), qr_retraction(target, zero)
    assert (target - nearest).norm() < (target - retracted).norm()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_orthonormalize_keeps_the_product(seed, rank, more, extra, diagonal):
    x, y = normal(seed, rank + more, rank), normal(seed + 1, rank + extra, rank)
    theta = normal(seed + 2, rank) if diagonal else normal(seed + 2, rank, rank)
    new_x, new_theta, new_y = orthonormalize(x, theta, y)
    before, after = LowRank(x, y.T, theta), LowRank(new_x, new_y.T, new_theta)
    assert torch.allclose(
        after.delta(), before.delta(), rtol=0, atol=1e-11 * max(1.0, float(before.delta().abs().max()))
    )
    assert float(infeasibility(new_x)) < 1e-20 and float(infeasibility(new_y)) < 1e-20
    assert new_theta.shape == theta.shape
    # the stable rank can now be read off the small matrix
    small = torch.diag(new_theta) if diagonal else new_theta
    assert LowRank(torch.eye(rank, dtype=x.dtype), small).stable_rank() == pytest.approx(before.stable_rank())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5))
def test_stable_rank_off_the_manifold(seed, rank, more, extra):
    x, theta, y = normal(seed, rank + more, rank), normal(seed + 2, rank, rank), normal(seed + 1, rank + extra, rank)
    values = torch.linalg.svdvals(x @ theta @ y.T)
    expected = float((values**2).sum() / values[0] ** 2)
    assert float(stable_rank(x, theta, y)) == pytest.approx(expected, rel=1e-6) and 1 <= expected <= rank + 1e-9


def test_stable_rank_by_hand():
    # X = (2, 0; 0, 1), Theta = I, Y = I: singular values 2, 1; (4 + 1) / 4. Theta alone would say 2.
    x, eye = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    assert float(stable_rank(x, eye, eye)) == pytest.approx(1.25)
    assert float(stable_rank(x, torch.zeros(2, 2), eye)) == 0.0
    assert float(stable_rank(torch.ones(3, 2), eye, torch.ones(3, 2))) == pytest.approx(1.0)  # deficient factors


def test_orthonormalize_a_deficient_factor():
    x = normal(0, 6, 1).repeat(1, 3)
    new_x, new_theta, new_y = orthonormalize(x, torch.eye(3, dtype=x.dtype), normal(1, 5, 3))
    assert float(infeasibility(new_x)) < 1e-20
    assert torch.allclose(new_x @ new_theta @ new_y.T, x @ normal(1, 5, 3).T, atol=1e-12)


def test_half_precision():
    z = torch.linalg.qr(normal(0, 32, 4))[0].to(torch.bfloat16)
    grad = normal(1, 32, 4).to(torch.bfloat16)
    field = landing_field(z, grad, 1.0)
    exact = by_definition(z.double(), grad.double(), 1.0)
    # one rounding to bf16 (8 bits) of a value computed in fp32
    assert field.dtype == torch.bfloat16 and torch.allclose(field.double(), exact, rtol=2**-7, atol=1e-4)
    assert qr_retraction(z, grad).dtype == torch.bfloat16


def test_errors():
    wide, tall = torch.ones(2, 5), torch.ones(5, 2)
    for call in (
        lambda: landing_field(wide, wide, 1.0),
        lambda: infeasibility(wide),
        lambda: qr_retraction(wide, wide),
        lambda: polar_retraction(wide, wide),
        lambda: orthonormalize(wide, torch.eye(2), tall),
        lambda: cayley_retraction(wide, wide),
        lambda: penalty_field(wide, wide, 1.0),
        lambda: pull(wide),
    ):
        with pytest.raises(UserError, match=r"\(2, 5\), needs \(n, r\) with n >= r; transpose"):
            call()
    with pytest.raises(UserError, match=r"gradient is \(2, 5\), factor \(5, 2\)"):
        landing_field(tall, wide, 1.0)
    with pytest.raises(UserError, match="attraction is -1"):
        landing_field(tall, tall, -1)
    with pytest.raises(UserError, match=r"theta \(3, 3\)"):
        orthonormalize(tall, torch.eye(3), tall)
