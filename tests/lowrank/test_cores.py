"""Merging in joint bases: equal to dense references that form every (o, i) matrix, whatever the factors."""

import math

import pytest
import torch

from vismt.base.errors import UserError
from vismt.lowrank.cores import CORE_RULES, OFF_DIAGONAL, RIDGE, Cores, RuleSettings, joint_cores, ties
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.combining import combine, interference
from vismt.lowrank.files.updates import Updates

OUT, IN = 19, 14


def draw(seed, rank, scale=1.0, dtype=torch.float64, out=OUT, inp=IN):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, inp))
    )
    return LowRank(left.to(dtype), right.to(dtype), None, scale)


def inputs(seed, width=IN):
    rows = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.linspace(0.2, 2, width, dtype=torch.float64)
    return rows.mT @ rows


def arguments(method, count=4):
    return {"covariances": [inputs(90 + t) for t in range(count)]} if method == "regmean" else {}


def mixed():
    """Return adapters of different ranks and scales, two of which share directions."""
    a, b, c = draw(1, 2, 0.5), draw(2, 5, -2.0), draw(3, 3)
    shared = LowRank(
        torch.cat([a.B, draw(4, 2).B], 1), torch.cat([draw(5, 2).A, b.A[:2]]), torch.rand(4).double() + 0.5, 0.25
    )
    return [a, b, c, shared]


def equal(found, expected, tolerance=1e-9):
    assert float((found - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


# ---- references on dense matrices


def dense_ties(values, keep):
    """TIES entry by entry, on values (T, ...)."""
    kept = []
    for value in values:
        count = max(1, round(keep * value.numel()))
        threshold = value.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where((value.abs() >= threshold) & (value != 0), value, 0))
    merged = torch.zeros_like(kept[0])
    for place in torch.cartesian_prod(*(torch.arange(size) for size in merged.shape)):
        entries = [value[tuple(place)] for value in kept]
        sign = math.copysign(1, sum(entries)) if sum(entries) else 0
        agreeing = [entry for entry in entries if entry * sign > 0]
        if agreeing:
            merged[tuple(place)] = sum(agreeing) / len(agreeing)
    return merged


def bases(deltas):
    u, s, _ = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    _, t, vh = torch.linalg.svd(torch.cat(deltas, 0), full_matrices=False)
    return u[:, s > 1e-9 * s[0]], vh[t > 1e-9 * t[0]]


def dense_core_ties(deltas):
    u, vh = bases(deltas)
    return u @ dense_ties([u.mT @ delta @ vh.mT for delta in deltas], 0.2) @ vh


def dense_knots_ties(deltas):
    u, _ = bases(deltas)
    return u @ dense_ties([u.mT @ delta for delta in deltas], 0.2)


def dense_tsv(deltas):
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [int((s > 1e-9 * s[0]).sum()) for _, s, _ in parts]

    def polar(matrix):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, s > 1e-9 * s[0]] @ vh[s > 1e-9 * s[0]]

    left = polar(torch.cat([u[:, :r] for (u, _, _), r in zip(parts, ranks)], 1))
    right = polar(torch.cat([vh[:r] for (_, _, vh), r in zip(parts, ranks)], 0))
    return left @ torch.diag(torch.cat([s[:r] for (_, s, _), r in zip(parts, ranks)])) @ right


def dense_regmean(deltas):
    """The least-squares optimum by its normal equations for one output row after another."""
    covariances = [inputs(90 + t) for t in range(len(deltas))]
    shrunk = [g / g.trace() for g in covariances]
    shrunk = [OFF_DIAGONAL * g + (1 - OFF_DIAGONAL) * torch.diag(g.diag()) for g in shrunk]
    ridge = RIDGE * len(deltas) / IN * torch.eye(IN).double()
    rows = []
    for row in range(OUT):
        wanted = sum(g @ delta[row] for g, delta in zip(shrunk, deltas)) + ridge @ sum(d[row] for d in deltas) / len(
            deltas
        )
        rows.append(torch.linalg.solve(sum(shrunk) + ridge, wanted))
    return torch.stack(rows)


REFERENCES = {"core_ties": dense_core_ties, "knots_ties": dense_knots_ties, "tsv": dense_tsv, "regmean": dense_regmean}


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, -1.0, 0.7]])
def test_equal_to_the_dense_reference(method, weights):
    adapters = mixed()
    found = combine(adapters, weights, method, **arguments(method))
    expected = REFERENCES[method]([w * a.delta() for a, w in zip(adapters, weights or [1.0] * 4)])
    equal(found.delta(), expected)
    assert found.rank <= sum(a.rank for a in adapters) and found.scale == 1.0
    assert float((found.delta() - sum(a.delta() for a in adapters)).norm()) > 0.1  # it is not the sum


@pytest.mark.parametrize("method", REFERENCES)
def test_factors_in_single_precision(method):
    adapters = [draw(seed, rank, dtype=torch.float32) for seed, rank in ((1, 2), (2, 4), (3, 3))]
    found = combine(adapters, method=method, **arguments(method, 3))
    assert found.B.dtype == torch.float32
    equal(found.delta().double(), REFERENCES[method]([a.to(dtype=torch.float64).delta() for a in adapters]), 1e-5)


@pytest.mark.parametrize("method", CORE_RULES)
def test_what_holds_for_every_rule(method):
    adapters, options = mixed(), arguments(method)
    found = combine(adapters, method=method, **options).delta()
    gauge = torch.randn(5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    other = LowRank(adapters[1].B @ gauge.inverse(), gauge @ adapters[1].A, None, adapters[1].scale)
    equal(combine([adapters[0], other, *adapters[2:]], method=method, **options).delta(), found, 1e-7)
    weights = [3.0 / 4 if method == "core_dare" else 3.0] * 4
    equal(combine(adapters, weights, method, **options).delta(), 3 * found)
    if method != "core_dare":  # its draws follow the position
        reversed_options = {name: value[::-1] for name, value in options.items()}
        equal(combine(adapters[::-1], method=method, **reversed_options).delta(), found)
    small = combine(adapters, method=method, rank=2, **options)
    values = torch.linalg.svdvals(found)
    assert small.rank == 2
    assert float((small.delta() - found).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-6)


@pytest.mark.parametrize("method", ["core_ties", "knots_ties", "tsv", "regmean"])
@pytest.mark.parametrize("count", [1, 3])
def test_one_adapter_or_identical_ones_are_kept(method, count):
    adapter = draw(1, 3, 0.5)
    found = combine([adapter] * count, method=method, keep=1.0, **arguments(method, count))
    equal(found.delta(), adapter.delta(), 1e-8)
    assert found.rank == 3


@pytest.mark.parametrize("method", CORE_RULES)
def test_adapters_without_an_update(method):
    nothing = LowRank(torch.zeros(OUT, 2).double(), torch.zeros(2, IN).double())
    assert float(combine([nothing, nothing], method=method, **arguments(method, 2)).delta().abs().max()) == 0
    one = draw(1, 2)
    found = combine([one, nothing], method=method, keep=1.0, drop=0.0, **arguments(method, 2)).delta()
    if method == "regmean":  # the other task wants its base unchanged
        assert float(found.norm()) < 0.9 * float(one.delta().norm())
    else:
        equal(found, one.delta() / (2 if method == "core_dare" else 1))


def test_orthogonal_updates_are_summed_by_tsv():
    basis = torch.linalg.qr(torch.randn(OUT, 4, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(IN, 4, dtype=torch.float64)).Q.mT
    a, b = LowRank(basis[:, :2], other[:2]), LowRank(basis[:, 2:], 3 * other[2:])
    found = combine([a, b], method="tsv").delta()
    assert torch.allclose(found, a.delta() + b.delta(), rtol=0, atol=1e-9)


def test_ties_by_hand():
    values = torch.tensor([[4.0, -1.0, 2.0, 0.5], [2.0, 3.0, -5.0, 0.1]])
    # kept: (4, 0, 2, 0) and (0, 3, -5, 0); signs of the sums: +, +, -, 0
    assert ties(values, 0.5).tolist() == [4.0, 3.0, -5.0, 0.0]


def test_dare_is_the_sum_in_the_mean():
    adapters = mixed()
    draws = torch.stack([combine(adapters, [1.0] * 4, "core_dare", drop=0.4, seed=seed).delta() for seed in range(300)])
    error = draws.std(0) / math.sqrt(len(draws))
    distance = (draws.mean(0) - sum(a.delta() for a in adapters)).abs() / error
    assert float(distance.max()) < 5 and float((draws[0] - draws[1]).norm()) > 1
    again = combine(adapters, [1.0] * 4, "core_dare", drop=0.4, seed=3).delta()
    assert torch.equal(again, draws[3])


def test_regmean_minimises_its_loss():
    adapters, given = mixed(), [inputs(90 + t) for t in range(4)]

    def loss(delta):
        parts = [g / g.trace() for g in given]
        parts = [OFF_DIAGONAL * g + (1 - OFF_DIAGONAL) * torch.diag(g.diag()) for g in parts]
        return sum(float(((delta - a.delta()) @ g * (delta - a.delta())).sum()) for a, g in zip(adapters, parts))

    found = combine(adapters, method="regmean", covariances=given).delta()
    for seed in range(5):
        assert loss(found) < loss(found + 0.01 * draw(seed, 3).delta())
    assert loss(found) < loss(combine(adapters).delta())  # the mean


def test_regmean_runs_on_the_device_of_its_factors():
    """The meta device refuses tensors of the CPU, as a GPU does."""
    shapes = ((OUT, 3), (2, 3, 3), (3, IN))
    joint = Cores(*(torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes), 1e-10)
    assert CORE_RULES["regmean"](joint, RuleSettings(covariances=[inputs(0), inputs(1)])).B.device.type == "meta"


def test_cores_keep_products():
    adapters = mixed()
    joint = joint_cores(adapters, [1.0] * 4)
    for one, core in zip(adapters, joint.cores):
        equal(joint.left @ core @ joint.right, one.delta())
        assert float((core * joint.cores[0]).sum()) == pytest.approx(float((one.delta() * adapters[0].delta()).sum()))
    assert joint.cores.shape == (4, 12, 12)  # of ranks 2 + 5 + 3 + 4, two shared directions on each side


def test_interference_of_models():
    adapters = mixed()[:3]
    given = [{"a": inputs(90 + t), "b": inputs(80 + t)} for t in range(3)]
    of = [Updates({"a": one, "b": one}) for one in adapters[:2]] + [Updates({"a": adapters[2]})]
    merged = combine(of, method="regmean", covariances=given)
    found = interference(of, merged, given)
    deltas, result = [one.delta() for one in adapters], merged.low_rank["a"].delta()
    for t, delta in enumerate(deltas):
        rest, g = result - delta, given[t]["a"]
        expected = math.sqrt(float((rest @ g * rest).sum() / (delta @ g * delta).sum()))
        assert float(found["a"].error[t]) == pytest.approx(expected, rel=1e-9)
        cosine = float((delta * deltas[0]).sum() / delta.norm() / deltas[0].norm())
        assert float(found["a"].cosine[0, t]) == pytest.approx(cosine, abs=1e-9)
    assert math.isnan(float(found["b"].error[2])) and float(found["b"].cosine[2, 0]) == 0
    kept = interference([of[0]], of[0])["a"]
    assert float(kept.error[0]) == pytest.approx(0, abs=1e-7)
    with pytest.raises(UserError, match="no update of 'b'"):
        interference(of[:1], of[2])
    with pytest.raises(UserError, match="3 adapters but 2 covariances"):
        interference(of, merged, given[:2])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "ties"}, "no method 'ties'. Near: 'core_ties'"),
        ({"method": "core_ties", "keep": 0.0}, "keep is 0.0"),
        ({"method": "core_dare", "drop": 1.0}, "drop is 1.0"),
        ({"method": "regmean"}, "'regmean' needs the covariances"),
        ({"method": "tsv", "covariances": [inputs(1), inputs(2)]}, "leave them out with 'tsv'"),
        ({"method": "regmean", "covariances": [inputs(1)]}, "2 adapters but 1 covariances"),
        (
            {"method": "regmean", "covariances": [inputs(1), inputs(2, 3)]},
            r"the covariance of adapter 1 is \(3, 3\); give \(14, 14\)",
        ),
        ({"method": "regmean", "covariances": [inputs(1), inputs(2) / 0]}, "all finite"),
    ],
)
def test_one_line_errors(options, text):
    with pytest.raises(UserError, match=text) as error:
        combine([draw(1, 2), draw(2, 3)], **options)
    assert "\n" not in str(error.value)


def test_missing_covariance_of_a_model():
    of = [Updates({"a": draw(1, 2)}), Updates({"a": draw(2, 2)})]
    with pytest.raises(UserError, match="covariances of adapter 1 lack 'a'"):
        combine(of, method="regmean", covariances=[{"a": inputs(1)}, {}])
