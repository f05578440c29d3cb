"""Scores with a value for each example, their 95 % intervals, averages over sets and seeds, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import variance
from typing import Literal, cast

import torch
from torch import Tensor

from vismt.base.errors import UserError

# Which values of a measure are better; and its scale: in [0, 1] and shown in per cent, or any number.
Better = Literal["higher", "lower"]
Scale = Literal["share", "number"]
# What a 95 % interval covers; "" where an earlier version did not record it.
Covers = Literal[
    "", "sampler", "images", "examples", "seeds", "domains", "sampler+seeds", "images+seeds", "examples+seeds"
]
HIGHER: Better = "higher"
LOWER: Better = "lower"
SHARE: Scale = "share"
NUMBER: Scale = "number"


COVERED: dict[str, str] = {
    "sampler": "new episodes of the same images",
    "images": "new images of these classes",
    "examples": "new examples",
    "seeds": "training seeds",
    "domains": "new domains",
}


def interval_kind_text(kind: Covers) -> str:
    """Return what an interval covers as a phrase, "95 % over new images of these classes and training seeds"."""
    if not kind:
        return "95 %; an earlier version did not record what it covers"
    return f"95 % over {' and '.join(COVERED[part] for part in kind.split('+'))}"


def with_seeds_kind(kind: Covers) -> Covers:
    """Return the kind of an interval of `kind` that has the spread of training seeds as well."""
    return cast(Covers, kind if not kind or "seeds" in kind else f"{kind}+seeds")


def mean_interval(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval) of per-episode values (n,): 1.96 * std / sqrt(n), std with n - 1.

    Raises UserError for fewer than two values or a value that is not finite.
    """
    sample = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(sample) < 2 or not bool(sample.isfinite().all()):
        raise UserError(f"interval over {len(sample)} values: need 2 or more, all finite; run more episodes.")
    return float(sample.mean()), 1.96 * float(sample.std(unbiased=True)) / math.sqrt(len(sample))


def domain_average(domains: Mapping[str, Tensor | Sequence[float]]) -> tuple[float, float]:
    """(mean over domains, half width of its 95 % interval) from per-episode values (n_d,) of each domain.

    Every domain weighs the same whatever its n. The domains are taken as fixed, a list and not a sample of domains, so
    only the episodes within them are uncertain: standard error = sqrt(sum_d se_d^2) / D.
    """
    if not domains:
        raise UserError("average over domains: none given.")
    intervals = [mean_interval(values) for values in domains.values()]
    mean = math.fsum(mean for mean, _ in intervals) / len(intervals)
    return mean, math.sqrt(math.fsum(half**2 for _, half in intervals)) / len(intervals)


@dataclass(frozen=True)
class DomainRow:
    """One cell of a domain table: mean and 95 % half width over n episodes; the average carries the domain "average"."""

    domain: str
    condition: str
    value: float
    ci95: float
    n: int


def domain_table(results: Mapping[str, Mapping[str, Tensor]]) -> list[DomainRow]:
    """Rows of {domain: {condition: values (n,)}}, domain by domain, then the averages of conditions that all domains have."""
    rows = []
    for domain, conditions in results.items():
        for condition, values in conditions.items():
            rows.append(DomainRow(domain, condition, *mean_interval(values), len(values)))
    shared = [c for c in next(iter(results.values()), {}) if all(c in conditions for conditions in results.values())]
    for condition in shared if len(results) > 1 else []:
        domains = {domain: conditions[condition] for domain, conditions in results.items()}
        rows.append(DomainRow("average", condition, *domain_average(domains), sum(map(len, domains.values()))))
    return rows


def paired_bootstrap(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 10000,
) -> tuple[float, float, float, float]:
    """Is `a` better than `b` on the same episodes? Both (n,), paired by position.

    Returns (mean of a - b, low, high, p): the percentile 95 % interval over `resamples` draws of n episodes with
    replacement, and the two-sided p = 2 min(P(d* <= 0), P(d* >= 0)) with one added to counts and draws, at most 1.
    Deterministic in `seed`. Raises UserError for samples of different or too small size.
    """
    left, right = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (a, b))
    if len(left) != len(right) or len(left) < 2:
        raise UserError(f"paired comparison of {len(left)} and {len(right)} episodes: need the same 2 or more of both.")
    difference = left - right
    generator = torch.Generator().manual_seed(seed)
    means = []
    piece = max(1, 4_000_000 // len(difference))
    for start in range(0, resamples, piece):
        shape = (min(piece, resamples - start), len(difference))
        means.append(difference[torch.randint(len(difference), shape, generator=generator)].mean(1))
    draws = torch.cat(means)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return float(difference.mean()), low, high, min(1.0, 2 * (tail + 1) / (resamples + 1))


@dataclass(frozen=True)
class Condition:
    """What was done to the examples before a score was taken.

    label: its full text, unique within a run. kind: "clean", "attack", "corruption" or "variant" (of the model's outputs).
    family: what conditions of different strength have in common. level: the strength (radius, severity), None without one.
    """

    label: str = "clean"
    kind: str = "clean"
    family: str = "clean"
    level: float | None = None


CLEAN = Condition()


@dataclass(frozen=True)
class Measure:
    """A score as one value for each example, whose mean is the score; everything else about the score follows from them.

    A score that is not a mean (mIoU, perplexity, ECE) enters with the jackknife's pseudo-values, centred on the score.

    Args:
        metric: name of the score with its unit, "accuracy" or "RMSE in m".
        values: value by example.
        scale: "share" for scores in [0, 1], which are shown in per cent, else "number".
        better: "higher" or "lower".
        counts: whether every value is 0 or 1, so that the interval of one training is Wilson's.
        bounds: 95 % interval where another than that of a mean is wanted.
        paired: whether two models may be compared by the differences of their values.
        chance: score of a guess, None where there is none.
        covers: what the interval covers.
    """

    metric: str
    values: Mapping[str, float]
    scale: Scale = SHARE
    better: Better = HIGHER
    counts: bool = False
    bounds: tuple[float, float] | None = None
    paired: bool = True
    chance: float | None = None
    covers: Covers = "examples"

    @property
    def score(self) -> float:
        """The mean of the values."""
        return math.fsum(self.values.values()) / len(self.values)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the score over its examples: `bounds`, or 1.96 standard errors to both sides."""
        if self.bounds is not None:
            return self.bounds
        score, half = mean_interval(list(self.values.values()))
        return score - half, score + half

    def training_interval(self) -> tuple[float, float]:
        """95 % interval of the score of a single training: Wilson's where the values are 0 or 1."""
        return wilson(round(math.fsum(self.values.values())), len(self.values)) if self.counts else self.interval()


def averaged(measures: Sequence[Measure]) -> Measure:
    """Return the mean of one measure over several trainings, example by example, with the interval of `over_seeds`.

    The interval over the examples alone is that of the mean values; for a measure with bounds it has their mean width.
    """
    first, n = measures[0], len(measures)
    if n == 1:
        return first
    values = {name: math.fsum(measure.values[name] for measure in measures) / n for name in first.values}
    mean = replace(first, values=values, counts=False, bounds=None)
    if first.bounds is not None:
        half = math.fsum(high - low for low, high in (measure.interval() for measure in measures)) / n / 2
        mean = replace(mean, bounds=(mean.score - half, mean.score + half))
    return over_seeds(mean, [measure.score for measure in measures])


def over_seeds(measure: Measure, scores: Sequence[float]) -> Measure:
    """Return a measure whose interval has the spread of the trainings' scores beside that over the examples."""
    if len(scores) < 2:
        return measure
    low, high = measure.interval()
    half = with_seeds((high - low) / 2, scores)
    bounds = (measure.score - half, measure.score + half)
    return replace(measure, bounds=bounds, covers=with_seeds_kind(measure.covers))


def with_seeds(half: float, *trainings: Sequence[float]) -> float:
    """Return the half width of the 95 % interval over examples and training seeds together.

    With se_e = half / 1.96 the standard error over the examples, and s_g^2 the variance of the n_g scores of group g over n_g,

        t(0.975, df) sqrt(V)        V = se_e^2 + sum_g s_g^2        df = V^2 / sum_g s_g^4 / (n_g - 1)

    which is Welch and Satterthwaite's df with se_e taken as known, as in the interval of one training.

    Args:
        half: half width over the examples alone, of scores averaged over the seeds.
        trainings: scores by seed of each independent group: those of a model, or the differences of two models seed by seed.
            A group of one has no spread.
    """
    from scipy.stats import t as student

    groups = [scores for scores in trainings if len(scores) > 1]
    spreads = [variance(scores) / len(scores) for scores in groups]
    examples = (half / 1.96) ** 2
    if math.fsum(spreads) <= 1e-12 * examples:
        return half
    total = examples + math.fsum(spreads)
    freedom = total**2 / math.fsum(s**2 / (len(scores) - 1) for s, scores in zip(spreads, groups, strict=True))
    return float(student.ppf(0.975, freedom)) * math.sqrt(total)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, `correct` out of `n` > 0."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def seeds_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half width of the 95 % interval by Student's t) of two or more values, one for each training seed."""
    from scipy.stats import t as student

    n, mean = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
