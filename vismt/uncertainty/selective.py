"""Selective prediction: the error of a classifier that answers only if its confidence is high.

    g_i confidence, e_i 1 for a wrong answer and 0 for a right one, tau a threshold on g
    accepted = mean_i a_i,   a_i = [g_i >= tau]                risk(tau) = sum_i a_i e_i / sum_i a_i
    AURC = 1/n sum_k (wrong answers among the k most confident) / k        area under the risk-coverage curve

Geifman and El-Yaniv, NeurIPS 2017 (arXiv 1705.08500). AURC: Geifman, Uziel and El-Yaniv, ICLR 2019 (arXiv 1805.08206). tau is
the confidence above which a chosen share of calibration examples lies. On other examples, the accepted share is measured.
Examples of equal confidence are taken in random order, and AURC is the expectation over orders. AURC is 0 only if all answers
are right. If the confidence tells nothing, AURC equals the error.

Both scores have values by example whose mean is the score. For the risk, the values are risk + a_i (e_i - risk) / accepted,
with the variance of the ratio to first order. For AURC, they are e_i sum_{k >= rank of i} 1/k. These ranks depend on all
examples, so the interval of AURC is a bootstrap. Groups of examples that depend on each other are drawn as wholes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.uncertainty.intervals import wilson


def accepting_threshold(confidences: Tensor, share: float) -> float:
    """Return the largest tau with at least `share` of the confidences (n,) at or above it. n >= 1. share: In (0, 1]."""
    kept = max(1, -int(-share * len(confidences) // 1))
    return float(confidences.double().sort(descending=True).values[kept - 1])


def selective_risk(confidences: Tensor, wrong: Tensor, tau: float) -> Tensor | None:
    """Return values by example (n,) fp64 whose mean is the risk among accepted examples. None if no example is accepted.

    confidences: Confidences (n,), float. wrong: 1 for a wrong answer and 0 for a right answer, (n,) float.
    """
    accepted = (confidences >= tau).double()
    if not bool(accepted.any()):
        return None
    risk = (accepted * wrong).sum() / accepted.sum()
    return risk + accepted * (wrong - risk) / accepted.mean()


def risk_coverage_values(confidences: Tensor, wrong: Tensor) -> Tensor:
    """Return values by example (n,) fp64 whose mean is the AURC.

    Args:
        confidences: Confidences (n,), float. Higher is more certain.
        wrong: 1 for a wrong answer, else 0, (n,).

    Raises:
        UserError: If no example is given, or shapes differ.
    """
    n = len(confidences)
    if not n or wrong.shape != confidences.shape:
        raise UserError(f"AURC: {tuple(confidences.shape)} confidences, {tuple(wrong.shape)} errors; needed (n,) each.")
    order = confidences.double().argsort(descending=True, stable=True)
    tails = (1 / torch.arange(1, n + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0)  # sum_{k >= rank} 1/k
    _, group = confidences.double()[order].unique_consecutive(return_inverse=True)
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, group, tails)
    counts = torch.bincount(group, minlength=n).clamp_min(1)
    values = torch.empty(n, dtype=torch.float64)
    values[order] = (sums / counts)[group]
    return values * wrong.double()


def risk_coverage_interval(
    confidences: Tensor, wrong: Tensor, groups: Tensor | None = None, *, resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap's 95 % interval of the AURC over the examples.

    If all answers are wrong, or all are right, no draw differs. The interval is then Wilson's for the errors, with the number
    of groups as the number of examples.

    Args:
        confidences, wrong: Arguments of `risk_coverage_values`.
        groups: Group of each example, int64 (n,) from 0. None for independent examples.
        resamples: Number of draws.
        seed: Seed of the draws.
    """
    n, errors = len(confidences), int(wrong.sum())
    units = n if groups is None else int(groups.max()) + 1
    if errors in (0, n):
        return wilson(units if errors else 0, units)
    order = wrong.argsort(stable=True)  # the draws then do not depend on the order of the file
    order = order[confidences[order].argsort(descending=True, stable=True)]
    confidences, wrong = confidences[order], wrong[order]
    places = None if groups is None else groups[order].argsort(stable=True).split(groups.bincount().tolist())
    generator = torch.Generator().manual_seed(seed)
    areas = []
    for _ in range(resamples):
        drawn = torch.randint(units, (units,), generator=generator)
        if places is not None:
            drawn = torch.cat([places[group] for group in drawn.tolist()])
        areas.append(risk_coverage_values(confidences[drawn], wrong[drawn]).mean())
    ends = torch.stack(areas).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = ends.clamp(max=1).tolist()  # the sum of a draw without a right answer is rounded
    return low, high
