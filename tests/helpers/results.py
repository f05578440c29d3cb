"""Rows of results and comparisons as a report has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismt.report.comparison import Cell, Comparison
from vismt.report.results import Result, read_results, result_of, write_values
from vismt.storage import lines
from vismt.uncertainty.intervals import CLEAN, Condition, Covers, Estimate, Measure, student_quantile
from vismt.uncertainty.intervals import Score as Score

HASH = "4f2a9c1e"
QUALITY = ("ECE-15", "NLL in nats", "Brier")
PGD = Condition("PGD-10 linf 4.5/255", "attack", "PGD linf", 4.5 / 255)


def corruption(name: str, severity: int) -> Condition:
    """The condition of a corruption."""
    return Condition(f"{name} {severity}", "corruption", name, float(severity))


def result(
    data: str = "digits",
    arm: str = "frozen",
    condition: Condition = CLEAN,
    value: float = 0.4,
    half: float = 0.05,
    **changes: Any,
) -> Result:
    """A row of a few-shot run."""
    row: dict[str, Any] = {
        "task": "few-shot", "data": data, "split": "test", "metric": "accuracy", "unit": "episodes", "scale": "share",
        "better": "higher", "chance": 0.2, "protocol": "5-way 1-shot", "condition": condition.label, "arm": arm,
        "seed": None, "value": value, "low": value - half, "high": value + half, "n": 60, "config_hash": HASH,
        "kind": condition.kind, "family": condition.family, "level": condition.level,
    }  # fmt: skip
    return Result(**{**row, **changes})


def comparison(
    data: str, cells: Mapping[str, Cell], condition: Condition = CLEAN, *, paired: bool = False, **changes: Any
) -> Comparison:
    """Arms under one condition, as `compare` gives them."""
    return Comparison(result(data, condition=condition, **changes), data, dict(cells), "", {}, paired)


def cell(value: float, half: float, n: int, mark: str = "", seeds: int = 0, covers: Covers = "examples") -> Cell:
    """A cell with the interval value ± half."""
    return Cell(value, value - half, value + half, n, mark, seeds, covers)


def half(of: Cell) -> float:
    """The longer half of a cell's interval."""
    return max(of.value - of.low, of.high - of.value)


def estimated(mean: float, low: float, high: float) -> Estimate:
    """A difference with an interval, both halves of which are equal."""
    assert abs(low + high - 2 * mean) < 1e-9
    return Estimate(mean, (((high - mean) ** 2 / student_quantile(0.975, 4.0) ** 2, 4.0),))


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]], mode: str = "w") -> None:
    """Write a line file, or with mode "a" append to it."""
    lines.write_lines(path, [*(lines.read_lines(path) if mode == "a" else ()), *rows])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl."""
    return lines.read_lines(folder / "results.jsonl")


def rows_by_task(folder: Path, arm: str) -> dict[tuple[str, str, str], Result]:
    """The rows of an arm over its trainings by task, condition and metric."""
    rows = read_results(folder / "results.jsonl")
    return {(row.task, row.condition, row.metric): row for row in rows if row.arm == arm and row.seed is None}


def scores_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl without the quality of probabilities, further measures and the constant predictions."""
    rows = [row for row in rows_of(folder) if row["metric"] not in QUALITY]
    return [row for row in rows if not row["further"] and row["arm"] != "constant"]


def add(
    folder: Path, score: Score, arm: str, *, seed: int | None = None, records: bool = True, config_hash: str = HASH
) -> Result:
    """Append a score's row to results.jsonl and its values by example to records/."""
    row = result_of(score, arm, seed, "test", config_hash)
    write_lines(folder / "results.jsonl", [vars(row)], "a")
    if records and seed is None:
        write_values(folder, [(row, score.measure)])
    return row


def measure(values: Sequence[float], metric: str = "accuracy", **settings: Any) -> Measure:
    """A measure of examples "0", "1", ..."""
    return Measure(metric, {str(number): value for number, value in enumerate(values)}, **settings)
