"""Accuracy and calibration of class probabilities: ACC, ECE, NLL, Brier and AUROC, with values by example and intervals.

    ECE   = sum_b |B_b| / n |acc_b - conf_b|        15 equal bins of the largest probability. Empty bins do not count
    NLL   = -mean log p_y                           Brier = mean sum_c (p_c - [y = c])^2, in [0, 2], 1 - 1/k for uniform p
    AUROC = mean over classes, each against the rest, ties counted half

Values come from torchmetrics, from all examples at once, so that a short last batch has the right weight. ACC, NLL and Brier
are means of the returned values by example, so that they have the intervals and paired differences of a mean. The same holds
for AUROC to first order. Let V_i be the share of examples of the other label that are ranked correctly against example i, and
n_i the number of examples with the label of i. The values AUROC + (n / n_i) (V_i - AUROC) have the AUROC as their mean and
DeLong's variance (Biometrics 44, 1988).

ECE is not a mean, and |.| biases it upwards. A calibrated model has about 0.04 at n = 300. Let g_b be the mean gap of bin b,
and C the covariance of the errors e of these means. If the true gaps were t g, ECE(t) = sum_b |t g_b + e_b| would be observed.
If the errors are normal, ECE(t) has the mean m(t) and the variance V(t) of folded normal variables,

    m(t) = sum_b E|t g_b + e_b|,    V(t) = sum_b Var|t g_b + e_b| + sum_{b != c} w_b w_c C_bc,    w_b = E sign(t g_b + e_b).

The ends of the interval are the t sum_b |g_b| with m(t) ± q sqrt(V(t)) = ECE. The bias at an end is m(t) - t sum_b |g_b|. A
score keeps both biases and one variance, V(t) at the upper end, where it is largest. Averages over seeds and sets average the
biases, and average or divide the variance (vismt.uncertainty.intervals.Estimate). docs/coverage.md has the coverage. The
difference of two models has no such interval, because the bias differs between the models. Compare their paired NLL or Brier
values.

NLL and Brier score are proper: their expectation is smallest for the true probabilities (Good, J. R. Stat. Soc. B 14, 1952, and
Brier, Monthly Weather Review 78, 1950). torchmetrics is imported when a score is computed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.storage.files import JsonObject
from vismt.storage.records import Field
from vismt.uncertainty.intervals import LOWER, NUMBER, SHARE, Estimate, Measure, group_index, student_quantile

BINS = 15


@dataclass(frozen=True)
class Scores:
    """Scores of a model on n examples. The scores that are means also have values by example, (n,) fp64 on the CPU.

    correct: Values of the accuracy. nlls: Values of the NLL, in nats. briers: Values of the Brier score. orders: Values of the
    AUROC, NaN if the AUROC is NaN.
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
        probabilities: Probabilities (n, k), float on any device, with rows that sum to 1. A probability of 0 for the true class
            counts as the smallest normal number of its dtype.
        labels: Integers (n,) in [0, k).
        bins: Number of bins of the ECE.

    Returns:
        The scores. AUROC is the mean over the classes that have both positive and negative examples. It is NaN if all labels are
        equal.

    Raises:
        UserError: For logits, NaN, labels out of range, or shapes that do not fit.
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
    """Return the ECE in [0, 1] with `bins` equal bins and gaps weighted by their share of the examples.

    Arguments are as in `scores`.
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


def largest_probability(log_p: Tensor) -> Tensor:
    """Return the confidence (n,) of log-probabilities (n, k)."""
    return log_p.exp().amax(1).clamp_max(1)


def binned_gaps(confidences: Tensor, correct: Tensor, bins: int = BINS) -> Tensor:
    """Return (n, bins) with (correct - confidence) of each example in the column of its bin. ECE = sum_b |column sum| / n.

    Args:
        confidences: Largest probability of each example (n,), float64 in [0, 1].
        correct: 1 if the class with the largest probability is the label, else 0, (n,).
        bins: Number of equal bins.
    """
    bounds = torch.linspace(0, 1, bins + 1, dtype=confidences.dtype)
    column = (torch.bucketize(confidences, bounds, right=True) - 1).clamp(0, bins - 1)
    gaps = confidences.new_zeros(len(confidences), bins)
    return gaps.scatter_(1, column[:, None], (correct.to(confidences.dtype) - confidences)[:, None])


def gap_values(gaps: Tensor, groups: Sequence[Hashable] | None = None) -> tuple[Tensor, Estimate | None]:
    """Return values by row (n,) whose mean is the ECE (its first-order effects), and the ECE with its error.

    The estimate is None with fewer than two rows or groups, which have no error.

    Args:
        gaps: Rows (n, bins) fp64 of `binned_gaps`. Examples that share a row (the queries of an episode) have their mean row.
        groups: Group of each row, as for `vismt.uncertainty.intervals.estimate`. None if the rows are independent.
    """
    gap, n = gaps.mean(0), len(gaps)
    observed, signs = float(gap.abs().sum()), gap.sign()
    values, index = (gaps * signs).sum(1), group_index(groups or range(n))
    count = int(index.max()) + 1
    if count < 2:
        return values, None
    sums = gaps.new_zeros(count, gaps.shape[1]).index_add_(0, index, gaps - gap)
    covariance = count / (count - 1) * (sums.T @ sums) / n**2
    deviations = covariance.diag().sqrt()
    between = (covariance - covariance.diag().diag()) * signs.outer(signs)
    normal = torch.distributions.Normal(0.0, 1.0)

    def moments(t: float) -> tuple[float, float]:
        """Return the mean and the variance of the ECE that is observed if the true gaps are t times the observed gaps."""
        means = t * gap.abs()
        ratios = means / deviations.clamp_min(torch.finfo(gaps.dtype).tiny)
        weights = 2 * normal.cdf(ratios) - 1
        folded = 2 * deviations * normal.log_prob(ratios).exp() + means * weights
        variance = (means**2 + deviations**2 - folded**2).clamp_min(0).sum() + weights @ between @ weights
        return float(folded.sum()), max(float(variance), 0.0)

    quantile = student_quantile(0.975, count - 1)

    def scale(side: int) -> float:
        """Return the t >= 0 with m(t) + side q sqrt(V(t)) = ECE, 0 if m(0) is beyond it already."""
        from scipy.optimize import brentq

        def excess(t: float) -> float:
            mean, variance = moments(t)
            return mean + side * quantile * math.sqrt(variance) - observed

        if observed == 0 or excess(0.0) >= 0:
            return 0.0
        # m(t) >= t ECE, so that the excess is positive at this t.
        return float(brentq(excess, 0.0, 2 + quantile * math.sqrt(float(covariance.abs().sum())) / observed))

    lower, upper = scale(1), scale(-1)
    bias = (moments(lower)[0] - lower * observed, moments(upper)[0] - upper * observed)
    return values, Estimate(observed, ((moments(upper)[1], count - 1.0),), bias=bias)


@dataclass(frozen=True)
class ProbabilityMeasure:
    """A measure of class probabilities that jobs record and score. Lower is better.

    Args:
        metric: Name in rows and tables, with its unit.
        column: Field in the record of an example, after the form of the logits: "clean nll".
        values: Function values(log_p (n, k), labels int64 (n,)) that returns the value of each example (n,), float64.
        field: Range of these values.
        parts: Function parts(values (n,), right (n,)) that returns what is averaged over examples, (n,) or (n, d). None for the
            values.
        parts_column: Field in the record of a group of examples, such as an episode, for the mean of the parts. By default
            `column`.
        parts_field: Range of the mean.
        measure: Function measure(parts, group of each row or None) that returns the values (n,) whose mean is the score, and
            changes of the fields of `Measure`. None for a mean.
    """

    metric: str
    column: str
    values: Callable[[Tensor, Tensor], Tensor]
    field: Field
    parts: Callable[[Tensor, Tensor], Tensor] | None = None
    parts_column: str = ""
    parts_field: Field | None = None
    measure: Callable[[Tensor, Sequence[Hashable] | None], tuple[Tensor, JsonObject]] | None = None

    @property
    def of_group(self) -> str:
        """Field in the record of a group of examples."""
        return self.parts_column or self.column


def _calibration(gaps: Tensor, groups: Sequence[Hashable] | None) -> tuple[Tensor, JsonObject]:
    values, error = gap_values(gaps, groups)
    return values, {"scale": SHARE, "error": error, "paired": False}


# A measure of probabilities needs only an entry here. Records, scores and tables of every job follow from it.
MEASURES = [
    ProbabilityMeasure(
        "ECE-15",
        "confidence",
        lambda log_p, labels: largest_probability(log_p),
        Field(0, 1),
        parts=binned_gaps,
        parts_column="gaps",
        parts_field=Field(-1, 1, several=True),
        measure=_calibration,
    ),
    ProbabilityMeasure("NLL in nats", "nll", lambda log_p, labels: proper_scores(log_p, labels)[0], Field(0)),
    ProbabilityMeasure("Brier", "brier", lambda log_p, labels: proper_scores(log_p, labels)[1], Field(0, 2)),
]


def example_values(log_p: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the values (n,) of examples by column, of log-probabilities (n, k) float64 and labels int64 (n,)."""
    return {one.column: one.values(log_p, labels) for one in MEASURES}


def group_row(form: str, log_p: Tensor, labels: Tensor) -> JsonObject:
    """Return the fields of the record of a group of examples, means over them. Arguments are as in `example_values`."""
    right = log_p.argmax(1) == labels
    return {
        f"{form} {one.of_group}": _parts(one, one.values(log_p, labels), right).mean(0).tolist() for one in MEASURES
    }


def group_fields(forms: Iterable[str]) -> dict[str, Field]:
    """Return the fields of `group_row` by name, for forms of the logits."""
    return {f"{form} {one.of_group}": one.parts_field or one.field for form in forms for one in MEASURES}


def example_measures(
    ids: Sequence[str], values: Mapping[str, Tensor], right: Tensor, groups: Mapping[str, str] | None = None
) -> list[Measure]:
    """Return the measures of examples.

    Args:
        ids: Names of n examples.
        values: Values (n,) float64 by column, as `example_values` returns them.
        right: 1 if the answer is the label, else 0, (n,).
        groups: Group by name, as in `Measure`. None if the examples are independent.
    """
    return [_measure(one, ids, _parts(one, values[one.column], right), groups) for one in MEASURES]


def group_measures(
    ids: Sequence[str], form: str, rows: Mapping[str, Tensor], groups: Mapping[str, str] | None = None
) -> list[Measure]:
    """Return the measures of groups of examples with equal weights. rows: Fields of `group_row`, (n,) or (n, d)."""
    return [_measure(one, ids, rows[f"{form} {one.of_group}"], groups) for one in MEASURES]


def _parts(one: ProbabilityMeasure, values: Tensor, right: Tensor) -> Tensor:
    return values if one.parts is None else one.parts(values, right)


def _measure(one: ProbabilityMeasure, ids: Sequence[str], parts: Tensor, groups: Mapping[str, str] | None) -> Measure:
    of_row = [groups[name] for name in ids] if groups else None
    values, changes = (parts, {}) if one.measure is None else one.measure(parts, of_row)
    by_id = dict(zip(ids, values.tolist(), strict=True))
    settings: JsonObject = {"scale": NUMBER, "better": LOWER, "groups": groups or {}, **changes}
    return Measure(one.metric, by_id, **settings)


def detection_auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the AUROC in [0, 1] of an uncertainty score as a detector of outliers. 0.5 is chance.

    It is the probability that an outlier scores above an inlier, ties counted half.

    Args:
        inside: Scores (n,) of inliers. Higher scores mean less certain (pass the negative of a confidence).
        outside: Scores (m,) of outliers.

    Raises:
        UserError: If inliers or outliers are missing, or for NaN.
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
    """Return values by example (n + m,) fp64, inliers first, whose mean is `detection_auroc`, with DeLong's variance.

    Arguments and errors are as in `detection_auroc`.
    """
    area = detection_auroc(inside, outside)
    inliers, outliers = (values.detach().cpu().double().flatten() for values in (inside, outside))
    ranked_inliers = 1 - _above(inliers, outliers.sort().values)
    ranked_outliers = _above(outliers, inliers.sort().values)
    n = len(inliers) + len(outliers)
    parts = [area + n / len(ranked) * (ranked - area) for ranked in (ranked_inliers, ranked_outliers)]
    return torch.cat(parts)


def _auroc(p: Tensor, y: Tensor) -> float:
    """Return the mean AUROC over the classes that have both positive and negative examples. NaN without such a class."""
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
    """Return the values by example (n,) of the AUROC, averaged over the classes as in `_auroc`."""
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
