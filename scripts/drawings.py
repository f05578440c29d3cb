"""Draw the pictures of docs/architecture.md, docs/extending.md and docs/methods/index.md that show no numbers.

    python -m scripts.drawings            draw them
    python -m scripts.drawings --check    exit code 1 with the name of a picture that is not up to date

Pictures are 360 pixels wide, so that a telephone shows them in full size. They have a light ground of their own in a dark page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

from vismt.base import console
from vismt.evaluation.sections import FEATURES, refusals
from vismt.jobs import JOBS, OTHER_NAMES, job_config
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT

WIDTH, MARGIN, LINE = 360, 14, 16
INK, QUIET, GROUND, FILL, EDGE = "#1c1e26", "#5b6070", "#ffffff", "#eef1fb", "#4a5bb5"

# Three walks: what happens, and where it stands in the package.
WALKS = {
    "From a configuration to its rows": (
        ("vismt run FILE reads, types and hashes the file", "config/"),
        ("A run folder holds the run and its job", "jobs/run.py"),
        ("Each arm, rate and seed is trained", "engine/"),
        ("The answers of the merged net are recorded", "storage/records.py"),
        ("Records become rows with intervals", "uncertainty/"),
        ("The report draws the rows", "report/"),
    ),
    "From a model to merged weights": (
        ("vismt.adapt finds the method by name", "methods.py"),
        ("Targets become specs, specs become layers", "lowrank/model/"),
        ("Start values fill the factors", "lowrank/model/starts.py"),
        ("Any training loop trains the model", "engine/, integrations/, yours"),
        ("vismt.merge puts stock modules back", "lowrank/model/merge.py"),
    ),
    "From a feature of evaluation to scores": (
        ("A class declares a key and its needs", "evaluation/"),
        ("Jobs that meet the needs get the key", "evaluation/sections.py"),
        ("It is fitted to validation answers", "storage/fitted.py"),
        ("The record keeps columns of each answer", "storage/records.py"),
        ("Columns become scores with intervals", "uncertainty/intervals.py"),
    ),
}
# Method -> B, C, A and the start of the update.
VARIANTS = (
    ("lora", "B = 0, A random, no C"),
    ("pissa", "B, A = top part of W, start subtracted"),
    ("corda", "B, A = part of W in the inputs' axes"),
    ("polar", "B, A orthonormal, C trained from 0"),
    ("ilora", "C = gates of the user, by rank group"),
    ("amt", "B, A = top part of W, a pair per expert"),
    ("emtal", "B, A random, a router beside them"),
    ("mtlora", "a shared pair, and a pair for each task"),
    ("s2ft", "A or B = rows of the identity"),
)


def text(x: float, y: float, words: str, *, size: int = 13, color: str = INK, bold: bool = False) -> str:
    """Return a line of text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = FILL) -> str:
    """Return a rounded box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{EDGE}"/>'


def page(height: float, title: str, parts: Iterable[str]) -> str:
    """Return a picture of a height with its title for readers that see none."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    )
    style = f'font-family="system-ui, sans-serif" role="img"><title>{escape(title)}</title>'
    ground = f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{GROUND}"/>'
    return "\n".join([f"{head} {style}", ground, *parts, "</svg>", ""])


def architecture() -> str:
    """Return the three walks, one below the other."""
    parts, y = [], MARGIN
    for title, steps in WALKS.items():
        y += LINE
        parts.append(text(MARGIN, y, title, size=14, bold=True))
        y += 8
        for number, (what, where) in enumerate(steps):
            if number:
                parts.append(f'<path d="M{WIDTH / 2:g} {y - 9:g}v7" stroke="{EDGE}" stroke-width="2"/>')
            parts += [box(MARGIN, y, WIDTH - 2 * MARGIN, 40), text(MARGIN + 9, y + 17, what)]
            parts.append(text(MARGIN + 9, y + 33, where, size=12, color=QUIET))
            y += 50
        y += 10
    return page(y, "Three walks through the package", parts)


def low_rank() -> str:
    """Return the update scale B C A as boxes, and what each method makes of it."""
    parts = [text(MARGIN, 30, "y = W x + scale · B C A x", size=16, bold=True)]
    for x, y, width, height, name in (
        (14, 52, 90, 90, "W"),
        (170, 52, 26, 90, "B"),
        (204, 52, 26, 26, "C"),
        (238, 52, 108, 26, "A"),
    ):
        parts += [
            box(x, y, width, height, GROUND if name == "W" else FILL),
            text(x + width / 2 - 5, y + height / 2 + 5, name, bold=True),
        ]
    parts += [text(107, 101, "+ scale ·"), text(28, 158, "o × i, frozen", size=12, color=QUIET)]
    for x, shape in ((168, "o × r"), (204, "r × r"), (246, "r × i, trained")):
        parts.append(text(x, 158, shape, size=11, color=QUIET))
    y = 192.0
    for name, what in VARIANTS:
        parts += [text(MARGIN, y, name, bold=True), text(76, y, what)]
        y += 22
    return page(y + 4, "The low-rank update and what each method makes of it", parts)


def features() -> str:
    """Return a row for each feature of evaluation, with a dot in the column of each job that has it."""
    jobs = [job for job in JOBS if job not in OTHER_NAMES]
    lacking = {job: refusals(type(getattr(job_config(job)(), "evaluate", None))) for job in jobs}
    columns = {job: 128 + 62 * place for place, job in enumerate(jobs)}
    parts = [text(x - 3 * len(job), 30, job, size=11, color=QUIET) for job, x in columns.items()]
    y = 58.0
    for feature in (name for name in FEATURES if (CHECKOUT / "vismt" / "evaluation" / f"{name}.py").exists()):
        parts.append(text(MARGIN, y, feature, bold=True))
        for job, x in columns.items():
            fill = GROUND if lacking[job][feature] else EDGE
            parts.append(f'<circle cx="{x}" cy="{y - 4.5:g}" r="6" fill="{fill}" stroke="{EDGE}"/>')
        y += 28
    parts.append(text(MARGIN, y + 2, "A full dot: the job has the feature.", size=12, color=QUIET))
    return page(y + 18, "Which job has which feature of evaluation", parts)


DRAWINGS = {"architecture": architecture, "features": features, "low_rank": low_rank}


def main(arguments: list[str] | None = None) -> int:
    """Draw the pictures, or name those that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing; exit code 1 if a picture is not up to date")
    check, old = parser.parse_args(arguments).check, False
    for name, draw in DRAWINGS.items():
        path: Path = CHECKOUT / "docs" / f"{name}.svg"
        if path.exists() and path.read_text(encoding="utf8") == draw():
            continue
        old = True
        if not check:
            atomic_write(path, draw())
        console.stage("stale" if check else "drawn", path.name)
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
