"""`vismt compare` and `clean`: several run folders at once, and the cache."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from vismt import console
from vismt.cli.commands import Commands


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    compare = commands.add(
        "compare", _compare, "one report over separate runs, for example `vismt compare runs/a runs/b`"
    )
    compare.add_argument("runs", type=Path, nargs="+", help="run folders")
    compare.add_argument("--arm", action="append", default=[], help="keep this arm only; may be repeated (all)")
    compare.add_argument("--out", type=Path, help="folder of the report (runs/compare-FIRST-LAST)")
    add_format(compare)
    clean = commands.add("clean", _clean, "delete run folders in which nothing is done, and cached files; asks first")
    clean.add_argument("--runs", type=Path, default=Path("runs"), help="parent of the run folders (runs)")
    clean.add_argument("--yes", action="store_true", help="delete without asking")


def add_format(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add --format to a command that writes a report; `formats_of` reads it. more: help on further formats."""
    known = "html, md, csv, latex (tables of a paper), svg and pdf (every figure also as vectors)"
    parser.add_argument("--format", default="html,md", help=f"comma-separated: {known}{more} (html,md)")


def formats_of(options: argparse.Namespace, *more: str) -> list[str]:
    """Return the formats of --format; more: further names that the command knows. Raises UserError for an unknown one."""
    from vismt.errors import require_known
    from vismt.report.plotting import VECTORS
    from vismt.report.report import DEFAULT_FORMATS, FORMATS

    names = [name.strip() for name in options.format.split(",")]
    require_known(f"{options.command}: --format has no", names, [*FORMATS, *VECTORS, *more])
    return names if set(names) - set(VECTORS) else [*names, *DEFAULT_FORMATS]


def _compare(options: argparse.Namespace) -> None:
    from vismt.report.joined import compare_runs

    first, last = (folder.resolve().name for folder in (options.runs[0], options.runs[-1]))
    target = options.out or Path("runs") / f"compare-{first}-{last}"
    for path in compare_runs(options.runs, target, options.arm, formats_of(options)):
        console.stage("report", str(path))


def _clean(options: argparse.Namespace) -> None:
    from vismt.paths import cache_root
    from vismt.report.overview import STUB, list_runs

    stubs = [row.folder for row in list_runs(options.runs) if row.state == STUB]
    cache = cache_root()
    caches = (
        sorted(path for path in cache.iterdir() if path.is_dir() and not path.is_symlink()) if cache.is_dir() else []
    )
    if not stubs and not caches:
        console.stage("clean", f"nothing to delete in {options.runs} and {cache}")
    for folder in [*stubs, *caches]:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        what = "run in which nothing is done" if folder in stubs else "cache, downloaded or computed again when needed"
        if options.yes or console.ask(f"delete {folder} ({what}, {size / 1e6:,.1f} MB)?"):
            shutil.rmtree(folder)
            console.stage("clean", f"deleted {folder}")
