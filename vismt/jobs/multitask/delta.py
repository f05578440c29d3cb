"""delta_m of the arms of a dense run over its baseline (multitask/metrics/delta.py), with each image's first-order effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vismt.base import console
from vismt.base.errors import UserError
from vismt.jobs.multitask.config import DELTA
from vismt.multitask.metrics import delta_m
from vismt.uncertainty.intervals import CLEAN, LOWER, NUMBER, Measure, Score


def deltas(scores: Mapping[str, Sequence[Score]], baselines: Mapping[str, str]) -> dict[str, list[Score]]:
    """Return delta_m of every arm that trains all tasks under each condition, by arm. The baseline itself has none.

    scores: Scores by arm. baselines: Arm by task.
    """
    by_name: dict[str, list[Score]] = {}
    for condition in dict.fromkeys(score.condition for arm_scores in scores.values() for score in arm_scores):
        by_arm = {
            arm: {score.task: score for score in arm_scores if score.condition == condition}
            for arm, arm_scores in scores.items()
        }
        try:
            for arm, score in _of_arms(by_arm, baselines).items():
                by_name.setdefault(arm, []).append(score)
        except UserError as error:
            console.stage("eval", f"{condition.label}   no delta_m: {error}")
            if condition == CLEAN:
                return {}
    return by_name


def _of_arms(by_arm: Mapping[str, Mapping[str, Score]], baselines: Mapping[str, str]) -> dict[str, Score]:
    """Return delta_m by arm under one condition, for all arms or, with a UserError, for none. by_arm: scores by task."""
    base = {task: by_arm[arm][task] for task, arm in baselines.items() if task in by_arm.get(arm, {})}
    if not baselines or len(base) < len(baselines):
        return {}
    return {
        arm: _of_one({task: by_task[task] for task in baselines}, base, baselines.values())
        for arm, by_task in by_arm.items()
        if set(baselines.values()) != {arm} and set(baselines) <= set(by_task)
    }


def _of_one(scores: Mapping[str, Score], base: Mapping[str, Score], arms: Iterable[str]) -> Score:
    lower = {task: score.measure.better == LOWER for task, score in scores.items()}
    value = delta_m(
        {task: score.measure.score for task, score in scores.items()},
        {task: score.measure.score for task, score in base.items()},
        lower,
    )
    names = list(dict.fromkeys(name for score in scores.values() for name in score.measure.values))
    effect = dict.fromkeys(names, 0.0)
    for task, score in scores.items():
        measure = score.measure
        reference = base[task].measure
        sign = -1 if lower[task] else 1
        for name, psi in measure.values.items():  # images without a label of the task have no effect on it
            change = (psi - measure.score) / reference.score
            change -= measure.score * (reference.values[name] - reference.score) / reference.score**2
            effect[name] += sign * 100 / len(scores) * change * len(names) / len(measure.values)
    values = {name: value + change for name, change in effect.items()}
    row = next(iter(scores.values()))
    metric = f"over {'+'.join(dict.fromkeys(arms))} in per cent"
    groups = {name: group for score in scores.values() for name, group in score.measure.groups.items()}
    measure = Measure(metric, values, NUMBER, groups=groups, grouped_by=row.measure.grouped_by)
    return replace(row, task=DELTA, measure=measure)
