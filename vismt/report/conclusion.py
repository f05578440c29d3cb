"""The answer of a report: which model to take, why, and how many examples would tell the other models apart.

A conclusion is computed from numbers alone (`conclude`), and its texts are functions of the finished conclusion. The criteria and
the level at which their intervals hold together come from `vismt.report.comparison.key_comparisons`.

1. A model whose difference to the best model of a criterion excludes 0 is shown to be worse.
2. A model that is not told from a constant answer (the most frequent class, a guess) is not taken. A criterion in which no model
  is told from a constant answer decides nothing. If all criteria with a known constant answer are such, no model is taken.
3. Of the other models, all models within one standard error of the best model in every criterion are equally good choices
  (Breiman et al. 1984). The model with the fewest trained parameters among them is taken, without known numbers of parameters
  the best one.
4. Models are compared on what all of them were trained and scored on. If some lack a task, each task has its own answer.
5. n' examples show a true difference d with a power of 80 %, if the differences of n examples have the mean's variance V:

       n' = n V (z(1 - a/2) + z(0.8))^2 / d^2 + u z(1 - a/2)^2 / 2        u: examples per independent unit

   The last term stands for Student's t. The variance of the training seeds does not fall with the number of examples. If it takes
   more than half of what d allows, more seeds are needed, and the examples get the other half.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from vismt.report.comparison import Cell, Comparison, by_score, count_differences, is_constant, key_comparisons
from vismt.report.tables import bounds_text, counts_text, interval_text, kinds_text, number_text, scale_text
from vismt.uncertainty.intervals import HIGHER, SHARE, UNSTATED, Estimate, Scale

POWER = 0.8
_LEAST = 0.03  # smallest difference that is asked for: three points, or three per cent of the score
_MOST_EXAMPLES, _MOST_SEEDS = 1_000_000, 1_000  # larger numbers are not told apart
MOST_NAMES = 4


@dataclass(frozen=True)
class Finding:
    """What one criterion says.

    Args:
        name: Measure and condition, with what else tells it from the other criteria: "accuracy under PGD of signs".
        task, data, protocol, condition, metric, scale: Fields of its rows.
        scores: Value and ends of the 95 % interval by model, the best model first.
        lead: Difference of the best model to the next with the ends of its joint interval. None without paired examples.
        worse: Models that are shown to be worse than the best model.
        constant: Models that are not told from a constant answer.
        known: Whether a constant answer is known.
        missing: Models of the report that have no score, or were not trained on this task.
    """

    name: str
    task: str
    data: str
    protocol: str
    condition: str
    metric: str
    scale: Scale
    scores: dict[str, tuple[float, float, float]]
    lead: tuple[float, float, float] | None
    worse: Sequence[str]
    constant: Sequence[str]
    known: bool
    missing: Sequence[str]

    @property
    def decides(self) -> bool:
        """Whether a model is told from a constant answer."""
        return len(self.constant) < len(self.scores)


@dataclass(frozen=True)
class Needed:
    """Numbers of examples and training seeds that would show a difference of the taken model to its rival.

    seen: Whether the difference is the one of the scores. n: Examples of the report. seeds: 0 if its seeds are enough.
    """

    rival: str
    difference: float
    seen: bool
    unit: str
    n: int
    examples: int
    seeds: int


@dataclass(frozen=True)
class Answer:
    """The model to take by the criteria that the same models have.

    Args:
        subject: Task or set of the answer, "" for a whole report.
        findings: What each criterion says.
        take: Model to take. "" if no model is among the best in everything, or none is told from a constant answer.
        good: Models that are not shown to be worse in any criterion, and are told from a constant answer.
        near: Good models within one standard error of the best model in every criterion.
        size: Number of trained parameters of the model, None if the numbers of the near models are not known.
        needed: What would tell the model from its rival.
    """

    subject: str
    findings: Sequence[Finding]
    take: str
    good: Sequence[str]
    near: Sequence[str]
    size: float | None
    needed: Needed | None


@dataclass(frozen=True)
class Conclusion:
    """The answer of a report.

    Args:
        answers: One answer, or one for each task if the models have other tasks.
        differences: Number of differences whose intervals hold jointly (Sidak). 0 for a single model.
        level: Level of each of them.
        unstated: Metrics of which nobody said which values are better, if there are no others. There is no answer then.
    """

    answers: Sequence[Answer]
    differences: int
    level: float
    unstated: Sequence[str] = ()

    @property
    def take(self) -> str:
        """The first model to take, "" if there is none."""
        return next((answer.take for answer in self.answers if answer.take), "")

    @property
    def model(self) -> str:
        """The model to take, otherwise the best model of the first criterion."""
        return self.take or next((next(iter(answer.findings[0].scores)) for answer in self.answers), "")

    @property
    def text(self) -> str:
        """The answer in sentences."""
        if self.unstated:
            return f"Name the better values of {', '.join(self.unstated)} by --higher or --lower."
        if self.differences:
            return " ".join(map(_answer_text, self.answers))
        findings = [finding for answer in self.answers for finding in answer.findings]
        several = len({name for finding in findings for name in finding.scores}) > 1
        scores = [
            f"{name}: {of.name}{' in %' * (of.scale == SHARE)} {interval_text(*score, of.scale)}."
            for of in findings
            for name, score in of.scores.items()
        ]
        start = "The models have no measure in common." if several else "There is one model."
        return " ".join([start, *scores, *_constant_texts(findings)])

    @property
    def basis(self) -> str:
        """What the answer follows from."""
        if not self.differences:
            return ""
        more = [of.needed for of in self.answers if of.needed and (of.needed.examples > of.needed.n or of.needed.seeds)]
        units = " or ".join(dict.fromkeys(of.unit for of in more))
        count = f"{self.differences} differences" if self.differences > 1 else "one difference"
        basis = f"Differences are paired by example, with joint 95 % intervals of {count} (Šidák)."
        return basis + f" That many {units} have a power of 80 %." * bool(units)


def conclude(comparisons: Sequence[Comparison], sizes: Mapping[str, float]) -> Conclusion:
    """Return the answer that follows from the key comparisons, of which there is one or more.

    sizes: Number of trained parameters by model, as far as it is known.
    """
    criteria = key_comparisons(comparisons)
    if criteria[0].row.better == UNSTATED:
        return Conclusion([], 0, criteria[0].level, list(dict.fromkeys(c.row.metric for c in comparisons)))
    everyone = dict.fromkeys(name for c in [*criteria, *comparisons] for name in c.models if not is_constant(name))
    alike = len({frozenset(c.models) for c in criteria}) == 1
    several = len({c.row.task for c in criteria}) > 1
    groups: dict[str, list[tuple[Comparison, Finding]]] = {}
    for c, name in zip(criteria, criterion_names(criteria), strict=True):
        subject = "" if alike else c.row.task if several else c.data
        groups.setdefault(subject, []).append((c, _finding(c, name, everyone)))
    answers = [_answer(subject, group, sizes) for subject, group in groups.items()]
    return Conclusion(answers, count_differences(criteria), criteria[0].level)


def about(c: Comparison) -> str:
    """Return measure, task, set, protocol, condition and n of a comparison, and what its intervals cover."""
    row = c.row
    words = dict.fromkeys([scale_text(row.metric, row.scale), row.task, c.data, row.protocol, c.condition])
    return f"{', '.join(words)}; n = {counts_text([c])} {row.unit}; {kinds_text([c])}"


def criterion_names(criteria: Sequence[Comparison]) -> list[str]:
    """Return what each criterion measures, with the condition, protocol, set and task as far as they differ."""
    names = []
    for c in criteria:
        alike = [of for of in criteria if of.row.task == c.row.task]
        name = c.row.metric.partition(" in ")[0]
        if {of.condition for of in criteria} != {"clean"}:
            name = f"{name} under {c.condition}" if c.row.kind == "attack" else f"{c.condition} {name}"
        if len({of.data for of in alike}) > 1:
            name += f" on {c.data}"
        elif len({of.row.protocol for of in alike}) > 1:
            name += f" in {c.row.protocol}"
        names.append(name if len(alike) == len(criteria) else f"{name} of {c.row.task}")
    return names


def _finding(c: Comparison, name: str, everyone: Iterable[str]) -> Finding:
    best, *others = c.models
    row, lead = c.row, None
    if others and (found := c.pair(best, others[0])) is not None:
        half = found.half_at(c.level)
        lead = (found.mean, found.mean - half, found.mean + half)
    scores = {of: (c.cells[of].value, c.cells[of].low, c.cells[of].high) for of in c.models}
    known = bool(c.constants) or (row.chance is not None and row.better == HIGHER)
    worse = [of for of in others if c.tells(best, of)]
    constant = [of for of in scores if known and not _beats_constant(c, of)]
    place = (row.task, c.data, row.protocol, c.condition, row.metric, row.scale)
    return Finding(name, *place, scores, lead, worse, constant, known, [of for of in everyone if of not in scores])


def _beats_constant(c: Comparison, name: str) -> bool:
    """Return whether a model is shown to be better than the constant answer, or than a guess."""
    if c.constants and not is_constant(name):
        constant = c.constants[0]
        return name == by_score(c, [constant, name])[0] and c.tells(name, constant)
    return c.row.chance is None or c.cells[name].low > c.row.chance


def _deciding(findings: Sequence[Finding]) -> list[Finding]:
    """Return the criteria that decide. There are none if no model is told from any constant answer that is known."""
    told = [of for of in findings if of.decides]
    return told if any(of.known for of in told) or not any(of.known for of in findings) else []


def _answer(subject: str, group: Sequence[tuple[Comparison, Finding]], sizes: Mapping[str, float]) -> Answer:
    findings = [finding for _, finding in group]
    deciding = _deciding(findings)
    decide = [(c, finding) for c, finding in group if finding in deciding]
    out = {name for _, of in decide for name in of.worse}
    out |= {name for c, of in decide if c.row.kind != "attack" for name in of.constant}
    good = [
        of
        for of in (decide or group)[0][1].scores
        if decide and of not in out and all(of in one.scores for one in findings)
    ]
    near = [name for name in good if all(_is_near(c, name) for c, _ in decide)]
    take, size = next(iter(near or good), ""), None
    if near and all(name in sizes for name in near):
        take = min(near, key=sizes.__getitem__)
        size = sizes[take]
    return Answer(subject, findings, take, good, near, size, _needed(decide[0][0], take, good) if take else None)


def _is_near(c: Comparison, name: str) -> bool:
    """Return whether a model is within one standard error of the best model."""
    best = c.models[0]
    found, one, other = c.pair(best, name), c.cells[best], c.cells[name]
    error = math.hypot(one.high - one.low, other.high - other.low) / (2 * NormalDist().inv_cdf(0.975))
    return abs(one.value - other.value) <= (error if found is None else math.sqrt(found.variance))


def _needed(c: Comparison, model: str, good: Sequence[str]) -> Needed | None:
    """Return what would tell the taken model from the best of the other good models. Return None if it is not known."""
    rival, cell = next((name for name in c.models if name in good and name != model), ""), c.cells[model]
    found = c.pair(model, rival) if rival else None
    difference = max(abs(found.mean), _LEAST * (1 if c.row.scale == SHARE else abs(cell.value))) if found else 0.0
    if found is None or found.variance == 0 or difference == 0:
        return None
    examples, seeds = needed(found, cell, difference, c.level)
    seen = difference == abs(found.mean)
    return Needed(rival, difference, seen, c.row.unit, cell.n, examples, seeds if seeds > cell.seeds else 0)


def needed(found: Estimate, cell: Cell, difference: float, level: float) -> tuple[int, int]:
    """Return the numbers of examples and training seeds that show a true difference with a power of 80 %.

    Numbers above a million examples, or above a thousand seeds, are cut off there.

    Args:
        found: Paired difference over the examples and seeds of `cell`.
        cell: Cell with n and seeds.
        difference: Difference of the scores, above 0.
        level: Level of the interval that has to exclude 0.
    """
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    allowed = max((difference / (quantile + NormalDist().inv_cdf(POWER))) ** 2, sys.float_info.min)
    (variance, freedom), *others = found.sources
    of_seeds = math.fsum(variance for variance, _ in others)
    trainings = cell.seeds
    if of_seeds > allowed / 2:
        trainings = math.ceil(min(2 * cell.seeds * of_seeds / allowed, _MOST_SEEDS))
        of_seeds = allowed / 2
    per_unit = cell.n / (freedom + 1) if math.isfinite(freedom) else 1.0
    examples = cell.n * variance / (allowed - of_seeds) + per_unit * quantile**2 / 2
    return math.ceil(min(examples, _MOST_EXAMPLES)), trainings


# ---- texts of a conclusion ------------------------------------------------------------------------------------------------


def _answer_text(answer: Answer) -> str:
    findings = answer.findings
    decide = _deciding(findings)
    take, why = answer.take, ""
    if not decide:
        take, why = (
            "no model",
            f": none is told from a constant answer in {_either(of.name for of in findings if of.constant)}",
        )
    elif not take:
        best = (f"{next(name for name in of.scores if name not in of.constant)} for {of.name}" for of in decide)
        told = " and told from a constant answer" * any(of.constant for of in decide)
        take, why = _either(best), f": no model is among the best{told} in everything"
    start = f"For {answer.subject}, take" if answer.subject else "Take"
    texts = [f"{start} {take}{why}.", *(_worse_text(finding) for finding in findings if finding.worse)]
    alike = [finding.name for finding in decide if not finding.worse]
    if alike:
        names = list(findings[0].scores)
        told = f"{' and '.join(names)} are not shown to differ in"
        texts.append(
            f"{told if len(names) == 2 else 'No model is shown to be better than another in'} {_either(alike)}."
        )
    texts += [f"{_listed(of.missing)} not trained for {of.name}, or not scored." for of in findings if of.missing]
    texts += _constant_texts(findings) if decide else []
    if len(answer.good) > 1:
        texts.append(_reason_text(answer, decide))
    if answer.needed:
        texts.append(_needed_text(answer.take, answer.needed, decide[0]))
    return " ".join(texts)


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMES:
        return f"{len(names)} models are"
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"


def _constant_texts(findings: Sequence[Finding]) -> list[str]:
    """Return sentences on the models that are not told from a constant answer."""
    some = [
        f"{_listed(of.constant)} not told from a constant answer in {of.name}."
        for of in findings
        if of.decides and of.constant
    ]
    none = [of.name for of in findings if not of.decides]
    return [*some, f"No model is told from a constant answer in {_either(none)}."] if none else some


def _worse_text(finding: Finding) -> str:
    """Return the sentence about the models that are shown to be worse."""
    best, *others = finding.scores
    if len(finding.worse) < len(others):
        rest = _listed([name for name in others if name not in finding.worse])
        return f"{_listed(finding.worse)} shown to be worse than {best} in {finding.name}, {rest} not."
    than, lead = others[0] if len(others) == 1 else "every other model", ""
    if finding.lead is not None:
        lead = f": {bounds_text(*finding.lead, finding.scale, sign=True)} {_unit(finding)}"
        lead += f" against {others[0]}, the next" if len(others) > 1 else ""
    return f"{best} is shown to be better than {than} in {finding.name}{lead}."


def _unit(finding: Finding) -> str:
    """Return the unit of differences: "points" of a share, the metric's unit of a number."""
    return "points" if finding.scale == SHARE else finding.metric.partition(" in ")[2]


def _reason_text(answer: Answer, decide: Sequence[Finding]) -> str:
    """Return why a model is taken among several good ones."""
    scores, take = "score" if len(decide) == 1 else "score in each of these", answer.take
    if not answer.near:
        return f"No model lies within one standard error of the best {scores}. {take} is the best of these in {decide[0].name}."
    if answer.size is None:
        return f"{take} has the best score, which may be chance."
    start = f"Only {take} lies" if len(answer.near) == 1 else f"{take} is the smallest model"
    size = f"{answer.size:,.0f} trained parameters" if answer.size else "nothing is trained"
    return f"{start} within one standard error of the best {scores} ({size})."


def _needed_text(model: str, more: Needed, finding: Finding) -> str:
    size = number_text(more.difference, finding.scale, half=more.difference).removesuffix(".0")
    what = f"a difference of {f'{size} {_unit(finding)}'.strip()} between {model} and {more.rival}"
    if more.examples <= more.n and not more.seeds:
        return f"These {more.n:,} {more.unit} would have shown {what}."
    least = "at least " * (more.seeds == _MOST_SEEDS)
    seeds = f" and {least}{more.seeds:,} training seeds" if more.seeds else ""
    count = (
        f"{'About' if more.examples < _MOST_EXAMPLES else 'At least'} {float(f'{more.examples:.2g}'):,.0f} {more.unit}"
    )
    return f"{count}{seeds} would show {what}{', the one seen here' * more.seen}."
