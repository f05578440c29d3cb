"""Run folders in one line each: title, job, headline number and how far the run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vismt.base.errors import UserError
from vismt.config.sections import RESOLVED, read_config_file
from vismt.report.comparison import compare_results
from vismt.report.results import FACTS, RESULTS, ValuesByExample, read_results
from vismt.report.writer import headline, read_run_facts
from vismt.storage.cache import Deletable
from vismt.storage.locks import HOLDER, LOCK, is_locked

STUB = "nothing done"
_BARE = {RESOLVED, FACTS, LOCK, HOLDER}  # files of a run that has made nothing
# keys of every run.json (the file of another program lacks some)
NOTED = {"command", "config_hash", "versions", "wall_time_s"}


@dataclass(frozen=True)
class RunRow:
    """One run folder.

    state: "running", "evaluated", "trained", "interrupted", STUB, or what is wrong with its files.
    """

    folder: Path
    title: str
    job: str
    headline: str
    state: str


def list_runs(parent: Path) -> list[RunRow]:
    """Return the run folders in a folder, the newest first."""
    folders = [path.parent for path in parent.glob(f"*/{RESOLVED}")]
    return [_row(folder) for folder in sorted(folders, key=lambda path: -(path / RESOLVED).lstat().st_mtime)]


def _row(folder: Path) -> RunRow:
    title = job = number = "-"
    try:
        config = read_config_file(folder / RESOLVED)
        title, job = str(config.get("title") or "-"), str(config.get("task", "-"))
        results = read_results(folder / RESULTS)
        number = headline(compare_results(results, ValuesByExample(folder))) or "-"
        state = _state(folder, bool(results))
    except UserError as error:
        state = str(error)
    return RunRow(folder, title, job, number, state)


def _state(folder: Path, evaluated: bool) -> str:
    if is_locked(folder):
        return "running"
    if evaluated:
        return "evaluated"
    facts = read_run_facts(folder)
    if "adapt" in facts:
        return "trained"
    return STUB if stub(folder) else "interrupted"


def stub(folder: Path) -> Deletable | None:
    """Return the files of an unused run that has made nothing. Return None for every other folder, also behind a link."""
    try:
        paths = () if folder.is_symlink() or not folder.is_dir() else tuple(sorted(folder.iterdir()))
        names = {path.name for path in paths}
        if not {RESOLVED} <= names <= _BARE or not all(path.is_file() and not path.is_symlink() for path in paths):
            return None
        ours = "task" in read_config_file(folder / RESOLVED)
        facts = read_run_facts(folder)
    except (OSError, UserError):
        return None
    if not ours or (facts and not facts.keys() >= NOTED) or "adapt" in facts or is_locked(folder):
        return None
    return Deletable(folder, paths, f"a run without results, with its {' and '.join(sorted(names))} alone")
