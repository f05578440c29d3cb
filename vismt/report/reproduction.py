"""Does a run reproduce a study? Each committed number against the same number of the run.

A re-run has other seeds, other examples and other rounding, so that its number y' differs from the committed y by the errors of
both. With V_e the variance over examples, S that of the trainings' scores, m and m' the numbers of trainings:

    |y' - y| <= t(1 - a/2, df) sqrt(V)          V = 2 V_e + S (1/m + 1/m')
    df = V^2 / ((2 V_e)^2 / df_e + (S (1/m + 1/m'))^2 / (m - 1))

the prediction interval by Welch and Satterthwaite. A confidence interval, of the committed number alone, would be left by one
re-run in six. A study of k numbers is reproduced where all of them are inside; each has the level 1 - a = 0.95^(1/k), with which
all k are inside by a probability of 0.95 at least, however they depend on each other (Sidak 1967, doi:10.2307/2283989).
Of a single training S is not known and left out: another seed can then fall outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

from vismt.report.results import ROUNDING
from vismt.report.study_rows import StudyRow, StudyRows
from vismt.uncertainty.intervals import SHARE, Estimate

FAMILY = 0.95


@dataclass(frozen=True)
class Verdict:
    """A committed number, its prediction interval, and the run's number, None where the run has none."""

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


def verdicts(committed: StudyRows, run: StudyRows) -> list[Verdict]:
    """Return the verdict of every committed number."""
    rows = committed.rows
    values = {row.key: row.value for row in run.rows}
    level = FAMILY ** (1 / max(1, len(rows)))
    found = []
    for row in rows:
        scores = list(committed.trainings(row).values())
        low, high = predicted(row, scores, len(run.trainings(row)) or 1, level)
        found.append(Verdict(row, low, high, values.get(row.key)))
    return found


def predicted(row: StudyRow, scores: Sequence[float], trainings: int, level: float) -> tuple[float, float]:
    """Return the prediction interval of a committed number for a re-run of a number of trainings.

    scores: the number by training, [] for a single one. level: probability that the number of a re-run is inside.
    """
    sources = [(2 * row.variance, row.freedom)]
    if len(scores) > 1:
        sources.append((variance(scores) * (1 / len(scores) + 1 / trainings), len(scores) - 1.0))
    half = Estimate(row.value, tuple(sources)).half_at(level)
    least, most = (-float(bool(row.minus)), 1.0) if row.scale == SHARE else (-math.inf, math.inf)
    return max(least, row.value - half), min(most, row.value + half)
