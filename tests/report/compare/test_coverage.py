"""Coverage, p and power of paired differences, by simulation: examples, groups and seeds with effects of their own."""

import math

import numpy as np
import pytest
from scipy import stats

from vismt.report.compare.pairs import GivenScores, paired_differences
from vismt.report.compare.score_tables import TrainingValues
from vismt.report.comparison import compare_results

pytestmark = pytest.mark.slow
DRAWS = 300
BAND = 2 * math.sqrt(0.05 * 0.95 / DRAWS)  # two standard errors of a share of 95 %
# Examples, seeds, examples of a group, and whether a value says right or wrong.
CASES = [(100, 1, 1, True), (200, 1, 20, False), (400, 3, 4, True), (200, 2, 1, False)]


def draw(rng, n, seeds, size, binary, shift):
    """The difference that two models have on a new draw of examples, groups and seeds, and the difference that is true."""
    groups = np.repeat(np.arange(n // size), size)
    shared = rng.normal(size=n // size)[groups] + rng.normal(size=n)
    trainings = []
    for model, level in (("a", 0.0), ("b", shift)):
        own = 0.7 * rng.normal(size=n // size)[groups]
        for seed in range(seeds):
            values = level + (0.15 * rng.normal() if seeds > 1 else 0.0) + shared + own + rng.normal(size=n)
            listed = (values > 0).astype(float).tolist() if binary else values.tolist()
            ids = [str(i) for i in range(n)]
            named = [str(group) for group in groups] if size > 1 else []
            trainings.append(TrainingValues("", model, "all", str(seed), ids, {"score": listed}, groups=named))
    scores = GivenScores(trainings)
    (pair,) = paired_differences(compare_results(scores.results, scores))
    spread = math.sqrt(3 + 0.7**2 + (0.15**2 if seeds > 1 else 0.0))
    return pair, stats.norm.cdf(shift / spread) - 0.5 if binary else shift


@pytest.mark.parametrize(
    ("case", "points"), [*((case, 0.0) for case in CASES), (CASES[0], 0.05), (CASES[2], 0.05)], ids=str
)
def test_intervals_cover_and_p_is_uniform_without_a_difference(case, points):
    n, seeds, _, binary = case
    shift = points * 4.7 if binary else points
    rng = np.random.default_rng(n + seeds)
    pairs = [draw(rng, *case, shift) for _ in range(DRAWS)]
    covered = np.mean([pair.low <= truth <= pair.high for pair, truth in pairs])
    # Two seeds: Cochran's quantile covers up to 99.5 %.
    assert 0.93 - BAND <= covered <= (1.0 if seeds == 2 else 0.97 + BAND)
    if points == 0 and seeds == 1:
        p = np.array([pair.p for pair, _ in pairs])
        for level in (0.05, 0.2, 0.5):
            assert abs(np.mean(p <= level) - level) <= 3 * math.sqrt(level * (1 - level) / DRAWS)


@pytest.mark.parametrize("case", [(400, 1, 10, True), (400, 3, 1, False)], ids=str)
def test_the_stated_difference_is_found_in_80_percent(case):
    rng = np.random.default_rng(1)
    stated = np.mean([draw(rng, *case, 0.0)[0].detectable for _ in range(50)])
    spread = math.sqrt(3 + 0.7**2)
    shift = stats.norm.ppf(0.5 + stated) * spread if case[3] else stated
    found = np.mean([pair.low > 0 for pair, _ in (draw(rng, *case, shift) for _ in range(DRAWS))])
    assert 0.75 - BAND <= found <= 0.85 + BAND
