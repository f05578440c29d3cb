"""Write the tables of README.md, docs/ and the headers of configurations from the rows in docs/results/rows.

    python -m scripts.tables                    write the tables
    python -m scripts.tables --check            exit code 1 with page and line where a table differs from its rows
    python -m scripts.tables add RUN STUDY      take the rows of a finished run folder

A table stands between `<!-- rows: NAME -->` and `<!-- end -->`; docs/results/rows/tables.yaml has what it shows:

    NAME:
      heads: [Arm]                   # of the columns of labels; a label has as many parts, separated by " | "
      where: {study: STUDY, metric: accuracy, condition: clean}
      columns: {digits: {data: digits}, mean: {data: average}, by seed: {data: average, show: seeds}}
      rows: {LoRA: {arm: lora}, LoRA − head: {arm: lora, minus: head}}

The table `claims` is that of docs/claims.md, from claims.yaml beside it (scripts/claims.py).

A cell is the one row of its study that has all values of `where`, of its column and of its row, where minus is ""
unless it is named. A row can have values for one column alone, under its name. Further keys: `show` (interval, value,
seeds, count, domains: the average with its interval over new domains, or both: the number with both of these intervals) and
`label`, a text before the number. ‡ marks a number whose interval covers new episodes of the same images alone, or has no
kind, beside others that cover new images.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any

from scripts.claim_rules import of_study, read_claims
from scripts.claims import sections
from scripts.committed import both_intervals, interval_text, renew, study
from scripts.study_rows import MATRICES, ROWS, SELECTED, StudyRow, StudyRows, study_of, write_study
from vismt.base import console
from vismt.base.errors import UserError, require_known
from vismt.config.yaml_text import read_yaml
from vismt.report.comparison import AVERAGE
from vismt.report.tables import number_text
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import interval_kind_text

SPECS = CHECKOUT / ROWS / "tables.yaml"
MARKED = re.compile(r"^((?:# )?)<!-- rows: ([\w-]+) -->\n(.*?)^\1<!-- end -->$", re.M | re.S)
OPENED = re.compile(r"<!-- rows: ")
SHOWN = ("interval", "value", "seeds", "count", "domains", "both")
SEPARATOR = " | "


def pages() -> list[Path]:
    """Return the files that can have tables."""
    return [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md"), *(CHECKOUT / "configs").rglob("*.yaml")]


@cache
def specs() -> dict[str, Any]:
    """Return what every table shows, by the table's name."""
    return read_yaml(SPECS, str(SPECS))


def selections(name: str) -> Iterator[tuple[str, str, dict[str, Any] | str]]:
    """Yield row, column and selection of every cell of a table; of a cell without a number its text."""
    spec = specs()[name]
    for label, row in spec["rows"].items():
        own = {key: value for key, value in row.items() if key not in spec["columns"]}
        for column, values in spec["columns"].items():
            more = row.get(column, {})
            yield label, column, more if isinstance(more, str) else {**spec.get("where", {}), **values, **own, **more}


def found(selection: Mapping[str, Any], where: str) -> tuple[StudyRows, StudyRow]:
    """Return the study and the row of a cell; raise UserError where it is not exactly one."""
    wanted = {key: selection[key] for key in SELECTED if key in selection}
    unknown = selection.keys() - {*SELECTED, "study", "show", "label"}
    if unknown or selection.get("show", SHOWN[0]) not in SHOWN or "study" not in selection:
        raise UserError(
            f"{where}: {', '.join(unknown) or 'show or study'} is not what a cell can have; see scripts/tables.py."
        )
    of = study(selection["study"])
    row = of.find(wanted, f"{where}: study '{selection['study']}'")
    return of, of.over_domains(row, where) if selection.get("show") == "domains" else row


def cell(selection: Mapping[str, Any] | str, where: str) -> str:
    """Return the text of a cell."""
    if isinstance(selection, str):
        return selection
    of, row = found(selection, where)
    show, sign = selection.get("show", SHOWN[0]), bool(row.minus)
    seeds = of.trainings(row)
    if show == "count":
        text = f"{row.n:,} {row.unit}, {len(seeds) or 1}"
    elif show == "seeds":
        text = ", ".join(number_text(value, row.scale, sign, row.half) for value in seeds.values())
    elif show == "value":
        text = number_text(row.value, row.scale, sign, row.half)
    elif show == "both":
        text = both_intervals(row, of.over_domains(row, where))
    else:
        text = interval_text(row)
    return f"{selection['label']} {text}" if "label" in selection else text


def table(name: str, as_comment: bool) -> str:
    """Return a table and a note of what its intervals cover, as Markdown or as the aligned lines of a comment."""
    if name == "claims":
        return sections()
    require_known(f"tables: {SPECS} has no table", [name], specs())
    rows: dict[str, list[str]] = {}
    cells, used = [], []
    for label, column, selection in selections(name):
        where = f"table '{name}', '{label}', '{column}'"
        weak = False
        if isinstance(selection, dict):
            used.append(found(selection, where))
            if selection.get("show") == "both":
                of, row = used[-1]
                used.append((of, of.over_domains(row, where)))
            weak = is_weak(used[-1][1]) and selection.get("show", SHOWN[0]) == SHOWN[0]
        cells.append((label, cell(selection, where), weak))
    mixed = len({is_weak(row) for _, row in used}) > 1
    for label, text, weak in cells:
        rows.setdefault(label, []).append(f"{text} ‡" if mixed and weak else text)
    heads = [*specs()[name].get("heads", [""]), *specs()[name]["columns"]]
    lines = [[*label.split(SEPARATOR), *cells] for label, cells in rows.items()]
    if uneven := [label for label, line in zip(rows, lines, strict=True) if len(line) != len(heads)]:
        raise UserError(
            f"table '{name}': row '{uneven[0]}' has other parts than `heads`; separate them by '{SEPARATOR}'."
        )
    note = provenance(used)
    if as_comment:
        return "".join(f"#   {line}\n" for line in [*console.aligned(heads, lines).splitlines(), *wrap(note, 126)])
    head, *rest = (f"| {SEPARATOR.join(texts)} |" for texts in (heads, *lines))
    return "\n".join(["", head, "|" + "---|" * len(heads), *rest, "", f"*{note}*", ""])


def is_weak(row: StudyRow) -> bool:
    """Return whether the interval of a row covers less than new examples; beside others that do it is marked."""
    return row.interval.removesuffix("+seeds") in ("", "sampler")


def provenance(used: Sequence[tuple[StudyRows, StudyRow]]) -> str:
    """Return sentences on what the intervals of a table cover, and on the run where all numbers are of one."""
    mixed = len({is_weak(row) for _, row in used}) > 1
    kinds: dict[str, dict[str, None]] = {}
    for _, row in used:
        units = kinds.setdefault("‡ " * (mixed and is_weak(row)) + interval_kind_text(row.interval), {})
        units["" if row.units.endswith(" parts") else row.units] = None
    texts = [kind + _units_text(list(units)) for kind, units in kinds.items()]
    sentences = [f"Intervals: {'; '.join(texts).replace('; 95 % ', '; ')}."] if texts else []
    counts = {f"{row.n:,} {row.unit}, seeds: {len(of.trainings(row)) or 1}" for of, row in used}
    if len(counts) == 1:
        sentences.append(f"n = {counts.pop()}.")
    abouts = [of.about for of, _ in used]
    if abouts and all(about is abouts[0] for about in abouts):
        about = abouts[0]
        kind, seconds = ("wall", about.wall_time_s) if about.cpu_time_s is None else ("CPU", about.cpu_time_s)
        spent = f"{seconds / 60:.1f} {kind} minutes"
        sentences.append(f"Config {about.config_hash}, {about.hardware}, {spent}, {about.finished.partition('T')[0]}.")
    return " ".join(sentences)


def _units_text(units: Sequence[str]) -> str:
    """Return the units of independence of the rows of one kind of interval. "" stands for the examples themselves."""
    if len(units) > 1:
        return f" (units: {', '.join(text or 'examples' for text in units)})"
    return f", {units[0]}" if units[0] else ""


def fresh(page: Path) -> tuple[str, str, int]:
    """Return a page's text, what it has to be, and the line of the first table that differs, 0 for none."""
    text = page.read_text(encoding="utf8")
    stale = 0
    if len(OPENED.findall(text)) != len(MARKED.findall(text)):
        raise UserError(f"'{page}': a table's <!-- rows: NAME --> has no <!-- end --> on a line of its own.")

    def rewritten(match: re.Match[str]) -> str:
        nonlocal stale
        prefix, name, body = match.groups()
        made = table(name, bool(prefix))
        if made != body:
            stale = stale or text.count("\n", 0, match.start()) + 1
        return f"{prefix}<!-- rows: {name} -->\n{made}{prefix}<!-- end -->"

    return text, MARKED.sub(rewritten, text), stale


def add(run: Path, name: str) -> Path:
    """Write the rows of a finished run as a study, with the differences that its tables and claims show. Return the file."""
    shown = [
        selection
        for table_name in specs()
        for _, _, selection in selections(table_name)
        if isinstance(selection, dict) and selection.get("study") == name
    ]
    shown += [evidence.row for _, evidence in of_study(read_claims(), name)]
    shown = [selection for selection in shown if selection.get("minus")]
    pairs = [(selection["arm"], selection["minus"]) for selection in shown]
    from scripts import race  # torch

    pairs += race.pairs(run, name)
    made = without_sets(study_of(run, pairs), shown)
    for row in made.rows:
        if not row.interval or (made.trainings(row) and "seeds" not in row.interval):
            raise UserError(
                f"tables: the interval of {row.arm} on {row.data}, {row.metric}, has the kind '{row.interval}', while its "
                f"configuration has {len(made.about.seeds)} seed(s); `vismt evaluate {run}` writes rows with the kind, and seeds."
            )
    path = CHECKOUT / ROWS / f"{name}.jsonl"
    write_study(path, made)
    return path


def without_sets(study: StudyRows, shown: Sequence[Mapping[str, Any]]) -> StudyRows:
    """Return a study of several sets without the differences on single sets, except those that a table or claim shows."""
    sets = {(selection["arm"], selection["minus"], selection.get("data")) for selection in shown}
    overall = (AVERAGE, MATRICES)
    if all(row.data != AVERAGE for row in study.rows):
        return study
    kept = [row for row in study.rows if not row.minus or row.data in overall or (row.arm, row.minus, row.data) in sets]
    return StudyRows(study.about, kept)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 where --check finds a table that differs from its rows."""
    parser = argparse.ArgumentParser(prog="python -m scripts.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is stale")
    parser.add_argument("words", nargs="*", metavar="add RUN STUDY", help="take the rows of a finished run folder")
    options = parser.parse_args(arguments)
    try:
        if options.words:
            if len(options.words) != 3 or options.words[0] != "add":
                raise UserError(f"tables: '{' '.join(options.words)}'; give add RUN STUDY, or nothing.")
            console.stage("rows", str(add(Path(options.words[1]), options.words[2])))
            return 0
        return renew("tables", ((page, *fresh(page)) for page in pages()), options.check)
    except UserError as error:
        console.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
