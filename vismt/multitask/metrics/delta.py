"""The multi-task gain Delta_m over a baseline (Maninis et al., arXiv 1904.08918)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vismt.errors import UserError


def delta_m(scores: Mapping[str, float], baseline: Mapping[str, float], lower_is_better: Mapping[str, bool]) -> float:
    """Delta_m = (100 / T) sum_t (-1)^{l_t} (M_t - B_t) / B_t in percent, l_t = 1 where lower is better; positive is a gain.

    One metric a task, by name in all three. Always say what the baseline is: usually single-task models with the same
    backbone; Table 3 of EMTAL takes TaskPrompter itself. LibMTL's Delta_p averages several metrics inside each task first and
    returns a fraction. Raises UserError for no task, names that differ, values that are not finite, a baseline <= 0.
    """
    if not scores:
        raise UserError("delta_m: no task: give scores by task.")
    for what, given in (("baseline", baseline), ("lower_is_better", lower_is_better)):
        odd = sorted(scores.keys() ^ given.keys())
        if odd:
            lacks = what if odd[0] in scores else "scores"
            raise UserError(
                f"delta_m: '{odd[0]}' is missing from {lacks}: scores, baseline, lower_is_better need equal tasks."
            )
    total = 0.0
    for task, score in scores.items():
        reference = baseline[task]
        if not (math.isfinite(score) and math.isfinite(reference)):
            raise UserError(f"delta_m: '{task}' has score {score} and baseline {reference}: both must be finite.")
        if reference <= 0:
            raise UserError(
                f"delta_m: the baseline of '{task}' is {reference}: a relative change needs a positive one."
            )
        gain = (score - reference) / reference
        total += -gain if lower_is_better[task] else gain
    return 100 * total / len(scores)
