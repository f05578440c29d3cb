"""What the scripts that write pages share: the committed rows of a study, numbers with intervals, and pages that are renewed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from scripts.study_rows import ROWS, About, StudyRow, StudyRows, read_study, studies
from vismt.base import console
from vismt.base.errors import UserError, near
from vismt.report.tables import number_text
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT

BASE = "lora"  # the arm that other arms are compared with


@cache
def study(name: str) -> StudyRows:
    """Return a study by its name."""
    known = studies()
    if name not in known:
        raise UserError(f"tables: no rows of a study '{name}' in {ROWS}.{near(name, known)}")
    return read_study(known[name])


def rate_factor(about: About, arm: str) -> float:
    """Return the factor of all rates of an arm, `train.rates: {".": FACTOR}`, which the learning rate lr in its costs lacks."""
    return float(about.settings.get("arms", {}).get(arm, {}).get("train.rates", {}).get(".", 1.0))


def interval_text(row: StudyRow) -> str:
    """Return a number with its interval, which has two ends where it is not symmetric."""
    return texts(row)[abs(row.high + row.low - 2 * row.value) > 0.1 * row.half]


def both_intervals(row: StudyRow, domains: StudyRow) -> str:
    """Return the number of an average with its interval and that over new domains, which is symmetric."""
    return f"{interval_text(row)} ({texts(domains)[0].partition(' ')[2]} over domains)"


def texts(row: StudyRow) -> tuple[str, str]:
    """Return a number with its interval as "1.2 ± 0.3" and as "1.2 [0.9, 1.5]"."""
    sign, width = bool(row.minus), (row.high - row.low) / 2
    value, low, high = (number_text(end, row.scale, sign, width) for end in (row.value, row.low, row.high))
    return f"{value} ± {number_text(width, row.scale, half=width)}", f"{value} [{low}, {high}]"


def renew(script: str, files: Iterable[tuple[Path, str, str, int]], check: bool) -> int:
    """Write each file whose text is not what its rows make, with check name it; return 1 where check finds one.

    files: path, text, text that it has to have, line of the first difference.
    """
    stale = False
    for path, text, made, line in files:
        name = path.relative_to(CHECKOUT)
        if text != made and check:
            stale = True
            console.stage("stale", f"{name}:{line}; `python -m scripts.{script}` writes it again")
        elif text != made:
            atomic_write(path, made)
            console.stage(script, str(name))
    return int(stale)
