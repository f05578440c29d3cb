"""The bank against a loop over experts and samples, with gates of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vismt.base.errors import UserError
from vismt.lowrank.bank import FactorBank
from vismt.lowrank.factors import LowRank


def filled(seed=0, inp=5, out=4, experts=3, rank=2, scale=0.5):
    bank = FactorBank(inp, out, experts, rank, scale=scale, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (bank.A, bank.B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return bank


def looped(bank, x, gates):
    """One sample, one expert at a time; x (b, n, i), gates (b, n, e)."""
    rows = []
    for sample, gate in zip(x, gates):
        for token, weights in zip(sample, gate):
            rows.append(sum(w * bank.scale * (b @ (a @ token)) for w, a, b in zip(weights, bank.A, bank.B)))
    return torch.stack(rows).reshape(*x.shape[:-1], bank.B.shape[1])


def test_by_hand():
    # two experts of rank 1 on 2 -> 2: A_0 = (1, 0), B_0 = (1, 0)^T; A_1 = (0, 1), B_1 = (0, 1)^T; scale 2.
    bank = FactorBank(2, 2, 2, 1, scale=2.0)
    with torch.no_grad():
        bank.A.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        bank.B.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]))
    x = torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    gates = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    # sample 0: 2 * (.25 * 3, .75 * 5) = (1.5, 7.5); sample 1: (6, 0); base adds 1
    assert bank(x, gates, torch.ones(2, 2)).tolist() == [[2.5, 8.5], [7.0, 1.0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["static", "sample", "token"]))
def test_equals_the_loop(seed, experts, rank, kind):
    bank = filled(seed, 5, 4, experts, rank)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    base = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    shape = {"static": (experts,), "sample": (3, experts), "token": (3, 2, experts)}[kind]
    gates = torch.randn(shape, generator=generator, dtype=torch.float64)
    full = {"static": gates, "sample": gates[:, None] if kind == "sample" else gates, "token": gates}[kind]
    expected = looped(bank, x, full.expand(3, 2, experts))
    assert torch.allclose(bank(x, gates), expected, atol=1e-12)
    assert torch.allclose(bank(x, gates, base), base + expected, atol=1e-12)


def test_gradients_equal_the_loop():
    bank, twin = filled(1), filled(1)
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gates = torch.rand(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, theirs = gates.clone().requires_grad_(), gates.clone().requires_grad_()
    bank(x, ours).square().sum().backward()
    looped(twin, x, theirs[:, None].expand(3, 2, 3)).square().sum().backward()
    for alone, reference in ((ours.grad, theirs.grad), (bank.A.grad, twin.A.grad), (bank.B.grad, twin.B.grad)):
        assert torch.allclose(alone, reference, atol=1e-11) and alone.abs().max() > 0


def test_uniform_gates_are_one_lora_and_one_hot_is_one_expert():
    bank = filled(4)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = LowRank(torch.cat(list(bank.B), 1), torch.cat(list(bank.A), 0), None, bank.scale / 3)
    assert torch.allclose(bank(x, torch.full((3,), 1 / 3, dtype=x.dtype)), together.apply(x), atol=1e-12)
    one_hot = torch.tensor([0.0, 1.0, 0.0], dtype=x.dtype)
    assert torch.allclose(bank(x, one_hot), bank.expert(1).apply(x), atol=1e-12)


def test_samples_do_not_leak():
    bank = filled(5)
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(bank(x[order], gates[order]), bank(x, gates)[order], atol=1e-13)


def test_delta_of_a_mixture_is_the_forward():
    bank = filled(6)
    gates = torch.tensor([0.2, -0.5, 1.3], dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixture = bank.delta(gates)
    assert mixture.shape == (4, 5) and mixture.rank == 6
    assert torch.allclose(x @ mixture.delta().T, bank(x, gates), atol=1e-12)
    mixture.delta().sum().backward()
    # d/dgate_e = scale * sum of B_e A_e
    expected = torch.stack([(bank.scale * b @ a).sum() for a, b in zip(bank.A, bank.B)])
    assert torch.allclose(gates.grad, expected, atol=1e-12)


def test_no_output_per_expert_and_no_loop():
    sizes, calls = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
                calls.append(func)
            return result

    def run(experts):
        sizes.clear(), calls.clear()
        bank = FactorBank(64, 96, experts, 1)
        with Watch():
            bank(torch.ones(4, 50, 64), torch.ones(4, experts), torch.ones(4, 50, 96))
        return max(sizes), len(calls)

    few, many = run(2), run(16)
    # the largest tensor stays (b n, o) = 4 * 50 * 96 = 19,200 and the number of operations does not grow with E
    assert few == many and few[0] == 19_200


def test_initial_values():
    a, b = FactorBank(100, 8, 4, 2), FactorBank(100, 8, 4, 2)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    c = FactorBank(100, 8, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.A, b.A) and not torch.equal(a.A, c.A.float())
    assert a.B.abs().max() == 0 and c.A.dtype == torch.bfloat16
    # U(-1/sqrt(100), 1/sqrt(100)): bound 0.1, standard deviation 0.1 / sqrt(3) = 0.0577
    assert a.A.abs().max() <= 0.1 and float(a.A.detach().std()) == pytest.approx(0.0577, abs=0.004)
    assert not torch.equal(a.A[0], a.A[1])
    assert FactorBank(4, 4, 2, 1, device="meta").A.is_meta


def test_stack():
    parts = [LowRank(torch.randn(4, 2), torch.randn(2, 5), None, 2.0) for _ in range(3)]
    bank = FactorBank.stack(parts)
    assert bank.scale == 2.0 and torch.equal(bank.B[1], parts[1].L) and torch.equal(bank.A[2], parts[2].R)
    assert bank.A.requires_grad
    mixed = [
        LowRank(p.L, p.R, core, scale)
        for p, core, scale in zip(
            parts, (None, torch.tensor([2.0, 3.0]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])), (1.0, 2.0, 3.0)
        )
    ]
    bank = FactorBank.stack(mixed)
    for index, part in enumerate(mixed):
        assert torch.allclose(bank.expert(index).delta(), part.delta(), atol=1e-6)


def test_dtypes():
    bank = FactorBank(8, 6, 2, 2)
    with torch.no_grad():
        bank.B.fill_(0.5)
    x, base = torch.ones(2, 3, 8, dtype=torch.bfloat16), torch.ones(2, 3, 6, dtype=torch.bfloat16)
    assert bank(x, torch.ones(2), base).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(bank(x.float(), torch.ones(2, 2), base.float())).all()
    bank(x[:0], torch.ones(2)).sum().backward()
    assert "experts=2" in repr(bank)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 3), (4, 2), (4, 5, 3), (4, 2, 1, 3)])
def test_gates_of_the_wrong_shape(shape):
    with pytest.raises(UserError, match=r"gates are \(.*\) for x \(4, 2, 5\)"):
        filled()(torch.ones(4, 2, 5, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


def test_other_errors():
    bank = filled()
    with pytest.raises(UserError, match=r"gates are \(4, 3\), one weight needs \(3,\)"):
        bank.delta(torch.ones(4, 3))
    with pytest.raises(UserError, match=r"no expert 3, it has 0\.\.2"):
        bank.expert(3)
    with pytest.raises(UserError, match=r"rank 5 on a \(4, 5\) weight"):
        FactorBank(5, 4, 2, 5)
    with pytest.raises(UserError, match="at least one"):
        FactorBank.stack([])
    with pytest.raises(UserError, match="expert 1 is"):
        FactorBank.stack([LowRank(torch.ones(4, 2), torch.ones(2, 4)), LowRank(torch.ones(4, 1), torch.ones(1, 4))])


# ---- merged


def test_merged_by_hand():
    # scale 2, gates (.5, 0, -1), rank 1 on 2 -> 2: W + 2 (.5 B_0 A_0 - B_2 A_2)
    bank = FactorBank(2, 2, 3, 1, scale=2.0)
    with torch.no_grad():
        bank.A.copy_(torch.tensor([[[1.0, 2.0]], [[9.0, 9.0]], [[0.0, 1.0]]]))
        bank.B.copy_(torch.tensor([[[3.0], [0.0]], [[9.0], [9.0]], [[1.0], [1.0]]]))
    # 2 * .5 * [[3, 6], [0, 0]] = [[3, 6], [0, 0]];  2 * -1 * [[0, 1], [0, 1]] = [[0, -2], [0, -2]]
    weight = torch.eye(2)
    assert bank.merged(weight, torch.tensor([0.5, 0.0, -1.0])).tolist() == [[4.0, 4.0], [0.0, -1.0]]
    assert weight.equal(torch.eye(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.lists(st.sampled_from([0.0, 0.3, -1.2, 1.0]), min_size=4, max_size=4))
def test_merged_is_the_weight_plus_the_delta(seed, experts, values):
    bank, gates = filled(seed, 5, 4, experts, 2), torch.tensor(values[:experts], dtype=torch.float64)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    copies = [tensor.detach().clone() for tensor in (weight, gates, bank.A, bank.B)]
    merged = bank.merged(weight, gates)
    assert torch.allclose(merged, weight + bank.delta(gates).delta(), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert torch.allclose(x @ merged.T, bank(x, gates, x @ weight.T), rtol=0, atol=1e-12)
    assert not merged.requires_grad and merged.data_ptr() != weight.data_ptr()
    assert all(torch.equal(copied, value) for copied, value in zip(copies, (weight, gates, bank.A, bank.B)))


def test_merged_without_a_gate_is_the_weight_and_unused_experts_do_not_enter():
    bank, weight = filled(), torch.ones(4, 5, dtype=torch.float64)
    assert torch.equal(bank.merged(weight, torch.zeros(3, dtype=torch.float64)), weight)
    with torch.no_grad():
        bank.A[1] = float("nan")
    assert bank.merged(weight, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)).isfinite().all()


def test_merged_is_summed_wide_and_rounded_once():
    # 256 + 1 + 1 is 258 in fp32 and in bf16, whose step there is 2; adding 1 twice in bf16 would stay at 256.
    bank = FactorBank(1, 1, 2, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        bank.A.fill_(1.0), bank.B.fill_(1.0)
    merged = bank.merged(torch.full((1, 1), 256.0, dtype=torch.bfloat16), torch.ones(2))
    assert merged.dtype == torch.bfloat16 and float(merged) == 258
    # 1.002 - 1 = .002; in bf16, where 1.002 is 1, the factors would cancel.
    wide = FactorBank(1, 1, 2, 1)
    with torch.no_grad():
        wide.A.fill_(1.0), wide.B.copy_(torch.tensor([[[1.002]], [[-1.0]]]))
    assert float(wide.merged(torch.zeros(1, 1, dtype=torch.bfloat16), torch.ones(2))) == pytest.approx(0.002, rel=0.01)
    # A gate of .3 is not rounded to bf16's .30078 on its way: 1024 * .3 = 307.2, not 308.
    with torch.no_grad():
        bank.A.fill_(1024.0)
    assert float(bank.merged(torch.zeros(1, 1), torch.tensor([0.3, 0.0]))) == pytest.approx(307.2, rel=1e-6)
    exact = FactorBank(1, 1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        exact.A.fill_(1.0), exact.B.fill_(1.0)
    tiny = exact.merged(torch.ones(1, 1).double(), torch.tensor([1e-12]).double())
    assert tiny.dtype == torch.float64 and float(tiny) - 1 == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 3), (2,), (), (4,)])
def test_merged_wants_one_gate_each(shape):
    with pytest.raises(UserError, match=r"one weight needs \(3,\)"):
        filled().merged(torch.ones(4, 5, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
