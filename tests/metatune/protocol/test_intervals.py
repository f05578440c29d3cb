"""Intervals and paired comparison against numbers by hand and against scipy."""

import math

import pytest
import torch
from scipy import stats

from vismt.base.errors import UserError
from vismt.metatune import domain_average, domain_table, mean_interval, paired_bootstrap


def test_mean_interval_by_hand():
    # mean 0.5; deviations -0.3 -0.1 0.4: squares sum to 0.26, / 2 = 0.13; t(2) = 4.302653 * sqrt(0.13) / sqrt(3) = 0.895669
    mean, half = mean_interval([0.2, 0.4, 0.9])
    assert mean == pytest.approx(0.5) and half == pytest.approx(0.895669, abs=1e-6)


def test_domain_average_takes_domains_as_fixed():
    # errors: a sqrt(0.02) / sqrt(2) = 0.1 with one degree of freedom, b 0: together 0.1 / 2, t = 12.706205.
    # Treating the two domain means (0.6, 0.2) as a sample of domains would give t * 0.2828 / sqrt(2) = 2.541.
    mean, half = domain_average({"a": [0.5, 0.7], "b": [0.2, 0.2, 0.2]})
    assert mean == pytest.approx(0.4) and half == pytest.approx(12.706205 * 0.05)


def test_domain_table_averages_only_what_all_have():
    values = torch.tensor([0.5, 0.7])
    table = domain_table({"a": {"clean": values, "PGD": values}, "b": {"clean": values - 0.2}})
    assert [(row.domain, row.condition, row.n) for row in table] == [
        ("a", "clean", 2),
        ("a", "PGD", 2),
        ("b", "clean", 2),
        ("average", "clean", 4),
    ]
    assert table[-1].value == pytest.approx(0.5)
    assert len(domain_table({"a": {"clean": values}})) == 1


def test_bootstrap_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(200, generator=generator).double()
    b = a - 0.01 + 0.1 * torch.randn(200, generator=generator).double()
    difference, low, high, p = paired_bootstrap(a, b)
    peer = stats.bootstrap(((a - b).numpy(),), lambda x, axis: x.mean(axis), n_resamples=9999, method="percentile")
    assert difference == pytest.approx(float((a - b).mean()))
    assert low == pytest.approx(peer.confidence_interval.low, abs=1.5e-3)
    assert high == pytest.approx(peer.confidence_interval.high, abs=1.5e-3)
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)
    assert paired_bootstrap(a, b) == (difference, low, high, p) != paired_bootstrap(a, b, seed=1)


def test_pairing_is_used():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(60, generator=generator).double()
    better = hard + 0.01 + 0.01 * torch.randn(60, generator=generator).double()
    # Unpaired, a gap of 0.01 between values spread by 0.29 is nothing; paired it is certain.
    assert paired_bootstrap(better, hard)[3] < 0.001
    assert paired_bootstrap(better, hard.flip(0))[3] > 0.3
    assert paired_bootstrap(hard, hard)[3] == 1.0
    # A constant difference: every resample has it, p = 2 (0 + 1) / (1000 + 1).
    assert paired_bootstrap(hard + 0.25, hard, resamples=1000)[3] == pytest.approx(2 / 1001)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan]])
def test_too_few_or_broken_values(values):
    with pytest.raises(UserError, match="need 2 or more, all finite"):
        mean_interval(values)
    with pytest.raises(UserError, match="none given"):
        domain_average({})
    with pytest.raises(UserError, match="3 and 2 episodes"):
        paired_bootstrap([1, 2, 3], [1, 2])
