"""The numbers of a study as data: docs/results/rows/STUDY.jsonl.

The first line is about the run, the second has what all numbers share, and then there is a line for each column:

    {"column": "value", "values": [0.61, 0.58]}                     in the order of the numbers
    {"column": "arm", "texts": ["lora", "head"], "values": [0, 1]}  values: places in `texts`

The numbers are the rows of results.jsonl and what follows from the values by example, which are not kept: averages over sets,
and differences of two arms on the same examples. Tables of the documentation are made from these files, and scripts/check.py
compares a run with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from statistics import fmean

from vismt.base.errors import UserError, near
from vismt.config.sections import RESOLVED, read_config_file
from vismt.config.typed import build
from vismt.engine.study import read_choice
from vismt.report.comparison import AVERAGE, CONSTANT, Evidence, block_key
from vismt.report.results import FACTS, KNOWN, RESULTS, Result, ValuesByExample, fault_of, read_results
from vismt.report.trainings import read_costs
from vismt.report.weight_changes import CHANGE, Lines, by_depth, measures, of_blocks, read_changes
from vismt.storage.files import JsonObject, read_sealed
from vismt.storage.lines import read_lines, write_lines
from vismt.storage.locks import is_locked
from vismt.storage.paths import shipped
from vismt.uncertainty.intervals import FEWEST_DOMAINS, NUMBER, Estimate, over_domains

ROWS = "docs/results/rows"
SELECTED = ("task", "data", "protocol", "condition", "metric", "arm", "minus")  # fields that name one number
_DIGITS = 7  # number of significant digits in a file
_FEW_DIGITS = {"variance": 4, "freedom": 4, "bias": 4}  # of numbers that widen intervals and stand on no page
MATRICES = "matrices"  # data of rows about all changed weights


@dataclass(frozen=True)
class StudyRow(Result):
    """One number of a study.

    Args:
        data: Name of the set, "average" for the mean over sets.
        minus: Arm whose number is subtracted, "" for none.
        by_seed: Number of each training, in the order of the study's seeds, None for a seed without it. () if the number does
            not come from several trainings, and for a difference.
    """

    minus: str = ""
    by_seed: tuple[float | None, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Key of this number among all numbers of a study."""
        return (*super().key, self.minus)


@dataclass(frozen=True)
class About:
    """The facts about a whole study.

    Args:
        title: Title of the configuration.
        command: Command that made the run, without the folder of its output and the number of workers.
        config_hash: Hash of the configuration.
        settings: Whole configuration, defaults included.
        differences: Pairs of arms. The number of the second is subtracted from the number of the first.
        seeds: Seeds of the trainings, [] if nothing is trained.
        evaluation_seed: Seed of the episodes, None if there are none.
        git_revision: Revision of the checkout that ran.
        hardware: Processor or GPU, threads, processes.
        versions: Versions of Python and the packages that results depend on.
        started: First start, ISO 8601 in UTC.
        finished: End of the last evaluation.
        wall_time_s: Seconds, summed over the sessions of the run.
        cpu_time_s: CPU seconds of all threads. None if they were not recorded.
        costs: Rate lr and number of trained parameters of the first training of each arm. Some files lack lr, and have seconds
            of a step on the busy machine that ran.
        validation: Score of the first seed on validation examples by arm and tried rate. None if the training diverged.
    """

    title: str
    command: str
    config_hash: str
    settings: JsonObject
    differences: list[tuple[str, str]]
    git_revision: str
    hardware: str
    versions: dict[str, str]
    started: str
    finished: str
    wall_time_s: float
    cpu_time_s: float | None = None
    seeds: list[int] = field(default_factory=list)
    evaluation_seed: int | None = None
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    validation: dict[str, dict[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRows:
    """A study: `about` the run, and its numbers."""

    about: About
    rows: list[StudyRow]

    def find(self, wanted: Mapping[str, object], where: str) -> StudyRow:
        """Return the one row that has the values `wanted`, and minus "" unless it is named.

        Raise UserError, with `where`, for no row or several rows.
        """
        values = {"minus": "", **wanted}
        chosen, wanted_values = attrgetter(*values), tuple(values.values())
        rows = [row for row in self.rows if chosen(row) == wanted_values]
        if len(rows) != 1:
            differ = [item.name for item in fields(StudyRow) if len({getattr(row, item.name) for row in rows}) > 1]
            named = [name for name in differ if name in SELECTED]
            more = f"; name {' or '.join(named)}" if named else f"; {len(self.rows)} rows of other numbers"
            raise UserError(f"{where}: {len(rows)} rows have {values}{more}.")
        return rows[0]

    def over_domains(self, row: StudyRow, where: str) -> StudyRow:
        """Return the row of an average with the interval over its sets as a sample of domains.

        Raise UserError, with `where`, for a row that is not an average over FEWEST_DOMAINS sets or more.
        """
        sets = self._of_sets(row, row.arm)
        others = self._of_sets(row, row.minus) if row.minus else dict.fromkeys(sets, 0.0)
        sample = over_domains([sets[name] - others[name] for name in sets]) if sets.keys() == others.keys() else None
        if row.data != AVERAGE or sample is None:
            raise UserError(f"{where}: domains need data average and {FEWEST_DOMAINS} sets or more, not {len(sets)}.")
        low, high = sample.bounds
        return replace(row, low=low, high=high, interval=sample.covers)

    def _of_sets(self, row: StudyRow, arm: str) -> dict[str, float]:
        """Return the number of an arm on every set, in the condition of a row."""
        alike = [one for one in self.rows if (one.condition, one.arm, one.minus) == (row.condition, arm, "")]
        return {one.data: one.value for one in alike if one.data != AVERAGE and block_key(one) == block_key(row)}

    def trainings(self, row: StudyRow) -> dict[int, float]:
        """Return a number by training seed. Return {} if the arm, or each of two arms, has one training."""
        first = self._trainings(row, row.arm)
        if not row.minus:
            return first
        second = self._trainings(row, row.minus)
        # The value of a reference, which has no trainings, is the same for every seed.
        if first and not second:
            second = dict.fromkeys(first, fmean(first.values()) - row.value)
        elif second and not first:
            first = dict.fromkeys(second, fmean(second.values()) + row.value)
        return {seed: first[seed] - second[seed] for seed in first if seed in second}

    def _trainings(self, row: StudyRow, arm: str) -> dict[int, float]:
        by_seed: dict[int, list[float]] = {}
        wanted, kind = (row.condition, arm, ""), block_key(row)
        for other in self.rows:
            alike = (other.condition, other.arm, other.minus) == wanted and block_key(other) == kind
            if alike and row.data in (AVERAGE, other.data):
                for seed, value in zip(self.about.seeds, other.by_seed):
                    if value is not None:
                        by_seed.setdefault(seed, []).append(value)
        sets = max(map(len, by_seed.values()), default=0)
        return {seed: sum(values) / sets for seed, values in by_seed.items() if len(values) == sets}


def study_of(folder: Path, differences: Sequence[tuple[str, str]] = ()) -> StudyRows:
    """Return the numbers of a finished run.

    differences: Pairs of arms that are compared, besides each arm and the first arm. Raise UserError for a run that is not
    finished, another folder, and a pair with an arm that the run does not have.
    """
    facts = read_sealed(folder / FACTS, f"run '{folder}'") if (folder / FACTS).exists() else {}
    if is_locked(folder) or not facts.get("finished"):
        seen = "a process works in it" if is_locked(folder) else "its evaluation has not ended"
        raise UserError(f"run '{folder}': {seen}; rows are taken from a finished run, `vismt run` continues it.")
    results = [row for row in read_results(folder / RESULTS, facts.get("config_hash")) if not row.further]
    arms = list(dict.fromkeys(row.arm for row in sorted(results, key=lambda row: row.arm == CONSTANT)))
    pairs = list(dict.fromkeys([*((arm, arms[0]) for arm in arms[1:]), *differences]))
    for arm in (arm for pair in pairs for arm in pair):
        if arm not in arms:
            raise UserError(f"run '{folder}': no arm '{arm}', which a difference names.{near(arm, arms)}")
    kept = {item.name: facts[item.name] for item in fields(About) if item.name in facts}
    kept["command"] = re.sub(r" --(out|workers)[ =]\S+", "", str(facts.get("command", "")))
    kept |= {"settings": read_config_file(folder / RESOLVED), "differences": [list(pair) for pair in pairs]}
    costs = read_costs(folder, arms)
    kept["costs"] = {arm: {"lr": cost.lr, "trained": float(cost.trained)} for arm, cost in costs.items()}
    kept["validation"] = {arm: read_choice(folder, arm).validation for arm in costs}
    about = build(About, kept, f"run '{folder}'")
    values: dict[tuple[object, ...], dict[int, float]] = {}
    for row in results:
        if row.seed is not None:
            values.setdefault((*replace(row, seed=None).key, ""), {})[row.seed] = row.value
    derived = [
        replace(row, by_seed=_in_order(values[row.key], about.seeds)) if row.key in values else row
        for row in _derived(results, pairs, Evidence(results, ValuesByExample(folder)))
    ]
    return StudyRows(about, [*derived, *_changes(folder, arms, pairs, about)])


def _in_order(values: Mapping[int, float], seeds: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(values.get(seed) for seed in seeds)


def _changes(folder: Path, arms: Sequence[str], pairs: Sequence[tuple[str, str]], about: About) -> Iterator[StudyRow]:
    """Yield how much each arm changed the weights, also by block, and the differences over all blocks.

    Arms with several trainings are averaged over the seeds.
    """
    changes = read_changes(folder, arms)
    numbers = {arm: {seed: _by_data(lines) for seed, lines in of.items()} for arm, of in changes.items()}
    for first, second in [*((arm, "") for arm in numbers), *(pair for pair in pairs if numbers.keys() >= {*pair})]:
        lines = next(iter(changes[first].values()))
        counts = {f"block {number}": len(of) for number, of in of_blocks(lines).items()}
        for key in next(iter(numbers[first].values())):
            data, metric = key
            if second and data != MATRICES:
                continue
            values = {seed: of[key] for seed, of in numbers[first].items() if key in of}
            if second:
                others = {seed: of[key] for seed, of in numbers[second].items() if key in of}
                values = {seed: value - others[seed] for seed, value in values.items() if seed in others}
            if len(values) < 2:
                continue
            found = Estimate(fmean(values.values()), (), "seeds").with_seeds(list(values.values()))
            yield StudyRow(
                task="update",
                data=data,
                split="test",
                metric=metric,
                unit="matrices",
                scale=NUMBER,
                better="higher",
                chance=None,
                protocol="trained weights",
                condition="clean",
                arm=first,
                seed=None,
                value=found.mean,
                low=found.bounds[0],
                high=found.bounds[1],
                n=counts.get(data, len(lines)),
                config_hash=about.config_hash,
                interval="seeds",
                minus=second,
                by_seed=() if second else _in_order(values, about.seeds),
            )


def _by_data(lines: Lines) -> dict[tuple[str, str], float]:
    """Return the numbers of one training by what they cover and metric."""
    blocks = {(f"block {number}", CHANGE): value for number, value in by_depth(lines).items()}
    return {(MATRICES, metric): value for metric, value in measures(lines).items()} | blocks


def _derived(results: Sequence[Result], pairs: Sequence[tuple[str, str]], evidence: Evidence) -> list[StudyRow]:
    """Return the arms' numbers, their averages over sets and their differences."""
    by_condition: dict[tuple[str, ...], dict[str, dict[str, Result]]] = {}
    for row in results:
        if row.seed is None:
            by_condition.setdefault((*block_key(row), row.condition), {}).setdefault(row.arm, {})[row.data] = row
    derived = []
    for by_arm in by_condition.values():
        sets = list(dict.fromkeys(data for rows in by_arm.values() for data in rows))
        several = len(sets) > 1 and AVERAGE not in sets
        for data, names in ((AVERAGE, sets), *((data, [data]) for data in sets))[not several :]:
            complete = {arm: [rows[name] for name in names] for arm, rows in by_arm.items() if rows.keys() >= {*names}}
            for rows in complete.values():
                low, high, _ = evidence.interval(rows)
                derived.append(_row(evidence.estimate(rows), (low, high), rows, data=data))
            for first, second in (pair for pair in pairs if complete.keys() >= {*pair}):
                found = evidence.difference(complete[first], complete[second])
                if found is not None:
                    more = {"data": data, "minus": second, "chance": None}
                    derived.append(_row(found, found.bounds, complete[first], complete[second], **more))
    return derived


def _row(found: Estimate, bounds: tuple[float, float], *arms: Sequence[Result], **changes: object) -> StudyRow:
    """Return the row of an estimate from the rows of one arm, or of two."""
    error, freedom = found.sources[0]
    grouped_by = list(dict.fromkeys(row.grouped_by for row in arms[0]))
    changes |= {
        "parts": sum(row.parts or row.n for row in arms[0]) if any(grouped_by) else 0,
        "grouped_by": grouped_by[0] if len(grouped_by) == 1 else "groups",
    }
    changes |= {"value": found.mean, "low": bounds[0], "high": bounds[1], "interval": found.covers}
    changes |= {
        "n": sum(row.n for row in arms[0]),
        "variance": error,
        "freedom": min(freedom, KNOWN),
        "bias": found.bias,
    }
    return StudyRow(**{**asdict(arms[0][0]), **changes})


def write_study(path: Path, study: StudyRows) -> None:
    """Write a file of rows, atomically: the columns in which a row differs from the default. Floats are rounded."""
    shared, lines = {}, []
    for item in fields(StudyRow):
        values = [_short(getattr(row, item.name), _FEW_DIGITS.get(item.name, _DIGITS)) for row in study.rows]
        distinct = list(dict.fromkeys(values))
        if distinct == [item.default]:
            continue
        if len(distinct) == 1:
            shared[item.name] = distinct[0]
        elif any(isinstance(value, str) for value in distinct):
            places = {value: place for place, value in enumerate(distinct)}
            lines.append({"column": item.name, "texts": distinct, "values": [places[value] for value in values]})
        else:
            lines.append({"column": item.name, "values": values})
    write_lines(path, [asdict(study.about), {"rows": len(study.rows), "shared": shared}, *lines])


def _short(value: object, digits: int) -> object:
    if isinstance(value, tuple):
        return tuple(_short(item, digits) for item in value)
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def read_study(path: Path) -> StudyRows:
    """Return the study in a file of rows. Raise UserError for a missing, changed or cut file, and a number that comes twice."""
    source = f"rows '{path}'"
    if not path.is_file():
        raise UserError(f"{source}: no such file.{near(path.stem, studies())}")
    about, *table = read_lines(path, whole=True) or [{}]
    try:
        numbers = list(_numbers(*table))
    except (LookupError, TypeError) as error:
        raise UserError(f"{source}: has no columns of numbers; make the file again.") from error
    study = StudyRows(build(About, about, source), [build(StudyRow, number, source) for number in numbers])
    seen: set[tuple[object, ...]] = set()
    for number, row in enumerate(study.rows, 1):
        # A difference of shares can be negative.
        reason = fault_of(replace(row, scale=NUMBER) if row.minus else row, study.about.config_hash)
        if reason or row.key in seen:
            raise UserError(f"{source} number {number}: {reason or 'repeats an earlier number'}; make the file again.")
        seen.add(row.key)
    return study


def _numbers(header: JsonObject, *lines: JsonObject) -> Iterator[JsonObject]:
    """Yield the numbers of a file of rows as mappings of field to value."""
    columns = {}
    for line in lines:
        texts = line.get("texts")
        columns[line["column"]] = line["values"] if texts is None else [texts[place] for place in line["values"]]
    for number in range(header["rows"]):
        yield header["shared"] | {name: values[number] for name, values in columns.items()}


def studies() -> dict[str, Path]:
    """Return the files of rows by the name of their study."""
    return {path.stem: path for path in sorted(shipped(ROWS).glob("*.jsonl"))}
