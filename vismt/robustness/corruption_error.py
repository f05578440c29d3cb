"""Mean corruption error (Hendrycks & Dietterich, arXiv 1903.12261, section 4.2).

    CE_c = sum_s E_{s,c} / sum_s B_{s,c},    mCE = mean_c CE_c

E_{s,c} is the model's error under corruption c at severity s, B that of a baseline (AlexNet in the paper). The paper prints
100 * mCE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vismt.base.errors import UserError, near

# {corruption: {severity: error in [0, 1]}}
CorruptionErrors = Mapping[str, Mapping[int, float]]


def mean_corruption_error(errors: CorruptionErrors, baseline: CorruptionErrors | None = None) -> float:
    """Return the mean corruption error of a model; every corruption has the same weight.

    Args:
        errors: Error in [0, 1] by corruption and severity.
        baseline: Errors of the baseline for at least the same corruptions and severities; others are ignored.

    Returns:
        With a baseline mCE, which is 1 for a model like the baseline; without one the mean over corruptions of the mean
        error over severities, in [0, 1].

    Raises:
        UserError: No corruption, a corruption without severities, a baseline without one of them or without any error.
    """
    if not errors or not all(errors.values()):
        empty = next((corruption for corruption, by_severity in errors.items() if not by_severity), None)
        reason = f"'{empty}' has no severities" if errors else "no corruptions"
        raise UserError(f"mean corruption error: {reason}: evaluate one corruption and severity or more.")
    per_corruption = []
    for corruption, by_severity in errors.items():
        total = math.fsum(by_severity.values())
        if baseline is None:
            per_corruption.append(total / len(by_severity))
        else:
            per_corruption.append(total / _baseline_total(baseline, corruption, by_severity))
    return math.fsum(per_corruption) / len(per_corruption)


def _baseline_total(baseline: CorruptionErrors, corruption: str, severities: Mapping[int, float]) -> float:
    if corruption not in baseline:
        raise UserError(f"mean corruption error: the baseline has no '{corruption}'.{near(corruption, baseline)}")
    missing = sorted(set(severities) - set(baseline[corruption]))
    if missing:
        raise UserError(f"mean corruption error: the baseline has no '{corruption}' at severity {missing[0]}.")
    total = math.fsum(baseline[corruption][severity] for severity in severities)
    if not total > 0:
        raise UserError(
            f"mean corruption error: the baseline makes no error under '{corruption}': take another baseline."
        )
    return total
