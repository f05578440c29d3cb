"""Accuracy and calibration of class probabilities: ACC, ECE, NLL, Brier and AUROC, with per-example values and intervals.

    ECE   = sum_b |B_b| / n |acc_b - conf_b|        15 equal bins of the largest probability; empty bins count nothing
    NLL   = -mean log p_y                           Brier = mean sum_c (p_c - [y = c])^2, in [0, 2], 1 - 1/k for uniform p
    AUROC = mean over classes, each against the rest, ties counted half

Values come from torchmetrics, from all examples at once, so that a short last batch has the right weight. ACC, NLL and Brier
are means of per-example values, which are returned: intervals and paired differences are those of a mean. The same holds for
AUROC to first order: with V_i the share of examples of the other label that example i is ranked correctly against, and n_i the
number of examples with the label of i, the values AUROC + (n / n_i) (V_i - AUROC) have the AUROC as their mean and DeLong's
variance (Biometrics 44, 1988).

ECE is not a mean, and |.| biases it upwards: a calibrated model has about 0.04 at n = 300. A resample adds that bias a second
time, so percentile intervals can miss the true value altogether. Here the gaps g of the bins (n g_b = |B_b| (acc_b - conf_b))
and their bootstrap errors e are separated: ECE(t) = sum_b |t g_b + e_b| would be observed if the true gaps were t g, and the
interval contains the t sum_b |g_b| for which the observed ECE lies within the middle 95 % of ECE(t). In simulations (n of 100
to 1000, true ECE 0 to 0.2) it contained the true value in 84 to 98 % of sets, the basic bootstrap interval in 70 % of
calibrated ones. For the difference of two models the paired bootstrap is worse still (0 to 83 %: the bias differs between the
models and the pairing makes it look certain): compare the paired NLL or Brier values of two models instead.

Rows in a few parts, within which they depend on each other (few-shot episodes), cannot be resampled. Their interval is Student's
t of the parts' mean values, and its lower end is lower by the bias that the jackknife finds, (g - 1) (mean_k ECE_-k - ECE),
where ECE_-k leaves out part k of g. docs/guides/intervals.md has its coverage.

NLL and Brier score are proper: their expectation is smallest for the true probabilities (Good, J. R. Stat. Soc. B 14, 1952;
Brier, Monthly Weather Review 78, 1950). torchmetrics is imported where a score is computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.uncertainty.intervals import LOWER, NUMBER, Estimate, Measure, estimate

BINS = 15


@dataclass(frozen=True)
class Scores:
    """Scores of a model on n examples, with per-example values (n,) fp64 on the CPU of those that are means.

    correct: mean is accuracy. nlls: mean is nll, in nats. briers: mean is brier. orders: mean is auroc, NaN where that is.
    """

    n: int
    accuracy: float
    ece: float
    nll: float
    brier: float
    auroc: float
    correct: Tensor
    nlls: Tensor
    briers: Tensor
    orders: Tensor


def scores(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Scores:
    """Compute all scores of a model.

    Args:
        probabilities: (n, k) float on any device, rows sum to 1. A probability of 0 for the true class counts as the smallest
            normal number of its dtype.
        labels: (n,) int in [0, k).
        bins: of the ECE.

    Returns:
        The scores. AUROC is the mean over the classes that have both positive and negative examples; NaN where all labels are
        equal.

    Raises:
        UserError: logits, NaN, labels out of range, or shapes that do not fit.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    p, y = _checked(probabilities, labels)
    chosen = p.gather(1, y[:, None]).squeeze(1)
    briers = p.square().sum(1) - 2 * chosen + 1
    nlls = -chosen.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return Scores(
        n=len(y),
        accuracy=float(multiclass_accuracy(p, y, num_classes=p.shape[1], average="micro")),
        ece=expected_calibration_error(p, y, bins),
        nll=float(nlls.mean()),
        brier=float(briers.mean()),
        auroc=_auroc(p, y),
        correct=(p.argmax(1) == y).double(),
        nlls=nlls,
        briers=briers,
        orders=_orders(p, y),
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the ECE in [0, 1] with `bins` equal bins, gaps weighted by their share of the examples.

    Arguments as in `scores`.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = _checked(probabilities, labels)
    if bins < 1:
        raise UserError(f"ECE: {bins} bins; at least 1.")
    return float(multiclass_calibration_error(p, y, num_classes=p.shape[1], n_bins=bins, norm="l1"))


def proper_scores(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the NLL in nats and the Brier score, each (n,), of log-probabilities (n, k) and labels int64 (n,)."""
    chosen = log_p.gather(1, labels[:, None]).squeeze(1)
    briers = log_p.exp().square().sum(1) - 2 * chosen.exp() + 1
    return (-chosen).clamp_min(0), briers.clamp(0, 2)


def binned_gaps(confidences: Tensor, correct: Tensor, bins: int = BINS) -> Tensor:
    """Return (n, bins) with (correct - confidence) of each example in the column of its bin: ECE = sum_b |column sum| / n.

    Args:
        confidences: largest probability of each example (n,), float64 in [0, 1].
        correct: (n,), 1 where the class with the largest probability is the label, else 0.
        bins: number of equal bins.
    """
    bounds = torch.linspace(0, 1, bins + 1, dtype=confidences.dtype)
    column = (torch.bucketize(confidences, bounds, right=True) - 1).clamp(0, bins - 1)
    gaps = confidences.new_zeros(len(confidences), bins)
    return gaps.scatter_(1, column[:, None], (correct.to(confidences.dtype) - confidences)[:, None])


def gap_values(gaps: Tensor, resamples: int = 500, seed: int = 0, parts: int = 0) -> tuple[Tensor, tuple[float, float]]:
    """Return values by row (n,) whose mean is the ECE (its first-order effects), and its 95 % interval.

    Args:
        gaps: (n, bins) fp64: rows of `binned_gaps`, or for groups of dependent examples the mean of each group's rows. Groups
            weigh the same, and are resampled as wholes.
        resamples: number of bootstrap resamples of the rows.
        seed: of the resamples.
        parts: number of parts of the rows, as for `vismt.uncertainty.intervals.estimate`; 0 where rows are independent.
    """
    if resamples < 1:
        raise UserError(f"bootstrap: {resamples} resamples; at least 1.")
    gap, n = gaps.mean(0), len(gaps)
    values = (gaps * gaps.sum(0).sign()).sum(1)
    if parts:
        return values, _bounds_of_parts(gaps, estimate(values, parts=parts), parts)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 4_000_000 // n)
    means = []
    for start in range(0, resamples, chunk):
        drawn = torch.randint(n, (min(chunk, resamples - start), n), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        means.append(counts.scatter_add_(1, drawn, torch.ones_like(counts)) @ gaps / n)
    errors = torch.cat(means) - gap
    observed = float(gap.abs().sum())

    def quantile(t: float, level: float) -> float:
        return float(torch.quantile((t * gap + errors).abs().sum(1), level))

    def scale(level: float) -> float:
        """Return the t >= 0 at which the quantile equals the observed ECE; 0 where it is larger already at t = 0."""
        low, high = 0.0, 1.0
        if quantile(0.0, level) >= observed:
            return 0.0
        while quantile(high, level) < observed:
            high *= 2
        for _ in range(20):
            middle = (low + high) / 2
            if quantile(middle, level) >= observed:
                high = middle
            else:
                low = middle
        return (low + high) / 2

    return values, (scale(0.975) * observed, scale(0.025) * observed)


def _bounds_of_parts(gaps: Tensor, found: Estimate, parts: int) -> tuple[float, float]:
    """Return the 95 % interval of the ECE `found` of rows (n, bins) in parts, with room for its bias."""
    part = torch.arange(len(gaps)) % parts
    sums = gaps.new_zeros(parts, gaps.shape[1]).index_add_(0, part, gaps)
    without = (sums.sum(0) - sums).abs().sum(1) / (len(gaps) - part.bincount())
    bias = max(0.0, (parts - 1) * (float(without.mean()) - found.mean))
    return max(0.0, found.mean - bias - found.half), min(1.0, found.mean + found.half)


def quality_measures(ids: Sequence[str], gaps: Tensor, nlls: Tensor, briers: Tensor, parts: int = 0) -> list[Measure]:
    """Return ECE, NLL and Brier score as measures.

    Args:
        ids: names of n examples, or of groups of them that weigh the same.
        gaps: (n, bins) fp64, as for `gap_values`.
        nlls: (n,) in nats.
        briers: (n,).
        parts: as for `gap_values`.
    """
    effects, bounds = gap_values(gaps, parts=parts)
    return [
        Measure("ECE-15", dict(zip(ids, effects.tolist(), strict=True)), better=LOWER, bounds=bounds, paired=False),
        Measure("NLL in nats", dict(zip(ids, nlls.tolist(), strict=True)), NUMBER, LOWER),
        Measure("Brier", dict(zip(ids, briers.tolist(), strict=True)), NUMBER, LOWER),
    ]


def detection_auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the AUROC in [0, 1] of an uncertainty score as a detector of outliers; 0.5 is chance.

    It is the probability that an outlier scores above an inlier, ties counted half.

    Args:
        inside: scores (n,) of inliers; higher scores mean less certain (pass the negative of a confidence).
        outside: scores (m,) of outliers.

    Raises:
        UserError: no inliers, no outliers, or NaN.
    """
    from torchmetrics.functional.classification import binary_auroc

    values = torch.cat([inside.detach().flatten(), outside.detach().flatten()]).cpu().double()
    if not (inside.numel() and outside.numel()) or bool(values.isnan().any()):
        raise UserError(
            f"AUROC of {inside.numel()} inside and {outside.numel()} outside: both are needed, without NaN."
        )
    # Ranks in [0, 1]: torchmetrics applies a sigmoid to other scores, which turns large scores into ties.
    ranks = torch.unique(values, return_inverse=True)[1].double()
    truth = torch.cat([torch.zeros(inside.numel()), torch.ones(outside.numel())]).long()
    return float(binary_auroc(ranks / ranks.max().clamp_min(1), truth))


def detection_values(inside: Tensor, outside: Tensor) -> Tensor:
    """Return values by example (n + m,) fp64, first of the inliers, whose mean is `detection_auroc`, with DeLong's variance.

    Arguments as in `detection_auroc`, and so are the errors.
    """
    area = detection_auroc(inside, outside)
    inliers, outliers = (values.detach().cpu().double().flatten() for values in (inside, outside))
    ranked_inliers = 1 - _above(inliers, outliers.sort().values)
    ranked_outliers = _above(outliers, inliers.sort().values)
    n = len(inliers) + len(outliers)
    parts = [area + n / len(ranked) * (ranked - area) for ranked in (ranked_inliers, ranked_outliers)]
    return torch.cat(parts)


def _auroc(p: Tensor, y: Tensor) -> float:
    """Return the mean AUROC over the classes that have both positive and negative examples; NaN without such a class."""
    from torchmetrics.functional.classification import multiclass_auroc

    counts = torch.bincount(y, minlength=p.shape[1])
    defined = (counts > 0) & (counts < len(y))
    if not defined.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes without an example, which are left out below
        by_class = multiclass_auroc(p, y, num_classes=p.shape[1], average=None)
    return float(by_class[defined].double().mean())


def _orders(p: Tensor, y: Tensor) -> Tensor:
    """Return the per-example values (n,) of the AUROC, averaged over the classes as in `_auroc`."""
    values = []
    for column, truth in zip(p.T, (y[:, None] == torch.arange(p.shape[1])).T):
        if 0 < int(truth.sum()) < len(y):
            positives = column[truth].sort().values
            negatives = column[~truth].sort().values
            ranked = torch.where(truth, _above(column, negatives), 1 - _above(column, positives))
            area, share = ranked[truth].mean(), truth.double().mean()
            values.append(area + (ranked - area) / torch.where(truth, share, 1 - share))
    return torch.stack(values).mean(0) if values else p.new_full((len(y),), math.nan)


def _above(values: Tensor, others: Tensor) -> Tensor:
    """Return the share of `others` (ascending) below each value, ties counted half."""
    below = torch.searchsorted(others, values.contiguous(), right=False)
    below_or_equal = torch.searchsorted(others, values.contiguous(), right=True)
    return (below + below_or_equal).double() / (2 * len(others))


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return checked probabilities fp64 (n, k) and labels int64 (n,) on the CPU."""
    shape = tuple(probabilities.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or labels.shape != shape[:1]:
        raise UserError(
            f"metrics: probabilities {shape}, labels {tuple(labels.shape)}: needed (n, k) with k >= 2 and (n,)."
        )
    p, y = probabilities.detach().cpu().double(), labels.detach().cpu()
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < p.shape[1]:
        raise UserError(
            f"metrics: labels are {y.dtype} in [{y.min()}, {y.max()}], needed whole numbers in [0, {p.shape[1] - 1}]."
        )
    if not bool((p >= 0).all()) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-2):
        raise UserError(
            "metrics: rows are not probabilities (negative, NaN, or not summing to 1); are they logits? Use softmax."
        )
    return p, y.long()
