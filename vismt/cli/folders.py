"""`vismt compare` and `clean`: several run folders at once, and the cache."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.base import console
from vismt.cli.commands import Commands, answer

if TYPE_CHECKING:
    from vismt.storage.cache import Deletable


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    compare = commands.add(
        "compare",
        _compare,
        "compare runs, or tables of predictions, example by example: `vismt compare a.csv b.csv`",
        answers=True,
    )
    compare.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="run folders, tables (csv, jsonl, json, parquet), folders of a table for each seed, or of lm-evaluation-harness",
    )
    for name, text in (
        ("id", "the example"),
        ("score", "a number for each example, for example 1 and 0 for right and wrong"),
        ("label", "the right answer"),
        ("answer", "the model's answer"),
        (
            "probability",
            "the answer's probability, or the probabilities of all classes, with a * in the place of the class",
        ),
        ("group", "examples that depend on each other, such as a patient"),
        ("seed", "the training"),
        ("set", "the data set"),
    ):
        compare.add_argument(f"--{name}", metavar="COLUMN", help=f"column of a table: {text}")
    for name in ("higher", "lower"):
        compare.add_argument(
            f"--{name}",
            metavar="METRIC",
            action="append",
            default=[],
            help=f"{name} values of this metric are better; may be repeated",
        )
    compare.add_argument("--baseline", metavar="MODEL", help="compare all others with this one (all pairs)")
    compare.add_argument("--common", action="store_true", help="compare the examples that all tables have")
    compare.add_argument(
        "--arm", action="append", default=[], help="keep this arm of a run only; may be repeated (all)"
    )
    compare.add_argument("--out", type=Path, help="folder of the report (runs/compare-FIRST-LAST)")
    add_format(compare)
    clean = commands.add(
        "clean",
        _clean,
        "delete run folders without results, and vismt's own files in the cache; asks first",
    )
    clean.add_argument("--runs", type=Path, default=Path("runs"), help="parent of the run folders (runs)")
    clean.add_argument("--yes", action="store_true", help="delete without asking")


def add_format(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add --format to a command that writes a report. `formats_of` reads it.

    more: Help on further formats.
    """
    known = "html, md, csv, latex (tables of a paper), json (the answer), pdf and png (each figure as such a file beside its svg)"
    parser.add_argument("--format", default="html,md", help=f"comma-separated: {known}{more} (html,md)")


def formats_of(options: argparse.Namespace, *more: str) -> list[str]:
    """Return the formats of --format. Raise UserError for an unknown format.

    more: Further names that the command knows.
    """
    from vismt.base.errors import require_known
    from vismt.report.plotting import FIGURES
    from vismt.report.writer import DEFAULT_FORMATS, FORMATS

    names = [name.strip() for name in options.format.split(",")]
    require_known(f"{options.command}: --format has no", names, [*FORMATS, *FIGURES, *more])
    return names if set(names) - set(FIGURES) else [*names, *DEFAULT_FORMATS]


def _compare(options: argparse.Namespace) -> None:
    from vismt.report.compare.score_tables import USUAL, Columns, is_table

    for path in options.inputs:
        if not is_table(path):  # before the import, so that a wrong folder is answered at once
            from vismt.jobs import resolved_path

            resolved_path(path)
    from vismt.report.compare.report import compare_inputs, input_names
    from vismt.storage.outputs import check_folder
    from vismt.uncertainty.intervals import HIGHER, LOWER

    names = input_names(options.inputs)
    target, formats = options.out or Path("runs") / f"compare-{names[0]}-{names[-1]}", formats_of(options)
    if options.out is not None:
        check_folder("compare", target, "--out")
    better = {**dict.fromkeys(options.higher, HIGHER), **dict.fromkeys(options.lower, LOWER)}
    columns = Columns(**{role: getattr(options, role) for role in USUAL}, better=better)
    files, pairs = compare_inputs(
        options.inputs, target, options.arm, formats, columns, options.common, options.baseline
    )
    for path in files:
        console.stage("report", str(path))
    for pair in pairs:
        console.stage("compare", f"{pair.set}   {pair.metric}   {pair}")
    answer(options, [pair.as_json() for pair in pairs])


def _clean(options: argparse.Namespace) -> None:
    from vismt.report.run_list import stub
    from vismt.storage.cache import deletable
    from vismt.storage.paths import cache_root

    def found() -> Iterator[Deletable]:
        yield from filter(None, map(stub, sorted(options.runs.glob("*"))))
        yield from deletable(cache_root())

    nothing = True
    for item in found():
        nothing = False
        if not options.yes:
            if not console.ask(f"delete {item.folder}: {item.why} ({item.size / 1e6:,.1f} MB)?"):
                continue
            # A run may have started in the folder meanwhile.
            if item.folder not in (again.folder for again in found()):
                continue
        item.delete()
        rest = "; the rest of the folder is not vismt's and stays" if item.folder.exists() else ""
        console.stage("clean", f"deleted {item.folder}: {item.why}{rest}")
    if nothing:
        console.stage("clean", f"nothing to delete in {options.runs} and {cache_root()}")
