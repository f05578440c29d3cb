"""One report over separate runs and tables of other programs, with paired differences if the examples are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from vismt.base import console
from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.sections import RESOLVED, flat
from vismt.config.yaml_text import read_yaml
from vismt.report import arm_figures
from vismt.report.compare.pairs import GivenScores, PairedDifference, match, paired_differences
from vismt.report.compare.score_tables import (
    NO_COLUMNS,
    Columns,
    TrainingValues,
    columns_of_object,
    is_table,
    read_path,
    read_table,
)
from vismt.report.comparison import ExampleValues, Values, compare_results
from vismt.report.conclusion import conclude
from vismt.report.plotting import figure_formats
from vismt.report.results import FACTS, RESULTS, Result, ValuesByExample, read_results
from vismt.report.score_sections import score_sections
from vismt.report.tables import Picture, Section, Table, scale_text
from vismt.report.trainings import Cost, cost_section, read_costs
from vismt.report.writer import DEFAULT_FORMATS, Heading, result_sections, run_heading, write_report
from vismt.storage.outputs import note_outputs
from vismt.uncertainty.intervals import CLEAN

T = TypeVar("T")
SHOWN_FACTS = ("Command", "Git revision", "Config hash", "Hardware", "Processes of a training", "Seeds")
SETTINGS_NOTE = (
    "Keys of config.resolved.yaml whose values differ; – where a run has no such key. Titles and arms are left out."
)


MOST_FIGURES, MOST_PAIRS = 6, 15  # numbers of figures of pairs, and of pairs in one figure
PAIRS_CAPTION = "Paired differences with 95 % intervals. Where an interval contains 0, no difference is shown."
_PAIRS_NOTE = (
    "± is the 95 % interval. A difference that cannot be seen is one that this comparison finds in fewer than 80 % of cases. "
    "p is by sign flips of the examples or groups for one training of each model, and by the interval for several. Holm's method "
    "corrects p over the pairs of one set and metric."
)


@dataclass(frozen=True)
class Joined:
    """Rows of several runs, each arm under a name of its own, and the values by example of every row."""

    results: list[Result]
    sources: Mapping[str, tuple[ValuesByExample, str]]

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example. The names are equal if two runs have the same example."""
        values, arm = self.sources[result.arm]
        found = values.of(replace(result, arm=arm))
        return None if found is None else self._named(result, found)

    def groups(self, result: Result) -> dict[str, str]:
        """Return the group of each example of a row under the names of `of`. Return {} if its examples are independent."""
        values, arm = self.sources[result.arm]
        return self._named(result, values.groups(replace(result, arm=arm)))

    def _named(self, result: Result, by_example: Mapping[str, T]) -> dict[str, T]:
        values, _ = self.sources[result.arm]
        return {f"{result.examples or values.folder} {name}": value for name, value in by_example.items()}


def join(folders: Sequence[Path], arms: Sequence[str] = ()) -> Joined:
    """Return the rows of several run folders, of all or the named arms. An arm whose name two runs have is named "RUN: ARM".

    Raise UserError for fewer than two folders, a folder twice or without results, and an arm that no run has.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        given = ", ".join(map(str, folders)) or "nothing"
        raise UserError(f"compare: {given}; name two or more run folders, each once.")
    by_run = {folder: read_results(folder / RESULTS) for folder in folders}
    for folder, rows in by_run.items():
        if not folder.exists():
            raise UserError(f"compare: run '{folder}': no such folder.")
        if not rows:
            raise UserError(f"compare: no results in '{folder}'; make them with `vismt evaluate {folder}`.")
    names = [arm for rows in by_run.values() for arm in dict.fromkeys(row.arm for row in rows)]
    require_known("compare: no run has an arm", arms, dict.fromkeys(names))
    runs = dict(zip(folders, input_names(folders), strict=True))
    repeated = {arm for arm, count in Counter(names).items() if count > 1}
    results: list[Result] = []
    sources: dict[str, tuple[ValuesByExample, str]] = {}
    for folder, rows in by_run.items():
        values = ValuesByExample(folder)
        for row in rows:
            if not arms or row.arm in arms:
                label = f"{runs[folder]}: {row.arm}" if row.arm in repeated else row.arm
                sources[label] = (values, row.arm)
                results.append(replace(row, arm=label))
    return Joined(results, sources)


def read_inputs(
    inputs: Mapping[str, object], columns: Columns = NO_COLUMNS, common: bool = False, arms: Sequence[str] = ()
) -> tuple[list[Result], ExampleValues]:
    """Return the rows of run folders, tables and samples of lm-evaluation-harness, and the values by example of each row.

    Args:
        inputs: Paths, lists of mappings and frames of pandas by name.
        columns: Names of the columns of tables.
        common: Whether to keep the examples that all tables have.
        arms: Arms of runs to keep. Empty for all.

    Raises:
        UserError: If `join`, `vismt.report.compare.score_tables.read_path` or `vismt.report.compare.pairs.match` raises it.
    """
    paths = {name: Path(given) for name, given in inputs.items() if isinstance(given, str | Path)}
    runs = [path for path in paths.values() if not is_table(path)]
    if len(runs) == len(inputs):
        joined = join(runs, arms)
        return joined.results, joined
    say = partial(console.stage, "compare")
    trainings = []
    for name, given in inputs.items():
        path = paths.get(name)
        if path is None:
            trainings += read_table(columns_of_object(given, name), name, name, columns, say)
        elif path in runs:
            trainings += _trainings_of_run(path, arms)
        else:
            trainings += read_path(path, name, columns, say)
    require_known(
        "compare: no input has a metric", columns.better, dict.fromkeys(of for one in trainings for of in one.values)
    )
    for one in trainings:
        one.better |= columns.better
    if len({one.model for one in trainings}) < 2:
        raise UserError(f"compare: one model, '{trainings[0].model}'; give two or more inputs.")
    scores = GivenScores(match(trainings, common, say))
    return scores.results, scores


def _trainings_of_run(folder: Path, arms: Sequence[str]) -> list[TrainingValues]:
    """Return the clean values by example of the arms of a run. Several trainings of an arm are averaged."""
    rows = [row for row in read_results(folder / RESULTS) if row.seed is None and row.condition == CLEAN.label]
    if not rows:
        raise UserError(f"compare: no results in '{folder}'; make them with `vismt evaluate {folder}`.")
    values, found = ValuesByExample(folder), []
    for row in rows:
        by_example = values.of(row)
        if by_example and (not arms or row.arm in arms):
            groups = values.groups(row)
            listed = [groups[name] for name in by_example] if groups else []
            of_metric = {row.metric: list(by_example.values())}
            better = {row.metric: row.better}
            found.append(
                TrainingValues(
                    str(folder), row.arm, row.data, "", list(by_example), of_metric, groups=listed, better=better
                )
            )
    return found


def input_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each input: the name of its folder or file, with the folder above if two have one name."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    return [str(path.parent / name) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def compare_inputs(
    inputs: Sequence[Path],
    target: Path,
    arms: Sequence[str] = (),
    formats: Sequence[str] = DEFAULT_FORMATS,
    columns: Columns = NO_COLUMNS,
    common: bool = False,
    baseline: str | None = None,
) -> tuple[list[Path], list[PairedDifference]]:
    """Write one report over run folders and tables of other programs into the folder `target`.

    Args:
        inputs: Run folders, tables, folders of tables, and folders of lm-evaluation-harness.
        target: Folder of the report.
        arms: Arms of runs to keep. Empty for all.
        formats: Formats, as for `vismt.report.writer.write_report`.
        columns: Names of the columns of tables.
        common: Whether to keep the examples that all tables have.
        baseline: Arm that all others are compared with. None for all pairs.

    Returns:
        The files of the report, and the difference of each pair. It raises the UserErrors of `read_inputs`.
    """
    named = dict(zip(input_names(inputs), inputs, strict=True))
    results, values = read_inputs(named, columns, common, arms)
    arms_found = list(dict.fromkeys(row.arm for row in results))
    require_known("compare: no model", [baseline] if baseline else [], arms_found)
    comparisons = compare_results(results, values, {row.task: baseline for row in results} if baseline else None)
    pairs = paired_differences(comparisons, baseline)
    headings = {name: run_heading(path) for name, path in named.items() if (path / FACTS).exists()}
    facts = []
    for name, path in named.items():
        heading = headings.get(name)
        kept = [f"{fact}: {value}" for fact, value in heading.facts if fact in SHOWN_FACTS] if heading else [str(path)]
        facts.append((name, "; ".join([heading.title, *kept] if heading else kept)))
    sources = {name: headings[name].source if name in headings else str(path) for name, path in named.items()}
    title = Heading(
        f"Comparison of {', '.join(named)}", facts, "; ".join(f"{name}: {of}" for name, of in sources.items())
    )
    costs: dict[str, Cost] = {}
    for label, (of_run, arm) in (values.sources if isinstance(values, Joined) else {}).items():
        if cost := read_costs(of_run.folder, [arm]).get(arm):
            costs[label] = cost
    conclusion = conclude(comparisons, {label: cost.trained for label, cost in costs.items()})
    note_outputs("compare", target)
    with figure_formats(formats):
        sections = [
            cost_section(target, comparisons, costs),
            _pairs_section(target, pairs),
            *result_sections(comparisons),
            Section("Settings", _settings({name: path / RESOLVED for name, path in named.items()})),
            *score_sections(target, results, comparisons, values, arms_found),
        ]
    console.stage("answer", conclusion.text)
    return write_report(target, title, results, comparisons, conclusion, sections, formats), pairs


def _pairs_section(folder: Path, pairs: Sequence[PairedDifference]) -> Section:
    """Return the table of all pairs, a sentence for each, and a figure for each metric and set of up to MOST_FIGURES."""
    rows = [[pair.set, pair.metric, str(pair), f"{pair.p:.2g}", f"{pair.p_holm:.2g}"] for pair in pairs]
    table = Table("Pairs", ["Set", "Metric", "Difference", "p", "p, Holm"], rows, set(), texts=3)
    groups: dict[tuple[str, str], dict[str, PairedDifference]] = {}
    for pair in pairs:
        groups.setdefault((pair.metric, pair.set), {})[f"{pair.b} − {pair.a}"] = pair
    pictures = []
    for number, ((metric, data), group) in enumerate(list(groups.items())[:MOST_FIGURES]):
        first = next(iter(group.values()))
        ends = {name: (pair.difference, pair.low, pair.high) for name, pair in list(group.items())[:MOST_PAIRS]}
        title = f"{scale_text(metric, first.scale, first.better)}, {data}"
        path = arm_figures.pairs_figure(ends, first.scale, title, folder / "figures" / f"pairs-{number}.svg")
        pictures.append(Picture(path, f"Differences in {metric}, {data}", PAIRS_CAPTION))
    return Section("Pairs", [(table, _PAIRS_NOTE)] if rows else [], pictures)


def _settings(configs: Mapping[str, Path]) -> list[tuple[Table, str]]:
    """Return the keys whose values differ between the configurations of runs."""
    by_run = {name: flat(read_yaml(path, f"run '{name}'")) for name, path in configs.items() if path.exists()}
    keys = dict.fromkeys(key for values in by_run.values() for key in values)
    rows = []
    for key in keys:
        texts = [shown_value(values[key]) if key in values else "–" for values in by_run.values()]
        if len(set(texts)) > 1 and key.partition(".")[0] not in ("title", "arms"):
            rows.append([key, *texts])
    table = Table("Settings that differ", ["Key", *by_run], rows, set(), texts=1 + len(by_run))
    return [(table, SETTINGS_NOTE)] if rows else []
