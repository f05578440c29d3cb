"""Run folders in one line each: title, job, headline number and how far the run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vismt.config import read_yaml
from vismt.engine.run import FACTS, RESOLVED
from vismt.errors import UserError
from vismt.files import HOLDER, LOCK, is_locked, read_sealed
from vismt.report.comparison import compare
from vismt.report.report import headline
from vismt.report.results import RESULTS, ValuesByExample, read_results

STUB = "nothing done"
BARE = {RESOLVED, FACTS, LOCK, HOLDER}  # files of a run in which nothing is done


@dataclass(frozen=True)
class RunRow:
    """One run folder. state: "running", "evaluated", "trained", "interrupted", STUB, or what is wrong with its files."""

    folder: Path
    title: str
    job: str
    headline: str
    state: str


def list_runs(parent: Path) -> list[RunRow]:
    """Return the run folders in a folder, the newest first."""
    folders = [path.parent for path in parent.glob(f"*/{RESOLVED}")]
    return [_row(folder) for folder in sorted(folders, key=lambda path: -(path / RESOLVED).stat().st_mtime)]


def _row(folder: Path) -> RunRow:
    title = job = number = "-"
    try:
        config = read_yaml(folder / RESOLVED)
        title, job = str(config.get("title") or "-"), str(config.get("task", "-"))
        results = read_results(folder / RESULTS)
        number = headline(compare(results, ValuesByExample(folder))) or "-"
        state = _state(folder, bool(results))
    except UserError as error:
        state = str(error)
    return RunRow(folder, title, job, number, state)


def _state(folder: Path, evaluated: bool) -> str:
    if is_locked(folder):
        return "running"
    if evaluated:
        return "evaluated"
    facts = read_sealed(folder / FACTS, f"run '{folder}'") if (folder / FACTS).exists() else {}
    if "adapt" in facts:
        return "trained"
    return STUB if {path.name for path in folder.rglob("*") if path.is_file()} <= BARE else "interrupted"
