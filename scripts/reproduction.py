"""Check whether a run reproduces a study: each committed number is compared with the same number of the run.

A re-run has other seeds, other examples and other rounding, so that its number y' differs from the committed y by the errors of
both. V_e is the variance over examples, S is the variance of the trainings' scores, and m and m' are the numbers of trainings:

    |y' - y| <= q sqrt(V)          V = 2 V_e + S (1/m + 1/m')
    q = (2 V_e t(1 - a/2, df_e) + S (1/m + 1/m') t(1 - a/2, m - 1)) / V

This is the prediction interval with Cochran's quantile (`vismt.uncertainty.intervals.Estimate`). One re-run in six
would leave a confidence interval, which covers the committed number alone. A study of k numbers is reproduced if all of
them are inside. Each has the level 1 - a = 0.95^(1/k). All k are then inside with a probability of at least 0.95,
however they depend on each other (Sidak 1967, doi:10.2307/2283989). For a single training S is not known and left out,
so that another seed can fall outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

from scripts.study_rows import StudyRow, StudyRows
from vismt.report.results import ROUNDING
from vismt.uncertainty.intervals import SHARE, Estimate

FAMILY = 0.95


@dataclass(frozen=True)
class ReproducedNumber:
    """A committed number, its prediction interval, and the run's number (None if the run has none)."""

    row: StudyRow
    low: float
    high: float
    value: float | None

    @property
    def word(self) -> str:
        """Return "inside", "outside" or "missing"."""
        if self.value is None:
            return "missing"
        return "inside" if self.low - ROUNDING <= self.value <= self.high + ROUNDING else "outside"


def verdicts(committed: StudyRows, run: StudyRows) -> list[ReproducedNumber]:
    """Return the verdict of every committed number."""
    rows = committed.rows
    values = {row.key: row.value for row in run.rows}
    level = FAMILY ** (1 / max(1, len(rows)))
    found = []
    for row in rows:
        scores = list(committed.trainings(row).values())
        low, high = predicted(row, scores, len(run.trainings(row)) or 1, level)
        found.append(ReproducedNumber(row, low, high, values.get(row.key)))
    return found


def predicted(row: StudyRow, scores: Sequence[float], trainings: int, level: float) -> tuple[float, float]:
    """Return the prediction interval of a committed number for a re-run of a number of trainings.

    scores: Number by training, [] for a single training. level: Probability that the number of a re-run is inside.
    """
    sources = [(2 * row.variance, row.freedom)]
    if len(scores) > 1:
        sources.append((variance(scores) * (1 / len(scores) + 1 / trainings), len(scores) - 1.0))
    half = Estimate(row.value, tuple(sources)).half_at(level)
    least, most = (-float(bool(row.minus)), 1.0) if row.scale == SHARE else (-math.inf, math.inf)
    return max(least, row.value - half), min(most, row.value + half)
