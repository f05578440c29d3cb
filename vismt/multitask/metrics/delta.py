"""The multi-task gain Delta_m over a baseline (Maninis et al., arXiv 1904.08918)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vismt.base.errors import UserError


def delta_m(scores: Mapping[str, float], baseline: Mapping[str, float], lower_is_better: Mapping[str, bool]) -> float:
    """Return Delta_m = (100 / T) sum_t (-1)^{l_t} (M_t - B_t) / B_t, with l_t = 1 if lower is better.

    Report the baseline with the number. Usually it is single-task models with the same backbone. Table 3 of EMTAL takes
    TaskPrompter. LibMTL's Delta_p averages several metrics inside each task first and returns a fraction.

    Args:
        scores: Score M_t of each task.
        baseline: Score B_t of the same tasks, > 0.
        lower_is_better: Direction of each score.

    Returns:
        Delta_m in per cent. Positive values are gains.

    Raises:
        UserError: If no task is given, names differ, a value is not finite, or a baseline is <= 0.
    """
    if not scores:
        raise UserError("delta_m: no task; give scores by task.")
    for name, values in (("baseline", baseline), ("lower_is_better", lower_is_better)):
        unmatched = sorted(scores.keys() ^ values.keys())
        if unmatched:
            incomplete = name if unmatched[0] in scores else "scores"
            raise UserError(
                f"delta_m: '{unmatched[0]}' is missing from {incomplete}; scores, baseline and lower_is_better must have the "
                "same tasks."
            )
    total = 0.0
    for task, score in scores.items():
        reference = baseline[task]
        if not (math.isfinite(score) and math.isfinite(reference)):
            raise UserError(f"delta_m: '{task}' has score {score} and baseline {reference}; both must be finite.")
        if reference <= 0:
            raise UserError(
                f"delta_m: the baseline of '{task}' is {reference}; a relative change needs a positive baseline."
            )
        gain = (score - reference) / reference
        total += -gain if lower_is_better[task] else gain
    return 100 * total / len(scores)
