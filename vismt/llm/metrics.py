"""How good and how honest class probabilities are: ACC, ECE, NLL, Brier and AUROC, with what intervals need.

    ECE   = sum_b |B_b| / n |acc_b - conf_b|        15 equal bins of the largest probability; empty bins count nothing
    NLL   = -mean log p_y                           Brier = mean sum_c (p_c - [y = c])^2, in [0, 2], 1 - 1/k for uniform p
    AUROC = mean over classes, each against the rest, ties counted half

Values come from torchmetrics, from all examples at once, so that a short last batch weighs what it should. ACC, NLL and Brier
are means of per-example values, which are returned: intervals and paired differences are those of a mean. So is AUROC to first
order: with V_i the share of the other label's examples that example i is on the right side of, and n_i the number of examples
with its own label, the values AUROC + (n / n_i) (V_i - AUROC) have its mean, and DeLong's variance (Biometrics 44, 1988).

ECE is no mean, and |.| makes it too large: a calibrated model has about 0.04 at n = 300. A resample adds that excess a second
time, so percentile intervals can miss the truth altogether. Here the gaps g of the bins (n g_b = |B_b| (acc_b - conf_b)) and
their bootstrap errors e stand apart: ECE(t) = sum_b |t g_b + e_b| is what would be seen if the true gaps were t g, and the
interval holds the t sum_b |g_b| for which the ECE seen lies within the middle 95 % of ECE(t). In simulations (n of 100 to 1000,
true ECE 0 to 0.2) it held the truth in 84 to 98 % of sets, the basic bootstrap interval in 70 % of calibrated ones. For the
difference of two models the paired bootstrap is worse still (0 to 83 %: the excess differs between the models and the
pairing makes it look certain), so `ece_difference` combines the two intervals by their squares (84 to 100 %). Where
two models are close, compare their paired NLL or Brier values instead.

Importing this loads torchmetrics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
)

from vismt.errors import UserError

BINS = 15


@dataclass(frozen=True)
class Scores:
    """Numbers of one model on n examples, and per example (n,) fp64 on the CPU whatever is a mean."""

    n: int
    accuracy: float
    ece: float
    nll: float
    brier: float
    auroc: float
    correct: Tensor
    nlls: Tensor
    briers: Tensor
    orders: Tensor  # mean = auroc, NaN where that is


def scores(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Scores:
    """All of them. probabilities: (n, k) float, rows sum to 1; labels: (n,) int in [0, k). Any device.

    A probability of 0 for the true class counts as the smallest normal number of its dtype. AUROC averages over the classes that
    some labels name and others do not; NaN where all labels are one class. Raises UserError for logits, NaN, labels out of
    range, shapes that do not fit.
    """
    p, y = _checked(probabilities, labels)
    k = p.shape[1]
    chosen = p.gather(1, y[:, None]).squeeze(1)
    briers = p.square().sum(1) - 2 * chosen + 1
    nlls = -chosen.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return Scores(
        n=len(y),
        accuracy=float(multiclass_accuracy(p, y, num_classes=k, average="micro")),
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
    """ECE in [0, 1] with `bins` equal bins, gaps weighted by their share of the examples. Arguments as `scores`."""
    p, y = _checked(probabilities, labels)
    if bins < 1:
        raise UserError(f"ECE: {bins} bins; at least 1.")
    return float(multiclass_calibration_error(p, y, num_classes=p.shape[1], n_bins=bins, norm="l1"))


def ece_interval(
    probabilities: Tensor, labels: Tensor, *, bins: int = BINS, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(ECE, low, high): the 95 % interval of the header, from bootstrap resamples of the examples; a function of the seed.

    low is 0 where a calibrated model could have shown this ECE.
    """
    low, _, high = _true_ece(*_checked(probabilities, labels), bins, resamples, seed)
    return expected_calibration_error(probabilities, labels, bins), low, high


def ece_difference(
    a: Tensor, b: Tensor, labels: Tensor, *, bins: int = BINS, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(ECE of a - ECE of b, low, high) on the same examples (n, k); the 95 % interval is of the true difference.

    It lies about the difference of the two without their excess, m_a - m_b, so the first number need not be its centre:
    low = m_a - m_b - sqrt((m_a - low_a)^2 + (high_b - m_b)^2), high likewise. Conservative, as it does not use the pairing.
    """
    (low_a, m_a, high_a), (low_b, m_b, high_b) = (
        _true_ece(*_checked(p, labels), bins, resamples, seed) for p in (a, b)
    )
    value = expected_calibration_error(a, labels, bins) - expected_calibration_error(b, labels, bins)
    below, above = math.hypot(m_a - low_a, high_b - m_b), math.hypot(high_a - m_a, m_b - low_b)
    return value, m_a - m_b - below, m_a - m_b + above


def detection_auroc(inside: Tensor, outside: Tensor) -> float:
    """AUROC of an uncertainty score (higher: less certain) that tells `outside` (m,) from `inside` (n,); .5 is chance.

    The chance that an outlier scores above an inlier, ties counted half. For a score that is higher inside, pass its negative.
    """
    values = torch.cat([inside.detach().flatten(), outside.detach().flatten()]).cpu().double()
    if not (inside.numel() and outside.numel()) or bool(values.isnan().any()):
        raise UserError(
            f"AUROC of {inside.numel()} inside and {outside.numel()} outside: both are needed, without NaN."
        )
    # Ranks in [0, 1]: torchmetrics puts other scores through a sigmoid, which makes ties of large ones.
    ranks = torch.unique(values, return_inverse=True)[1].double()
    truth = torch.cat([torch.zeros(inside.numel()), torch.ones(outside.numel())]).long()
    return float(binary_auroc(ranks / ranks.max().clamp_min(1), truth))


def _auroc(p: Tensor, y: Tensor) -> float:
    counts = torch.bincount(y, minlength=p.shape[1])
    told = (counts > 0) & (counts < len(y))
    if not told.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without an example, which are left out just below
        each = multiclass_auroc(p, y, num_classes=p.shape[1], average=None)
    return float(each[told].double().mean())


def _orders(p: Tensor, y: Tensor) -> Tensor:
    """The per-example values of the header (n,), averaged over the classes that tell, each against the rest."""
    found = []
    for column, truth in zip(p.T, (y[:, None] == torch.arange(p.shape[1])).T):
        if 0 < int(truth.sum()) < len(y):
            sides = column[truth].sort().values, column[~truth].sort().values
            placed = torch.where(truth, _above(column, sides[1]), 1 - _above(column, sides[0]))
            area, share = placed[truth].mean(), truth.double().mean()
            found.append(area + (placed - area) / torch.where(truth, share, 1 - share))
    return torch.stack(found).mean(0) if found else p.new_full((len(y),), math.nan)


def _above(values: Tensor, others: Tensor) -> Tensor:
    """The share of `others`, ascending, that each value is above, ties counted half."""
    below, reached = (torch.searchsorted(others, values.contiguous(), right=right) for right in (False, True))
    return (below + reached).double() / (2 * len(others))


def binned_gaps(p: Tensor, y: Tensor, bins: int) -> Tensor:
    """(n, bins): (correct - confidence) of each example in the column of its bin, so that ECE = sum_b |column sum| / n."""
    confidence, chosen = p.max(1)
    bounds = torch.linspace(0, 1, bins + 1, dtype=p.dtype)
    column = (torch.bucketize(confidence, bounds, right=True) - 1).clamp(0, bins - 1)
    gaps = p.new_zeros(len(p), bins)
    return gaps.scatter_(1, column[:, None], ((chosen == y).to(p.dtype) - confidence)[:, None])


def _true_ece(p: Tensor, y: Tensor, bins: int, resamples: int, seed: int) -> tuple[float, float, float]:
    """Low end, median and high end of the true ECE, as the header says."""
    columns = binned_gaps(p, y, bins)
    gap = columns.mean(0)
    errors = torch.cat([counts @ columns / len(y) for counts in _resamples(len(y), resamples, seed)]) - gap
    seen = float(gap.abs().sum())

    def quantile(t: float, level: float) -> float:
        return float(torch.quantile((t * gap + errors).abs().sum(1), level))

    def scale(level: float) -> float:
        """The t >= 0 at which the quantile is the ECE seen; 0 where it exceeds it already."""
        low, high = 0.0, 1.0
        if quantile(0.0, level) >= seen:
            return 0.0
        while quantile(high, level) < seen:
            high *= 2
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if quantile(middle, level) >= seen else (middle, high)
        return (low + high) / 2

    return scale(0.975) * seen, scale(0.5) * seen, scale(0.025) * seen


def _resamples(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each of n examples is drawn, fp64 (r, n), in pieces of `resamples`."""
    if resamples < 1:
        raise UserError(f"bootstrap: {resamples} resamples; at least 1.")
    generator = torch.Generator().manual_seed(seed)
    piece = max(1, 4_000_000 // n)
    for start in range(0, resamples, piece):
        drawn = torch.randint(n, (min(piece, resamples - start), n), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 (n, k) and int64 (n,) on the CPU."""
    if (
        probabilities.ndim != 2
        or not len(probabilities)
        or probabilities.shape[1] < 2
        or labels.shape != (len(probabilities),)
    ):
        seen = f"probabilities {tuple(probabilities.shape)}, labels {tuple(labels.shape)}"
        raise UserError(f"metrics: {seen}: needed (n, k) with k >= 2 and (n,).")
    p, y = probabilities.detach().cpu().double(), labels.detach().cpu()
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < p.shape[1]:
        seen = f"labels are {y.dtype} in [{y.min()}, {y.max()}]"
        raise UserError(f"metrics: {seen}, needed whole numbers in [0, {p.shape[1] - 1}].")
    if not bool((p >= 0).all()) or not torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-2):
        raise UserError(
            "metrics: rows are no probabilities (negative, NaN, or not summing to 1); are they logits? Use softmax."
        )
    return p, y.long()
