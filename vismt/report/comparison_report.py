"""One report over separate runs: their arms side by side, with paired differences where the examples are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from vismt.base import console
from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.sections import RESOLVED, flat
from vismt.config.yaml_text import read_yaml
from vismt.report.comparison import Values, compare
from vismt.report.conclusion import conclude
from vismt.report.plotting import figure_formats
from vismt.report.results import RESULTS, Result, ValuesByExample, read_results
from vismt.report.score_sections import score_sections
from vismt.report.tables import Section, Table
from vismt.report.trainings import Cost, cost_section, read_costs
from vismt.report.writer import DEFAULT_FORMATS, Heading, result_sections, run_heading, write_report
from vismt.storage.outputs import note

T = TypeVar("T")
SHOWN_FACTS = ("Command", "Git revision", "Config hash", "Hardware", "Processes of a training", "Seeds")
SETTINGS_NOTE = (
    "Keys of config.resolved.yaml whose values differ; – where a run has no such key. Titles and arms are left out."
)


@dataclass(frozen=True)
class Joined:
    """Rows of several runs, each arm under a name of its own, and the values by example of every row."""

    results: list[Result]
    sources: Mapping[str, tuple[ValuesByExample, str]]

    def of(self, result: Result) -> Values | None:
        """Return a row's values by example, under names that are equal where two runs have the same example."""
        values, arm = self.sources[result.arm]
        found = values.of(replace(result, arm=arm))
        return None if found is None else self._named(result, found)

    def groups(self, result: Result) -> dict[str, str]:
        """Return the group of each example of a row under the names of `of`, {} if its examples are independent."""
        values, arm = self.sources[result.arm]
        return self._named(result, values.groups(replace(result, arm=arm)))

    def _named(self, result: Result, by_example: Mapping[str, T]) -> dict[str, T]:
        values, _ = self.sources[result.arm]
        return {f"{result.examples or values.folder} {name}": value for name, value in by_example.items()}


def join(folders: Sequence[Path], arms: Sequence[str] = ()) -> Joined:
    """Return the rows of several run folders, of all or the named arms. An arm whose name two runs have is named "RUN: ARM".

    Raises UserError for fewer than two folders, a folder twice or without results, and an arm that no run has.
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
    runs = _run_names(folders)
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


def _run_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the folders' names, with those above where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return {folder: str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)}


def compare_runs(
    folders: Sequence[Path], target: Path, arms: Sequence[str] = (), formats: Sequence[str] = DEFAULT_FORMATS
) -> list[Path]:
    """Write one report over separate runs into the folder `target`; return its files.

    arms and UserErrors: as of `join`. formats: as of `vismt.report.writer.write_report`.
    """
    joined = join(folders, arms)
    comparisons = compare(joined.results, joined)
    names = _run_names(folders)
    headings = {names[folder]: run_heading(folder) for folder in folders}
    facts = []
    for name, heading in headings.items():
        kept = [f"{fact}: {value}" for fact, value in heading.facts if fact in SHOWN_FACTS]
        facts.append((name, "; ".join([heading.title, *kept])))
    source = "; ".join(f"{name}: {heading.source}" for name, heading in headings.items())
    title = Heading(f"Comparison of {', '.join(headings)}", facts, source)
    costs: dict[str, Cost] = {}
    for label, (values, arm) in joined.sources.items():
        if cost := read_costs(values.folder, [arm]).get(arm):
            costs[label] = cost
    conclusion = conclude(comparisons, {label: cost.trained for label, cost in costs.items()})
    note("compare", target)
    with figure_formats(formats):
        sections = [
            cost_section(target, comparisons, costs),
            *result_sections(comparisons),
            Section("Settings", _settings({names[folder]: folder / RESOLVED for folder in folders})),
            *score_sections(target, joined.results, comparisons, joined, list(joined.sources)),
        ]
    console.stage("answer", conclusion.text)
    return write_report(target, title, joined.results, comparisons, conclusion, sections, formats)


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
