"""`evaluate.risk`: conformal sets and selective prediction, with thresholds from clean validation examples.

The thresholds are those of vismt/uncertainty/conformal.py (sets that contain the label with COVERAGE) and
vismt/uncertainty/selective.py (confidences above which _SHARE of the answers lie). Coverage, size of the sets, accepted share,
risk among the accepted and AURC are measures of every condition, clean, corrupted or attacked, from the record of every
example.

Under an attack the convention of accuracies holds (vismt/robustness/evaluate.py): an answer is right, and a label covered, when
it is so on the clean image, too. Sizes and confidences are those of the attacked image. Our attacks stop at wrong answers, where
the label is often still in the set. `torchattacks:PGD` raises -log p, the score of the sets, to its last step.

Examples that chose a learning rate are not exchangeable with those that come later: of five equal rates the best of 50 examples
has sets with a coverage of 87 to 88 % by the threshold of the same examples. With `tune`, one half of the validation examples
chooses the rates and the other half gives the thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.engine.study import TuneConfig
from vismt.jobs.task_sections import halves
from vismt.report.results import Result
from vismt.report.tables import Section, Table, number_text, row_text
from vismt.robustness.attacks.dense_attack import DenseAttack
from vismt.robustness.conditions import Perturbation, condition_of
from vismt.uncertainty.conformal import conformal_quantile, least_examples, set_sizes
from vismt.uncertainty.intervals import (
    CLEAN,
    LOWER,
    NUMBER,
    Condition,
    Estimate,
    Measure,
    group_index,
    interval_kind_text,
    wilson,
)
from vismt.uncertainty.selective import (
    accepting_threshold,
    risk_coverage_interval,
    risk_coverage_values,
    selective_risk,
)

COVERAGE, _SHARE = 0.9, 0.8  # of the sets; of the answers that are accepted
COVERED, SIZE, ACCEPTED, RISK, AURC = "coverage of sets", "classes in a set", "accepted", "selective risk", "AURC"
COLUMNS = (COVERED, SIZE, ACCEPTED, RISK, AURC)
_NOTE = (
    "Coverage: share of sets that contain the label, 90 % where examples are exchangeable with the validation examples that "
    "set the threshold. Accepted: answers with a confidence that 80 % of the validation answers have; the selective risk is "
    "the error among them. AURC: error averaged over all thresholds of the confidence. Under an attack an answer is right, and "
    "a label covered, when it is so on the clean image, too. Several corruptions have their least and largest value."
)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds from n validation examples: of -log p for sets, of confidences for answers."""

    quantile: float
    confidence: float
    n: int


def thresholds_file(task: str) -> str:
    """Return the name of the file with the thresholds of a task, in the folder of a training."""
    return f"risk-{task}.json"


def validation_parts(
    labels: Tensor, risk: bool, tune: TuneConfig | None, groups: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Return masks (n,) of the validation examples that choose rates, and of those that give the thresholds.

    They are the halves of every class, each of neighbours as in vismt.data.division, if there are rates to choose and
    thresholds to give, else all examples. No group is in both halves.

    Args:
        labels: int64 (n,).
        risk, tune: of the configuration.
        groups: group of each example; () for independent examples.
    """
    if not halves(risk, tune):
        return torch.ones_like(labels, dtype=torch.bool), torch.ones_like(labels, dtype=torch.bool)
    named: Sequence[Hashable] = groups or range(len(labels))
    chooses: dict[Hashable, bool] = {}
    before = 0
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().tolist()
        count = (before + len(members)) // 2 - before // 2  # so that half of all choose where classes are odd
        before += len(members)
        sizes = Counter(named[i] for i in members)
        count -= sum(size for group, size in sizes.items() if chooses.get(group))  # with an earlier class
        done = 0
        for group in [group for group in sizes if group not in chooses]:
            chooses[group] = done + sizes[group] / 2 < count
            done += sizes[group]
    mask = torch.tensor([chooses[group] for group in named], dtype=torch.bool)
    return mask, ~mask


def check_threshold_examples(labels: Tensor, tune: TuneConfig | None, groups: Sequence[str] = ()) -> None:
    """Raise UserError where the thresholds would come from too few validation examples; arguments as of `validation_parts`."""
    _need_examples(int(validation_parts(labels, True, tune, groups)[1].sum()))


def _need_examples(count: int) -> None:
    least = least_examples(COVERAGE)
    if count < least:
        raise UserError(
            f"evaluate.risk: {count} validation examples for the thresholds, which need {least} at least; with tune, half of "
            "the validation examples choose the rate. Take a larger validation share."
        )


def check_unused(risk: bool, tune: TuneConfig | None, folder: Path) -> None:
    """Raise UserError where a run chose its rates on all validation examples; risk: whether it was made with `evaluate.risk`."""
    if not risk and halves(True, tune):
        raise UserError(
            f"evaluate.risk: the run '{folder}' chose its rates on all of its validation images, so none are left for the "
            "thresholds; add evaluate.risk: true to that run and train it again."
        )


def fit_thresholds(log_p: Tensor, labels: Tensor) -> Thresholds:
    """Return the thresholds of clean examples. log_p: log-probabilities (n, k); labels: (n,)."""
    return thresholds_of(-log_p.gather(1, labels[:, None]).squeeze(1), log_p.amax(1).exp())


def thresholds_of(nlls: Tensor, confidences: Tensor) -> Thresholds:
    """Return the thresholds of clean examples from -log p of their labels (n,) and their largest probabilities (n,)."""
    _need_examples(len(nlls))
    return Thresholds(conformal_quantile(nlls, COVERAGE), accepting_threshold(confidences, _SHARE), len(nlls))


def risk_measures(
    ids: Sequence[str],
    covered: Tensor,
    sizes: Tensor,
    confidences: Tensor,
    wrong: Tensor,
    thresholds: Thresholds,
    groups: Mapping[str, str],
) -> list[Measure]:
    """Return the measures of one condition from values by example (n,) fp64, covered and wrong 0 or 1; groups: by id, or {}."""

    def by_id(values: Tensor) -> dict[str, float]:
        return dict(zip(ids, values.tolist(), strict=True))

    accepted = (confidences >= thresholds.confidence).double()
    measures = [
        Measure(COVERED, by_id(covered), counts=True),
        Measure(SIZE, by_id(sizes), NUMBER, LOWER),
        Measure(ACCEPTED, by_id(accepted), counts=True),
    ]
    risk = selective_risk(confidences, wrong, thresholds.confidence)
    if risk is not None:
        bounds = wilson(int((accepted * wrong).sum()), int(accepted.sum()))
        error = None if groups else Estimate.within(float(risk.mean()), bounds)
        measures.append(Measure(RISK, by_id(risk), better=LOWER, error=error))
    area = risk_coverage_values(confidences, wrong)
    index = group_index([groups[name] for name in ids]) if groups else None
    error = Estimate.within(float(area.mean()), risk_coverage_interval(confidences, wrong, index))
    return [*measures, Measure(AURC, by_id(area), better=LOWER, error=error, paired=False)]


def image_measures(
    rows: Sequence[Mapping],
    specs: Sequence[Perturbation | DenseAttack],
    num_classes: int,
    thresholds: Thresholds,
    groups: Mapping[str, str],
) -> list[tuple[Condition, Measure]]:
    """Return the measures of clean images and of each spec, from records of `evaluate_examples` with a quantile.

    groups: by id, or {}.
    """

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    ids = [row["id"] for row in rows]
    labels = column("label")
    clean = (column("clean nll") <= thresholds.quantile, column("clean") == labels)
    measures = []
    for condition, strict in [(CLEAN, False), *((condition_of(spec, num_classes), spec.worst_case) for spec in specs)]:
        name = condition.label
        covered, right = column(f"{name} nll") <= thresholds.quantile, column(name) == labels
        if strict:
            covered, right = covered & clean[0], right & clean[1]
        found = risk_measures(
            ids,
            covered.double(),
            column(f"{name} set"),
            column(f"{name} confidence"),
            (~right).double(),
            thresholds,
            groups,
        )
        measures += [(condition, measure) for measure in found]
    return measures


def choice_measures(
    log_p: Tensor, labels: Tensor, ids: Sequence[str], thresholds: Thresholds, groups: Mapping[str, str]
) -> list[Measure]:
    """Return the measures of examples from all log-probabilities (n, k); groups: by id, or {}."""
    chosen = log_p.gather(1, labels[:, None]).squeeze(1)
    confidences, answers = log_p.exp().max(1)
    return risk_measures(
        ids,
        (-chosen <= thresholds.quantile).double(),
        set_sizes(log_p, thresholds.quantile).double(),
        confidences.double(),
        (answers != labels).double(),
        thresholds,
        groups,
    )


def risk_section(results: Sequence[Result]) -> Section:
    """Return a row for each set and arm, clean, under each attack and over all corruptions; empty without the measures."""
    groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for row in results:
        if row.metric in COLUMNS and row.seed is None:
            condition = "corruptions" if row.kind == "corruption" else row.condition
            groups.setdefault((row.data, row.arm, condition), {}).setdefault(row.metric, []).append(row)
    if not groups:
        return Section("Risk")
    rows = [
        [*key, *(_cell(by_metric.get(metric, [])) for metric in COLUMNS), f"{by_metric[COVERED][0].n:,}"]
        for key, by_metric in groups.items()
    ]
    heads = ["Data", "Arm", "Condition", *(f"{name}, %" if name != SIZE else name for name in COLUMNS), "n"]
    kinds = dict.fromkeys(
        interval_kind_text(row.interval, row.units)
        for by_metric in groups.values()
        for found in by_metric.values()
        for row in found
    )
    note = f"{_NOTE} Intervals: {'; '.join(kinds)}."
    return Section("Risk", [(Table("Thresholds from clean validation examples", heads, rows, set(), texts=3), note)])


def _cell(rows: Sequence[Result]) -> str:
    if not rows:
        return "–"
    if len(rows) == 1:
        return row_text(rows[0])
    ends = (min(rows, key=lambda row: row.value), max(rows, key=lambda row: row.value))
    return " to ".join(number_text(row.value, row.scale, half=row.half) for row in ends)
