"""The verdict on a folder: findings ranked by level, a row for each module, and both as JSON with stable keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vismt import __version__
from vismt.base import console

Level = Literal["broken", "suspicious", "note"]
LEVELS: tuple[Level, ...] = ("broken", "suspicious", "note")
EXIT_CODES = {"ok": 0, "suspicious": 3, "broken": 4}
FORMAT = 1
MERGE_COMMAND = "vismt merge ADAPTER --base MODEL --to OUT"
UNSEEN = "not checked"  # of `about`, and of lines of checks


@dataclass(frozen=True)
class Finding:
    """Something about a folder that a user has to know.

    level: broken (a reader fails or computes something else), suspicious, or note (no effect on the verdict). code: stable name
    of the kind. text: what was seen. fix: what to do. modules: where, empty for the whole folder.
    """

    level: Level
    code: str
    text: str
    fix: str = ""
    modules: tuple[str, ...] = ()


@dataclass
class ModuleRow:
    """Numbers of an adapted module; None where they are not known.

    norm: |DeltaW|_F. ratio: |DeltaW|_F / |W|_F. rank_used: number of singular values above the dtype's noise. stable_rank:
    |DeltaW|_F^2 / |DeltaW|_2^2. fit: of a merged checkpoint (fit.py): right, factor, other, unresolved. factor: k of
    W + k DeltaW. residual: |M - W - c DeltaW|_F / |M|_F. erased: share of the update that rounding to the checkpoint's dtype
    loses.
    """

    path: str
    rank: int | None = None
    scale: float | None = None
    norm: float | None = None
    rank_used: int | None = None
    stable_rank: float | None = None
    ratio: float | None = None
    fit: str | None = None
    factor: float | None = None
    residual: float | None = None
    erased: float | None = None


@dataclass(frozen=True)
class Check:
    """Something that `vismt verify` looks at.

    Attributes:
        name: What is looked at, "scale and merge".
        done: Whether it was looked at.
        text: What was compared and how it stands; if it was not looked at, what it needs.
    """

    name: str
    done: bool
    text: str


@dataclass(repr=False)
class Verdict:
    """What `vismt verify` says about a folder. Printing it gives a table.

    Attributes:
        folder: that was examined.
        kind: vismt, peft, checkpoint or none.
        about: facts of the folder in words, by name.
        checks: what was looked at and what was not, with what it needs.
        findings: the most serious ones first.
        modules: a row for each adapted module.
        readers: what each reader will do, one row for each reader and group of tensors.
        answer: the same in one line.
        probe: rows of measured scores with 95 % intervals.
    """

    folder: str
    kind: str
    about: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    readers: list[dict[str, Any]] = field(default_factory=list)
    answer: str = ""
    probe: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the verdict, its reasons and what it could not see as a table."""
        rows = [("verdict", f"{self.status}: {self.folder}"), ("readers", self.answer)]
        rows += [
            ("", f"{row['line'].partition(':')[0]} ({row['source']}): {remark}")
            for row in self.readers
            for remark in row["remarks"]
        ]
        rows += [(name, text) for name, text in self.about.items() if name != UNSEEN]
        rows += [("checked" if check.done else UNSEEN, f"{check.name}: {check.text}") for check in self.checks]
        for finding in self.findings:
            rows += [(finding.level, finding.text), ("", finding.fix and f"fix: {finding.fix}")]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{text}" for name, text in rows if text]
        if self.probe:
            heads = ("model", "measure", "value", "low", "high", "n")
            cells = [[f"{row[h]:.4g}" if isinstance(row[h], float) else row[h] for h in heads] for row in self.probe]
            lines.append(console.aligned(heads, cells))
        return "\n".join(lines)

    @property
    def status(self) -> str:
        """Return ok, suspicious or broken."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in LEVELS[:2] if level in levels), "ok")

    @property
    def exit_code(self) -> int:
        """Return 0, 3 or 4."""
        return EXIT_CODES[self.status]

    @property
    def codes(self) -> set[str]:
        """Return the codes of the findings that decide the status."""
        return {finding.code for finding in self.findings if finding.level != "note"}

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as values for JSON."""
        status = {"status": self.status, "exit_code": self.exit_code}
        return {"format": FORMAT, "vismt": __version__, **status, **asdict(self)}


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, the most serious first, each once."""
    return sorted(dict.fromkeys(findings), key=lambda finding: LEVELS.index(finding.level))


def names_of(modules: Sequence[str]) -> str:
    """Return the first three of these names and the number of the others, for a sentence."""
    rest = len(modules) - 3
    return ", ".join(f"'{name}'" for name in modules[:3]) + (f" and {rest} more" if rest > 0 else "")
