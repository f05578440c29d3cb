"""Terminal output: one aligned line for each stage, and progress bars, which become plain lines outside a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from vismt.base.errors import UserError

T = TypeVar("T")

_console = Console(highlight=False, soft_wrap=True, emoji=False)
_quiet = False
LINE_SECONDS = 20.0  # seconds between the lines of a bar outside a terminal


def set_quiet(quiet: bool) -> None:
    """Turn stage lines and bars off or on. Errors are printed either way. Processes other than the first are quiet."""
    global _quiet
    _quiet = quiet


@contextmanager
def quiet() -> Iterator[None]:
    """Hide stage lines and bars while the body runs."""
    before = _quiet
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


def stage(name: str, text: str) -> None:
    """Print `name`, padded to eight characters, then `text`."""
    block(f"{name:<8}{text}")


def block(text: str) -> None:
    """Print a text of several lines without a stage name."""
    if not _quiet:
        _console.print(printable(text, _console.encoding), markup=False)


def printable(text: str, encoding: str = "utf8") -> str:
    """Return text with question marks for what an encoding lacks.

    UTF-8 lacks some bytes that names of files can hold.
    """
    return text.encode(encoding, "replace").decode(encoding)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print the text of `aligned`."""
    block(aligned(columns, rows))


def aligned(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return aligned columns under a header.

    None is shown as "-", booleans as yes and no, and integers with separators.
    """
    cells = [tuple(columns), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def ask(question: str) -> bool:
    """Return whether the user answers yes. Raise UserError without a terminal."""
    try:
        return input(printable(f"{question} [y/N] ", _console.encoding)).strip().lower() in ("y", "yes")
    except EOFError as error:
        raise UserError(f"{question} It needs a terminal for the answer; give --yes.") from error


def error(text: str) -> None:
    """Print one `error:` line to stderr."""
    line = "".join(character if character.isprintable() else " " for character in text)
    print(f"error: {line}", file=sys.stderr, flush=True)


class _Note(ProgressColumn):
    """The note of a bar. Only the note is cut in a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Bar:
    """Progress bar. Without a terminal, one line every LINE_SECONDS, and a last line with the values of `note`."""

    def __init__(self, label: str, total: int, done: int, progress: Progress | None) -> None:
        self._label = label
        self._total = total
        self._begun = self._done = self._shown = done  # shown: amount in the last line
        self._progress = progress
        self._task = None if progress is None else progress.add_task(label, total=total, completed=done, note="")
        self._note = ""
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self._line()

    def note(self, text: str) -> None:
        """Show a text beside the progress, such as the loss."""
        self._note = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=text)

    def finish(self) -> None:
        if self._progress is None and self._note and self._shown < self._done:
            self._line()

    def _line(self) -> None:
        self._shown = self._done
        passed = time.monotonic() - self._started
        left = passed * (self._total - self._done) / max(self._done - self._begun, 1)
        times = f"{duration(passed)} passed" + (f", {duration(left)} left" if left > 0 else "")
        of = f" of {self._total:,}" if self._total else ""
        block("   ".join(filter(None, [f"{self._label} {self._done:,}{of}", self._note, times])))


def duration(seconds: float | None) -> str:
    """Return seconds as "1 h 05 min", "1 min 05 s" or "5 s". None, a negative number and a number that is not finite give ""."""
    if seconds is None or not 0 <= seconds < math.inf:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def bar(name: str, text: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a progress bar for stage `name` while the body runs. Outside a terminal, print a line from time to time.

    The body advances the bar from `done`, the number of earlier steps, to `total`.
    """
    if _quiet or not _console.is_terminal:
        plain = Bar(f"{name:<7} {text}", total, done, None)
        yield plain
        plain.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Note(table_column=Column()),
    )
    with Progress(*columns, console=_console) as progress:
        yield Bar(f"{name:<7} {text}", total, done, progress)


def track(items: Iterable[T], name: str, text: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a bar. `total` is required if `items` has no length."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    with bar(name, text, total) as progress_bar:
        for item in items:
            yield item
            progress_bar.advance()
