"""What a run prints: one aligned line per stage, a bar for what takes time, plain lines when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")

_console = Console(highlight=False, soft_wrap=True)
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence stage lines and bars (errors still go to stderr); also used on every rank but the first."""
    global _quiet
    _quiet = quiet


def stage(name: str, text: str) -> None:
    """Print `name` in a column of eight, then `text`."""
    if not _quiet:
        _console.print(f"{name:<8}{text}", markup=False)


def block(text: str) -> None:
    """Print several lines as they are."""
    if not _quiet:
        _console.print(text, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; None shows as '-', True and False as yes and no."""
    shown = [tuple(columns), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(columns))]
    block("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def error(text: str) -> None:
    """Print one `error:` line to stderr."""
    print(f"error: {text}", file=sys.stderr, flush=True)


class Bar:
    """Handle of a running progress bar: `advance` moves it, `note` sets the text behind it."""

    def __init__(self, progress: Progress | None, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def bar(name: str, text: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress bar of `total` steps of which `done` are behind us; nothing but a line when not a terminal."""
    if _quiet or not _console.is_terminal:
        stage(name, f"{text} ({done}/{total} done)" if done else f"{text} ({total})")
        yield Bar(None, 0)
        return
    columns = (
        TextColumn(f"{name:<7}"),
        TextColumn(text),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console) as progress:
        yield Bar(progress, progress.add_task(text, total=total, completed=done, note=""))


def track(items: Iterable[T], name: str, text: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a bar; `total` is needed when `items` has no length."""
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with bar(name, text, count) as running:
        for item in items:
            yield item
            running.advance()
