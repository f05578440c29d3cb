"""Confidence intervals over episodes, averages over domains, and paired comparison of two methods on the same episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.errors import UserError


def mean_interval(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval) of per-episode values (n,): 1.96 * std / sqrt(n), std with n - 1.

    Raises UserError for fewer than two values or a value that is not finite.
    """
    sample = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(sample) < 2 or not bool(sample.isfinite().all()):
        raise UserError(f"interval over {len(sample)} values: need 2 or more, all finite; run more episodes.")
    return float(sample.mean()), 1.96 * float(sample.std(unbiased=True)) / math.sqrt(len(sample))


def domain_average(domains: Mapping[str, Tensor | Sequence[float]]) -> tuple[float, float]:
    """(mean over domains, half width of its 95 % interval) from per-episode values (n_d,) of each domain.

    Every domain weighs the same whatever its n. The domains are taken as fixed, a list and not a sample of domains, so
    only the episodes within them are uncertain: standard error = sqrt(sum_d se_d^2) / D.
    """
    if not domains:
        raise UserError("average over domains: none given.")
    intervals = [mean_interval(values) for values in domains.values()]
    mean = math.fsum(mean for mean, _ in intervals) / len(intervals)
    return mean, math.sqrt(math.fsum(half**2 for _, half in intervals)) / len(intervals)


@dataclass(frozen=True)
class DomainRow:
    """One cell of a domain table: mean and 95 % half width over n episodes; the average carries the domain "average"."""

    domain: str
    condition: str
    value: float
    ci95: float
    n: int


def domain_table(results: Mapping[str, Mapping[str, Tensor]]) -> list[DomainRow]:
    """Rows of {domain: {condition: values (n,)}}, domain by domain, then the averages of conditions that all domains have."""
    rows = []
    for domain, conditions in results.items():
        for condition, values in conditions.items():
            rows.append(DomainRow(domain, condition, *mean_interval(values), len(values)))
    shared = [c for c in next(iter(results.values()), {}) if all(c in conditions for conditions in results.values())]
    for condition in shared if len(results) > 1 else []:
        domains = {domain: conditions[condition] for domain, conditions in results.items()}
        rows.append(DomainRow("average", condition, *domain_average(domains), sum(map(len, domains.values()))))
    return rows


def paired_bootstrap(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10000,
) -> tuple[float, float, float, float]:
    """Is `a` better than `b` on the same episodes? Both (n,), paired by position.

    Returns (mean of a - b, low, high, p): the percentile 95 % interval over `resamples` draws of n episodes with
    replacement, and the two-sided p = 2 min(P(d* <= 0), P(d* >= 0)) with one added to counts and draws, at most 1.
    Deterministic in `seed`. Raises UserError for samples of different or too small size.
    """
    left, right = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (a, b))
    if len(left) != len(right) or len(left) < 2:
        raise UserError(f"paired comparison of {len(left)} and {len(right)} episodes: need the same 2 or more of both.")
    difference = left - right
    generator = torch.Generator().manual_seed(seed)
    means = []
    piece = max(1, 4_000_000 // len(difference))
    for start in range(0, resamples, piece):
        shape = (min(piece, resamples - start), len(difference))
        means.append(difference[torch.randint(len(difference), shape, generator=generator)].mean(1))
    draws = torch.cat(means)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return float(difference.mean()), low, high, min(1.0, 2 * (tail + 1) / (resamples + 1))
