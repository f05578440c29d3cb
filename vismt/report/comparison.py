"""Rows of results.jsonl, checked and set beside each other: which model is best, and which are its statistical ties.

Two models are compared on the same episodes when both left records that reproduce their numbers: a tie is then a paired
bootstrap interval of the difference that contains zero. Without such records it is an overlap of the two intervals. The best is
the highest, in rows with "lower_is_better": true (an error) the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

from vismt.engine.log import read_lines, record_stem
from vismt.errors import UserError
from vismt.stats import domain_average, paired_bootstrap

TEXTS = ("data", "protocol", "condition", "metric", "model", "unit", "config_hash")
AVERAGE = "average"
Row = dict[str, Any]
Episodes = dict[Any, float]


@dataclass(frozen=True)
class Cell:
    """One number: mean, half width of its 95 % interval, n; mark is "best", "tie" or "" (also when nothing to compare)."""

    value: float
    ci95: float
    n: int
    mark: str = ""


@dataclass(frozen=True)
class Comparison:
    """Models by name under one condition of one protocol on one set (or the average over sets, `data` = "average").

    difference: (second - first model, low, high) on the same episodes; None unless there are two models, paired.
    paired: whether all marks come from paired differences.
    """

    data: str
    protocol: str
    condition: str
    metric: str
    unit: str
    seed: int
    cells: dict[str, Cell]
    difference: tuple[float, float, float] | None
    paired: bool
    lower_is_better: bool = False


def read_results(folder: Path, config_hash: str) -> list[Row]:
    """The rows of results.jsonl; raises UserError when there are none, or one is not a complete number of this run."""
    rows = read_lines(folder / "results.jsonl")
    if not rows:
        raise UserError(f"report: no results in '{folder}' (results.jsonl); make them with `vismt evaluate {folder}`.")
    seen: set[tuple] = set()
    for number, row in enumerate(rows, 1):
        name = f"results.jsonl row {number}" + "".join(f" {row[k]}" for k in ("data", "condition", "model") if k in row)
        fault = _fault(row, config_hash)
        key = tuple(row.get(part) for part in ("data", "protocol", "condition", "metric", "model", "seed"))
        if fault is None and key in seen:
            fault = "says the same thing as an earlier row"
        if fault is not None:
            raise UserError(
                f"report: {name}: {fault}; a number needs n, CI and config hash. Run `vismt evaluate` again."
            )
        seen.add(key)
    return rows


def compare(rows: Sequence[Row], folder: Path) -> list[Comparison]:
    """One comparison per (data, protocol, condition, metric, seed), by protocol, then sets in order, then the average."""
    data, protocols = (list(dict.fromkeys(row[name] for row in rows)) for name in ("data", "protocol"))
    order = lambda row: (  # noqa: E731
        protocols.index(row["protocol"]),
        row["metric"],
        row["seed"],
        row["unit"],
        data.index(row["data"]),
        row["condition"] != "clean",
        row["condition"],
    )
    found: list[Comparison] = []
    for _, table in groupby(sorted(rows, key=order), key=lambda row: order(row)[:4]):
        groups = [
            sorted(group, key=lambda row: row["model"] != "frozen")
            for _, group in groupby(table, key=lambda row: order(row)[4:])
        ]
        episodes = {id(row): episodes_of(folder, row) for group in groups for row in group}
        found += [_compare(group, [episodes[id(row)] for row in group]) for group in groups]
        if all(group[0]["data"] != AVERAGE for group in groups):
            found += _averages(groups, episodes)
    return found


def is_share(metric: str) -> bool:
    """Whether values of this metric are shares in [0, 1], which are shown in per cent."""
    plain = metric.lower().removesuffix(" by substring")
    return plain.endswith(("ratio@1", "accuracy", "ratio", "iou", "error rate", "odsf", "maxf", "ece-15"))


def _fault(row: Row, config_hash: str) -> str | None:
    for name in TEXTS:
        if not isinstance(row.get(name), str) or not row[name]:
            return f"no '{name}'"
    for name in ("value", "ci95", "n", "seed"):
        value = row.get(name)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            return f"no '{name}'" if value is None else f"'{name}' is {value}"
    if row["n"] < 1 or row["n"] != int(row["n"]) or row["ci95"] < 0:
        return f"n = {row['n']} and ci95 = {row['ci95']} are no count and no width"
    if not isinstance(row.get("lower_is_better", False), bool):
        return f"'lower_is_better' is {row['lower_is_better']}"
    if row["config_hash"] != config_hash:
        return f"config hash {row['config_hash']} is not this run's {config_hash}"
    return None


def episodes_of(folder: Path, row: Row) -> Episodes | None:
    """Values by episode (or example) of one row; None unless a record file reproduces the row's value and n.

    A row with "records": null is one whose interval its records do not give, so that nothing is to be paired.
    """
    stem = record_stem(row["data"], row["protocol"], row["model"])
    if "records" in row:
        if row["records"] is None:
            return None
        stem = str(row["records"])
    files = [path for path in sorted((folder / "records").glob("*.jsonl")) if path.stem == stem]
    files += [path for path in sorted((folder / "records").glob("*.jsonl")) if path.stem.startswith(f"{stem}-")]
    for path in files:
        values: Episodes = {}
        for line in read_lines(path):
            seen = line.get(row["condition"])
            if isinstance(seen, Real) and "episode" in line:
                values[line["episode"]] = float(seen)
            elif seen is not None and "label" in line and "id" in line:
                values[line["id"]] = float(seen == line["label"])
        if len(values) == row["n"] and abs(math.fsum(values.values()) / row["n"] - row["value"]) < 1e-6:
            return values
    return None


def _compare(group: Sequence[Row], episodes: Sequence[Episodes | None]) -> Comparison:
    sign = _sign(group[0])
    best = max(range(len(group)), key=lambda i: sign * group[i]["value"])
    marks, paired = [], len(group) > 1
    for i, row in enumerate(group):
        both = aligned(episodes[best], episodes[i])
        if i == best:
            marks.append("best" if len(group) > 1 else "")
            continue
        if both is None:
            paired = False
            tied = sign * (group[best]["value"] - row["value"]) <= group[best]["ci95"] + row["ci95"]
        else:
            _, low, high, _ = paired_bootstrap(*both)
            tied = low <= 0 <= high
        marks.append("tie" if tied else "")
    difference = None
    if len(group) == 2 and paired:
        difference = paired_bootstrap(*aligned(episodes[1], episodes[0]))[:3]
    return _comparison(
        group[0],
        {
            row["model"]: Cell(row["value"], row["ci95"], int(row["n"]), mark)
            for row, mark in zip(group, marks, strict=True)
        },
        difference,
        paired,
    )


def _averages(groups: Sequence[Sequence[Row]], episodes: dict[int, Episodes | None]) -> list[Comparison]:
    """The mean over sets of each condition that two or more sets and all have, each set weighing the same.

    Its variance is that of the episodes within the sets, sum of the sets' / D^2; paired differences likewise.
    """
    found = []
    sets = len({group[0]["data"] for group in groups})
    for condition in dict.fromkeys(group[0]["condition"] for group in groups):
        chosen = [group for group in groups if group[0]["condition"] == condition]
        models = [row["model"] for row in chosen[0]]
        if sets < 2 or len(chosen) != sets or any([row["model"] for row in group] != models for group in chosen):
            continue
        columns = list(zip(*chosen, strict=True))
        values = [math.fsum(row["value"] for row in rows) / sets for rows in columns]
        halves = [math.sqrt(math.fsum(row["ci95"] ** 2 for row in rows)) / sets for rows in columns]
        sign = _sign(chosen[0][0])
        best = max(range(len(models)), key=lambda i: sign * values[i])
        pairs = [_mean_difference(columns[best], rows, episodes) for rows in columns]
        marks = []
        for i, pair in enumerate(pairs):
            reach = pair[1] if pair else halves[best] + halves[i]
            behind = sign * (values[best] - values[i])
            marks.append(("best" if i == best else "tie" if behind <= reach else "") * (len(models) > 1))
        cells = {
            model: Cell(values[i], halves[i], int(sum(row["n"] for row in columns[i])), marks[i])
            for i, model in enumerate(models)
        }
        step = _mean_difference(columns[1], columns[0], episodes) if len(models) == 2 else None
        difference = (step[0], step[0] - step[1], step[0] + step[1]) if step else None
        paired = len(models) > 1 and all(pair is not None for pair in pairs)
        found.append(_comparison({**chosen[0][0], "data": AVERAGE}, cells, difference, paired))
    return found


def _mean_difference(
    first: Sequence[Row], second: Sequence[Row], episodes: dict[int, Episodes | None]
) -> tuple[float, float] | None:
    """(mean over sets of first - second, half width) from paired episodes; None when a set has none."""
    differences = {}
    for a, b in zip(first, second, strict=True):
        both = aligned(episodes[id(a)], episodes[id(b)])
        if both is None:
            return None
        differences[a["data"]] = [x - y for x, y in zip(*both, strict=True)]
    return domain_average(differences)


def _sign(row: Row) -> int:
    return -1 if row.get("lower_is_better") else 1


def aligned(a: Episodes | None, b: Episodes | None) -> tuple[list[float], list[float]] | None:
    if a is None or b is None or a.keys() != b.keys() or len(a) < 2:
        return None
    return list(a.values()), [b[key] for key in a]


def _comparison(
    row: Row, cells: dict[str, Cell], difference: tuple[float, float, float] | None, paired: bool
) -> Comparison:
    texts = {name: row[name] for name in ("data", "protocol", "condition", "metric", "unit")}
    return Comparison(
        **texts,
        seed=int(row["seed"]),
        cells=cells,
        difference=difference,
        paired=paired,
        lower_is_better=bool(row.get("lower_is_better")),
    )
