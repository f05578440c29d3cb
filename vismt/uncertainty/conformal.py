"""Split conformal prediction sets: sets of classes that contain the true class with a chosen probability.

    s_i = -log p_i(y_i)        scores of n calibration examples that no training and no choice of settings used
    q = the ceil((n + 1) (1 - alpha))-th smallest s_i          C(x) = {c: -log p_c(x) <= q}
    1 - alpha <= P(y in C(x)) <= 1 - alpha + 1 / (n + 1)       for an exchangeable example, without ties, averaged over
                                                               draws of the calibration examples

The log score orders classes as 1 - p does, so the sets equal the sets of the least ambiguous classifiers (Sadinle, Lei and
Wasserman, JASA 114, 2019). It also keeps probabilities apart that round to 1. Split conformal prediction: Papadopoulos et al.,
ECML 2002, and Vovk, Gammerman and Shafer, 2005. The rank counts the new example among the n + 1. The plain quantile of n scores
covers too little. Sets may be empty: if a classifier is right more often than 1 - alpha, some of its answers are withheld.

The guarantee needs exchangeable examples. Under corruption or attack it does not hold, and there the coverage is measured.
Left out: adaptive sets (APS, RAPS). They are larger, and their coverage differs less between easy and hard examples.
"""

from __future__ import annotations

import math

from torch import Tensor

from vismt.base.errors import UserError


def least_examples(coverage: float) -> int:
    """Return the smallest number of calibration examples for which a quantile of `coverage` exists."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def conformal_quantile(scores: Tensor, coverage: float) -> float:
    """Return the threshold q of the scores of calibration examples.

    Args:
        scores: Scores (n,), float, -log p of the true classes.
        coverage: Coverage 1 - alpha, in (0, 1).

    Raises:
        UserError: For a coverage out of range, too few examples for it, or NaN.
    """
    if not 0 < coverage < 1:
        raise UserError(f"conformal sets: coverage {coverage}; it lies between 0 and 1.")
    n = scores.numel()
    if n < least_examples(coverage) or bool(scores.isnan().any()):
        raise UserError(
            f"conformal sets: {n} calibration examples; {100 * coverage:g} % coverage needs {least_examples(coverage)} "
            "or more, without NaN; take a larger validation share."
        )
    rank = math.ceil((n + 1) * coverage - 1e-9)  # of a product such as 10 * 0.9, which may round up
    return float(scores.detach().flatten().double().kthvalue(rank).values)


def set_sizes(log_p: Tensor, quantile: float) -> Tensor:
    """Return the number of classes (n,) in each set. log_p: Log-probabilities (n, k), -inf for impossible classes."""
    return (-log_p <= quantile).sum(1)
