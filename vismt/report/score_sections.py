"""The sections about the scores of a study: by set and by level, clean scores by seed, paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from vismt.engine.log import record_stem
from vismt.evaluation.sections import FEATURES
from vismt.report import arm_figures, figures
from vismt.report.arm_figures import SeedsPanel
from vismt.report.comparison import AVERAGE, Comparison, Evidence, ExampleValues, arm_title, block_key
from vismt.report.results import Result
from vismt.report.tables import (
    Picture,
    Section,
    Table,
    bounds_text,
    interval_text,
    kinds_text,
    number_text,
    row_text,
    scale_text,
    split_corruptions,
    without_further,
)
from vismt.uncertainty.features import Summary
from vismt.uncertainty.intervals import LOWER, SHARE, interval_kind_text, mean_interval

MOST_PANELS = 12  # number of panels of the figure by seed
MOST_OPEN = 3  # number of figures of scores (of more figures the first is shown, and the others on request)
ARROWS = "↓ lower is better, ↑ higher is better."
SEED_NOTE = (
    f"{ARROWS} Means, and differences from the named arm. Intervals: 95 % over training seeds only, by Student's t, on these "
    "test examples; those of the tables above cover examples and seeds. The average gives every set the same weight."
)
_PAIRS_NOTE = (
    f"{ARROWS} The later model minus the earlier one on the same examples, each averaged over the seeds. [ ]: {{kinds}}. Of "
    "twenty pairs without a difference, one is expected to show one."
)
SEEDS_CAPTION = (
    "Lines join the dots of one seed; bars and numbers are means over seeds. Each panel has its own scale, which does not "
    f"begin at 0. {ARROWS}"
)
CERTIFIED_CAPTION = (
    "Shaded: the smoothed classifier provably keeps at least this accuracy under any change of that l2 length. Dashed: the "
    "classifier itself has at most this accuracy under attacks in l2. The proof holds for no other norm."
)


@dataclass(frozen=True)
class ArmScore:
    """One score of a study under one condition.

    Args:
        row: What the rows of the score have in common. Its arm, seed and value belong to the first row.
        data: Name of the set, "average" for the mean over the sets.
        name: Set, task and protocol, as far as they tell this score from other scores.
        arms: Rows by arm, one for each set.
        seeds: Values by arm and seed.
    """

    row: Result
    data: str
    name: str
    arms: dict[str, list[Result]]
    seeds: dict[tuple[str, int], float]

    @property
    def metric(self) -> str:
        """Metric with an arrow to the better side."""
        return scale_text(self.row.metric, self.row.scale, self.row.better)

    @property
    def label(self) -> str:
        """Name and metric."""
        return f"{self.name}: {self.metric}"

    @property
    def count(self) -> str:
        """Number of examples over all sets, from the least to the most over the arms."""
        counts = {sum(row.n for row in rows) for rows in self.arms.values()}
        return " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))


def score_sections(
    folder: Path,
    results: Sequence[Result],
    comparisons: Sequence[Comparison],
    values: ExampleValues,
    compared: Sequence[str],
) -> list[Section]:
    """Return the sections about the scores of a run, or of several, and draw their pictures in figures/ of a folder.

    compared: Evaluated models that come from trainings, for which seeds and pairs are shown.
    """
    results, comparisons = [row for row in results if not row.further], without_further(comparisons)
    conditions = {c.condition for c in split_corruptions(comparisons)[0]}  # many corruptions have tables of their own
    names = {arm: arm_title(arm, conditions) for arm in compared}
    scores = arm_scores([row for row in results if row.condition in conditions], names)
    clean = [score for score in scores if score.row.condition == "clean"]
    bars = _bars(folder, comparisons)
    baselines = {c.row.task: c.base for c in comparisons}
    arms = list(names.values())
    return [
        Section("Scores by set", pictures=bars, folded=len(bars) > MOST_OPEN),
        Section("Scores by level", pictures=_levels(folder, comparisons)),
        Section("Models by seed", _by_seed(clean, baselines), _seeds_figure(folder, arms, clean)),
        Section("Every two models", _pairs(Evidence(results, values), arms, scores, kinds_text(comparisons))),
    ]


def arm_scores(results: Sequence[Result], names: Mapping[str, str]) -> list[ArmScore]:
    """Return the scores of arms under their shown names, block by block, with the average over several sets.

    A condition that some of the sets lack has no average. An average has the arms that were trained on all sets. names: Shown
    name of each arm.
    """
    rows = [row for row in results if row.arm in names]
    scores: list[ArmScore] = []
    for key in dict.fromkeys(block_key(row) for row in rows):
        in_block = [row for row in rows if block_key(row) == key]
        sets = list(dict.fromkeys(row.data for row in in_block))
        for condition in dict.fromkeys(row.condition for row in in_block):
            under = [row for row in in_block if row.condition == condition]
            found = list(dict.fromkeys(row.data for row in under))
            scores += [_arm_score(data, [row for row in under if row.data == data], rows, names) for data in found]
            out = {row.arm for row in under if row.untrained}
            whole = [row for row in under if row.arm not in out]
            if 1 < len(found) == len(sets) and whole:
                scores.append(_arm_score(AVERAGE, whole, rows, names))
    return [score for score in scores if score.arms]


def _name(row: Result, data: str, rows: Sequence[Result]) -> str:
    """Return the task, the set and the protocol of a score, without the parts that all of `rows` have in common."""
    tasks, sets = {other.task for other in rows}, {other.data for other in rows}
    protocols = {other.protocol for other in rows if (other.task, other.metric) == (row.task, row.metric)}
    parts = [row.task] if len(tasks) > 1 else []
    if len(sets) > 1 or not parts:
        parts.append(data)
    if len(protocols) > 1:
        parts.append(row.protocol)
    return ", ".join(parts)


def _arm_score(data: str, rows: Sequence[Result], others: Sequence[Result], names: Mapping[str, str]) -> ArmScore:
    """Return the score of one set, or of the average over the sets of `rows`.

    others: Rows of all scores.
    """
    sets = {row.data for row in rows}
    by_arm: dict[str, list[Result]] = {}
    by_seed: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.seed is None:
            by_arm.setdefault(names[row.arm], []).append(row)
        else:
            by_seed.setdefault((names[row.arm], row.seed), []).append(row.value)
    return ArmScore(
        row=rows[0],
        data=data,
        name=_name(rows[0], data, others),
        arms={arm: of_arm for arm, of_arm in by_arm.items() if len(of_arm) == len(sets)},
        seeds={key: math.fsum(values) / len(sets) for key, values in by_seed.items() if len(values) == len(sets)},
    )


def _bars(folder: Path, comparisons: Sequence[Comparison]) -> list[Picture]:
    arms = list(dict.fromkeys(arm for c in comparisons for arm in c.cells))
    shown = split_corruptions(comparisons)[0]
    tasks = {c.row.task for c in shown}
    pictures = []
    for task, metric in dict.fromkeys((c.row.task, c.row.metric) for c in shown):
        chosen = [c for c in shown if (c.row.task, c.row.metric) == (task, metric)]
        path = figures.domain_bars(chosen, folder / "figures" / f"{record_stem('scores', task, metric)}.svg", arms)
        chance = " The dashed line is chance." if any(c.row.chance is not None for c in chosen) else ""
        name = f"{task}: {metric}" if len(tasks) > 1 else metric
        pictures.append(Picture(path, name, f"Whiskers: {kinds_text(chosen)}.{chance}"))
    return pictures


def _levels(folder: Path, comparisons: Sequence[Comparison]) -> list[Picture]:
    """Draw scores against the level of corruptions, attacks and certificates. If there is an average over sets, draw it."""
    pictures = []
    for key, group in groupby(comparisons, key=lambda c: c.block):
        in_block = list(group)
        averages = [c for c in in_block if c.data == AVERAGE]
        for data in [AVERAGE] if averages else dict.fromkeys(c.data for c in in_block):
            of_set = [c for c in in_block if c.data == data]
            for kind, level in (("corruption", "severity"), ("attack", "radius in [0, 1]")):
                chosen = _several_levels([c for c in of_set if c.row.kind == kind])
                if not chosen:
                    continue
                clean = [c for c in of_set if c.condition == "clean"] if kind == "attack" else []
                name = record_stem(f"{kind}-levels", data, "-".join(key))
                path = figures.level_curves([*clean, *chosen], folder / "figures" / f"{name}.svg", level)
                row = chosen[0].row
                counts = [cell.n for c in chosen for cell in c.cells.values()]
                where = "average over the sets" if data == AVERAGE else data
                text = f"{row.protocol}, {where}, {scale_text(row.metric, row.scale)}, n = {max(counts):,} {row.unit}."
                title = f"{data}, {kind} by {level}"
                pictures.append(Picture(path, title, f"{text} Whiskers: {kinds_text(chosen)}."))
            certified = [c for c in of_set if c.row.kind == "certified" and c.row.level is not None]
            if certified:
                attacks = [c for c in of_set if c.row.kind == "attack" and c.row.family.endswith(" l2")]
                clean = [c for c in of_set if c.condition == "clean" and c.row.metric == certified[0].row.metric]
                path = folder / "figures" / f"{record_stem('certified', data, '-'.join(key))}.svg"
                drawn = figures.certified_figure([*clean, *certified, *attacks], path)
                text = f"{CERTIFIED_CAPTION} Whiskers: {kinds_text(certified)}."
                pictures.append(Picture(drawn, f"{data}, certified by l2 radius", text))
    return pictures


def _several_levels(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons whose family has two or more levels."""
    levels: dict[str, set[float]] = {}
    for c in comparisons:
        if c.row.level is not None:
            levels.setdefault(c.row.family, set()).add(c.row.level)
    return [c for c in comparisons if len(levels.get(c.row.family, ())) > 1]


def _seeds_figure(folder: Path, arms: Sequence[str], scores: Sequence[ArmScore]) -> list[Picture]:
    """Draw a dot for each training. If there are many scores, draw the first set of each metric."""
    several = [score for score in scores if score.seeds]
    if len(several) > MOST_PANELS:
        first = {block_key(score.row): score for score in reversed(several)}
        several = [score for score in several if first[block_key(score.row)] is score][:MOST_PANELS]
    if not several:
        return []
    panels = [seeds_panel(score) for score in several]
    path = arm_figures.seeds_figure(panels, list(arms), folder / "figures" / "seeds.svg")
    return [Picture(path, "Models by seed", SEEDS_CAPTION)]


def seeds_panel(score: ArmScore) -> SeedsPanel:
    """Return the panel of a score in the figure by seed."""
    factor = 100 if score.row.scale == SHARE else 1
    values = {key: factor * value for key, value in score.seeds.items()}
    return SeedsPanel(score.name, score.metric, f"n = {score.count}", values, score.row.scale)


def _by_seed(scores: Sequence[ArmScore], baselines: Mapping[str, str]) -> list[tuple[Table, str]]:
    """Return a row for each score and arm, with the difference to the baseline seed by seed."""
    several = [score for score in scores if score.seeds]
    seeds = list(dict.fromkeys(seed for score in several for _, seed in score.seeds))
    if len(seeds) < 2:
        return []
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for score in several:
        arms = [arm for arm in score.arms if all((arm, seed) in score.seeds for seed in seeds)]
        means = {arm: math.fsum(score.seeds[arm, seed] for seed in seeds) for arm in arms}
        if not arms:
            continue
        first = (min if score.row.better == LOWER else max)(arms, key=means.__getitem__)
        base = baselines.get(score.row.task, arms[0])
        for arm in arms:
            values = [score.seeds[arm, seed] for seed in seeds]
            difference = "–"
            if arm != base and base in arms:
                steps = [value - score.seeds[base, seed] for value, seed in zip(values, seeds, strict=True)]
                difference = f"{_over_seeds(steps, score.row.scale, sign=True)} to {base}"
            if arm == first and len(arms) > 1:
                best.add((len(rows), 2 + len(seeds)))
            half = mean_interval(values)[1]
            numbers = [number_text(value, score.row.scale, half=half) for value in values]
            rows.append([score.label, arm, *numbers, _over_seeds(values, score.row.scale), difference])
    if not rows:
        return []
    heads = ["Score", "Model", *(f"seed {seed}" for seed in seeds), "mean", "difference"]
    return [(Table(f"By seed, {len(seeds)} seeds", heads, rows, best, folded=len(rows) > 40), SEED_NOTE)]


def _over_seeds(values: Sequence[float], scale: str, sign: bool = False) -> str:
    mean, half = mean_interval(values)
    return interval_text(mean, mean - half, mean + half, scale, sign)


def _pairs(evidence: Evidence, arms: Sequence[str], scores: Sequence[ArmScore], kinds: str) -> list[tuple[Table, str]]:
    """Return a table with a row for each two of three or more arms and condition, the later minus the earlier one."""
    conditions = list(dict.fromkeys(score.row.condition for score in scores))
    columns: dict[tuple[object, ...], dict[str, ArmScore]] = {}
    for score in scores:
        columns.setdefault((*block_key(score.row), score.data), {})[score.row.condition] = score

    def cell(score: ArmScore | None, later: str, earlier: str) -> str:
        if score is None or not {later, earlier} <= set(score.arms):
            return "–"
        found = evidence.difference(score.arms[later], score.arms[earlier])
        return "–" if found is None else bounds_text(found.mean, *found.bounds, score.row.scale, sign=True)

    rows = []
    for earlier, later in itertools.combinations(arms, 2) if len(arms) > 2 else ():
        for condition in conditions:
            texts = [cell(column.get(condition), later, earlier) for column in columns.values()]
            if set(texts) != {"–"}:
                rows.append([f"{later} − {earlier}", *([condition] if len(conditions) > 1 else []), *texts])
    heads = ["Models", *(["Condition"] if len(conditions) > 1 else [])]
    for column in columns.values():
        counts = dict.fromkeys(score.count for score in column.values())
        heads.append(f"{next(iter(column.values())).label}, n = {' / '.join(counts)}")
    table = Table("Paired differences", heads, rows, set(), texts=len(heads) - len(columns), folded=True)
    return [(table, _PAIRS_NOTE.format(kinds=kinds))] if rows else []


def summary_sections(results: Sequence[Result]) -> list[Section]:
    """Return the tables that features of the evaluation declare; corruptions of a set share a row with their extremes."""
    summaries = [FEATURES[name].summary for name in FEATURES]
    return [_summary_section(summary, results) for summary in summaries if summary is not None]


def _summary_section(summary: Summary, results: Sequence[Result]) -> Section:
    groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for row in results:
        if row.metric in summary.metrics and row.seed is None:
            condition = "corruptions" if row.kind == "corruption" else row.condition
            groups.setdefault((row.data, row.arm, condition), {}).setdefault(row.metric, []).append(row)
    if not groups:
        return Section(summary.title)
    first = {row.metric: row for by_metric in groups.values() for (row, *_) in by_metric.values()}
    rows = [
        [
            *key,
            *(_extremes(by_metric.get(metric, [])) for metric in summary.metrics),
            f"{next(iter(by_metric.values()))[0].n:,}",
        ]
        for key, by_metric in groups.items()
    ]
    shares = {metric for metric, row in first.items() if row.scale == SHARE}
    heads = [f"{metric}, %" if metric in shares else metric for metric in summary.metrics]
    kinds = dict.fromkeys(
        interval_kind_text(row.interval, row.units)
        for by_metric in groups.values()
        for found in by_metric.values()
        for row in found
    )
    table = Table(summary.caption, ["Data", "Arm", "Condition", *heads, "n"], rows, set(), texts=3)
    return Section(summary.title, [(table, f"{summary.note} Intervals: {'; '.join(kinds)}.")])


def _extremes(rows: Sequence[Result]) -> str:
    """Return a number with its interval, or the least and the largest of several."""
    if not rows:
        return "–"
    if len(rows) == 1:
        return row_text(rows[0])
    ends = (min(rows, key=lambda row: row.value), max(rows, key=lambda row: row.value))
    return " to ".join(number_text(row.value, row.scale, half=row.half) for row in ends)
