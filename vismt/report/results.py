"""results.jsonl: one typed row for every number of a run, written and read as the same dataclass.

A row without a seed is an arm's number: every example is averaged over the arm's trainings. Rows with a seed belong to single
trainings. They are written if an arm has several trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.engine.log import record_stem
from vismt.storage.lines import read_lines, write_lines
from vismt.uncertainty.intervals import SHARE, Better, Covers, Measure, Scale, Score

FACTS = "run.json"
RESULTS, RECORDS = "results.jsonl", "records"
ROUNDING = 1e-9  # relative error of a mean of pseudo-values, which is the score
EXAMPLE, GROUP = "example", "group"  # keys for the name of an example and of its group in a line of records
KNOWN = 1e9  # degrees of freedom of a known variance (JSON has no infinity)


@dataclass(frozen=True)
class Result:
    """One number with its 95 % interval.

    Args:
        task: Task, "semseg" or "few-shot".
        data: Name of the set.
        split: Split of the set, "test" or "validation".
        metric: Name of the score with its unit.
        unit: What n counts, "images".
        scale: "share" (in [0, 1], shown in per cent) or "number".
        better: "higher" or "lower".
        chance: Score of a guess. None if there is none.
        protocol: How the task was posed. Numbers are compared within one protocol.
        condition: Text of what was done to the examples, "clean" for nothing.
        arm: Evaluated model.
        seed: Seed of the training. None for the mean over the arm's trainings.
        value: Score.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of examples.
        config_hash: Hash of the run's configuration.
        kind: Kind of the condition: "clean", "attack", "corruption" or "variant".
        family: What conditions of different levels have in common, "gaussian_noise".
        level: Radius of an attack or severity of a corruption. None without a level.
        examples: What tells the examples from the examples of another run, beside their names, such as a digest of how episodes
            were drawn or of the files. "" or None if it is not known.
        interval: What the interval covers (`vismt.uncertainty.intervals.interval_kind_text`), "images+seeds".
        parts: Number of groups of examples that depend on each other (`vismt.uncertainty.intervals.estimate`). 0 if the
            examples are independent.
        grouped_by: Name of the groups, in the plural, "signs".
        bias: Largest and smallest bias of the value that the examples allow (`vismt.uncertainty.intervals.Estimate`).
        variance: Variance of the value over the examples alone, without the training seeds.
        freedom: Degrees of freedom of the variance, at most KNOWN.
        further: Whether the number is reported beside the score of its task (`vismt.uncertainty.intervals.Measure`).
        untrained: Whether the arm was trained, but on other tasks than this one.
    """

    task: str
    data: str
    split: str
    metric: str
    unit: str
    scale: Scale
    better: Better
    chance: float | None
    protocol: str
    condition: str
    arm: str
    seed: int | None
    value: float
    low: float
    high: float
    n: int
    config_hash: str
    kind: str = "clean"
    family: str = "clean"
    level: float | None = None
    examples: str | None = None
    interval: Covers = "examples"
    parts: int = 0
    grouped_by: str = ""
    bias: tuple[float, float] = (0.0, 0.0)
    variance: float = 0.0
    freedom: float = 0.0
    further: bool = False
    untrained: bool = False

    @property
    def units(self) -> str:
        """Independent units of the examples, "379 signs". "" if the examples are independent."""
        return f"{self.parts:,} {self.grouped_by}" if self.grouped_by else ""

    @property
    def half(self) -> float:
        """Half the width of the interval. If the interval is not symmetric, it is the longer half."""
        return max(self.value - self.low, self.high - self.value)

    @property
    def key(self) -> tuple[object, ...]:
        """Key of this number among all numbers of a run."""
        return (self.task, self.data, self.protocol, self.condition, self.metric, self.arm, self.seed)

    @property
    def evaluation(self) -> tuple[str, str, str, str]:
        """What the rows of one evaluation of a model have in common."""
        return (self.data, self.protocol, self.condition, self.arm)

    @property
    def stem(self) -> str:
        """Name, without its ending, of the file with the values by example of this arm and metric."""
        return record_stem("-".join((self.task, self.data)), self.protocol, f"{self.arm}-{self.metric}")


def result_of(
    score: Score, arm: str, seed: int | None, split: str, config_hash: str, untrained: bool = False
) -> Result:
    """Return the row of a score."""
    measure, condition = score.measure, score.condition
    low, high = measure.interval()
    found = measure.estimate()
    variance, freedom = found.sources[0]
    return Result(
        task=score.task,
        data=score.data,
        split=split,
        metric=measure.metric,
        unit=score.unit,
        scale=measure.scale,
        better=measure.better,
        chance=measure.chance,
        protocol=score.protocol,
        condition=condition.label,
        arm=arm,
        seed=seed,
        value=measure.score,
        low=low,
        high=high,
        n=len(measure.values),
        config_hash=config_hash,
        kind=condition.kind,
        family=condition.family,
        level=condition.level,
        examples=score.examples,
        interval=measure.covers,
        parts=measure.units if measure.groups else 0,
        grouped_by=measure.grouped_by if measure.groups else "",
        bias=found.bias,
        variance=variance,
        freedom=min(freedom, KNOWN),
        further=measure.further,
        untrained=untrained,
    )


def write_values(folder: Path, rows: Sequence[tuple[Result, Measure]]) -> None:
    """Add the values by example of rows to records/ of a run folder, each as a column named by the row's condition.

    A line has the example's group if the examples are not independent. Columns of other conditions stay if the examples are the
    same as before. A measure that is not paired has no column. An example that a condition does not have (an image of one of
    several outside sets) has no value there.
    """
    columns: dict[str, dict[str, Mapping[str, float]]] = {}
    groups: dict[str, dict[str, str]] = {}
    for result, measure in rows:
        if measure.paired:
            columns.setdefault(result.stem, {})[result.condition] = measure.values
            groups.setdefault(result.stem, {}).update(measure.groups)
    for stem, by_condition in columns.items():
        path = folder / RECORDS / f"{stem}.jsonl"
        names = list(dict.fromkeys(name for values in by_condition.values() for name in values))
        known = {line[EXAMPLE]: line for line in read_lines(path, {EXAMPLE: str | int}, whole=True)}
        if list(known) != names:
            known = {}
        lines = []
        for name in names:
            fresh = {label: values[name] for label, values in by_condition.items() if name in values}
            group = {GROUP: groups[stem][name]} if name in groups[stem] else {}
            lines.append({EXAMPLE: name, **known.get(name, {}), **group, **fresh})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, lines)


class ValuesByExample:
    """Values by example as `write_values` wrote them. Every file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = cache(
            lambda stem: read_lines(folder / RECORDS / f"{stem}.jsonl", {EXAMPLE: str | int}, whole=True)
        )

    def of(self, result: Result) -> dict[str, float] | None:
        """Return a row's values by example. Return None unless the records reproduce its value and n."""
        lines = self._lines(result.stem)
        values = {line[EXAMPLE]: line[result.condition] for line in lines if result.condition in line}
        if len(values) != result.n or not all(isinstance(value, int | float) for value in values.values()):
            return None
        same = abs(math.fsum(values.values()) / result.n - result.value) <= 1e-6 * max(1.0, abs(result.value))
        return values if same else None

    def groups(self, result: Result) -> dict[str, str]:
        """Return the group of each example of a row. Return {} if its examples are independent."""
        lines = self._lines(result.stem)
        return {line[EXAMPLE]: line[GROUP] for line in lines if GROUP in line and result.condition in line}


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write results.jsonl. Rows of other conditions that the file already has (an earlier attack) stay."""
    path = folder / RESULTS
    fresh = {result.evaluation for result in results}
    kept = [row for row in read_results(path) if row.evaluation not in fresh]
    write_lines(path, [asdict(row) for row in (*kept, *results)])


def read_results(path: Path, config_hash: str | None = None) -> list[Result]:
    """Return the rows of a results file. Return [] if the file is missing.

    Raise UserError for a row that is not a complete number, a row that comes twice and, with `config_hash`, a row of another
    run.
    """
    results: dict[tuple[object, ...], Result] = {}
    for number, line in enumerate(read_lines(path, whole=True), 1):
        name = " ".join(str(line[key]) for key in ("data", "condition", "arm") if key in line)
        source = f"'{path}' row {number} {name}"
        try:
            result = build(Result, line, source)
            fault = "repeats an earlier row" if result.key in results else fault_of(result, config_hash)
        except UserError as error:
            fault = str(error).removeprefix(f"{source}: ").rstrip(".")
        if fault is not None:
            raise UserError(
                f"{source}: {fault}; a number needs its n, interval and config hash. "
                f"Delete the file, and `vismt evaluate {path.parent}` writes it again."
            )
        results[result.key] = result
    return list(results.values())


def fault_of(result: Result, config_hash: str | None) -> str | None:
    """Return which values of a row do not fit together or belong to another run. Return None for a sound row."""
    numbers = (result.value, result.low, result.high, result.chance, result.level)
    if not all(math.isfinite(number) for number in numbers if number is not None):
        return f"{result.value} in [{result.low}, {result.high}] is not finite"
    if result.scale == SHARE and not -ROUNDING <= result.value <= 1 + ROUNDING:
        return f"{result.value} is not a share, in [0, 1]"
    if result.n < 1 or result.low > result.high:
        return f"n = {result.n}, [{result.low}, {result.high}] around {result.value} are not a count and an interval"
    if config_hash is not None and result.config_hash != config_hash:
        return f"config hash '{result.config_hash}' is not this run's {config_hash}"
    return None
