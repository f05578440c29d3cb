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
        "write one report on separate runs, for example `vismt compare runs/a runs/b`",
        answers=True,
    )
    compare.add_argument("runs", type=Path, nargs="+", help="run folders")
    compare.add_argument("--arm", action="append", default=[], help="keep this arm only; may be repeated (all)")
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
    """Add --format to a command that writes a report; `formats_of` reads it. more: help on further formats."""
    known = "html, md, csv, latex (tables of a paper), pdf and png (every figure also as such a file; svg is always written)"
    parser.add_argument("--format", default="html,md", help=f"comma-separated: {known}{more} (html,md)")


def formats_of(options: argparse.Namespace, *more: str) -> list[str]:
    """Return the formats of --format; more: further names that the command knows. Raises UserError for an unknown one."""
    from vismt.base.errors import require_known
    from vismt.report.plotting import FIGURES
    from vismt.report.writer import DEFAULT_FORMATS, FORMATS

    names = [name.strip() for name in options.format.split(",")]
    require_known(f"{options.command}: --format has no", names, [*FORMATS, *FIGURES, *more])
    return names if set(names) - set(FIGURES) else [*names, *DEFAULT_FORMATS]


def _compare(options: argparse.Namespace) -> None:
    from vismt.jobs import resolved_path

    for folder in options.runs:
        resolved_path(folder)  # before the import: a wrong folder is answered at once
    from vismt.report.comparison_report import compare_runs
    from vismt.storage.outputs import check_folder

    first, last = (folder.resolve().name for folder in (options.runs[0], options.runs[-1]))
    target, formats = options.out or Path("runs") / f"compare-{first}-{last}", formats_of(options)
    if options.out is not None:
        check_folder("compare", target, "--out")
    files = compare_runs(options.runs, target, options.arm, formats)
    for path in files:
        console.stage("report", str(path))
    answer(options, {"folder": target, "files": files})


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
            # A run may have started in the folder in the meantime.
            if item.folder not in (again.folder for again in found()):
                continue
        item.delete()
        rest = "; the rest of the folder is not vismt's and stays" if item.folder.exists() else ""
        console.stage("clean", f"deleted {item.folder}: {item.why}{rest}")
    if nothing:
        console.stage("clean", f"nothing to delete in {options.runs} and {cache_root()}")
