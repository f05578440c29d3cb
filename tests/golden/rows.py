"""Read results.jsonl of any version and match the rows of one version with those of another.

Version 0.1.0 wrote a row for each data set, protocol, condition, metric and model, with `ci95`, and the values by
seed into a separate file. Later rows have `task`, `arm` and `seed`, `low` and `high`; where an arm has several
seeds, the row without a seed is their mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Number:
    """A value of a results file.

    places: names that its data set or task may have. seed: None for a mean over the seeds.
    """

    places: frozenset[str]
    protocol: str
    condition: str
    metric: str
    arm: str
    seed: int | None
    value: float
    half: float | None

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" seed {self.seed}"
        places = "/".join(sorted(self.places))
        return f"{self.arm}{seed} | {self.protocol} | {self.metric} | {self.condition} | {places}"


@dataclass(frozen=True)
class Pair:
    """A number and the nearest of its possible counterparts, None where there is none."""

    old: Number
    new: Number | None

    @property
    def value_difference(self) -> float:
        """The absolute difference of the values, infinite without a counterpart."""
        return float("inf") if self.new is None else _difference(self.old.value, self.new.value)

    @property
    def half_difference(self) -> float:
        """The absolute difference of the half widths of the intervals, 0 where either is missing.

        Over all seeds an interval now contains their spread; those of the seeds are compared.
        """
        if self.new is None or self.old.half is None or self.new.half is None or self.old.seed is None:
            return 0.0
        return _difference(self.old.half, self.new.half)


def results(run: Path) -> list[Number]:
    """Return the numbers of a run over all seeds of an arm."""
    numbers = [_number(line) for line in _lines(run / "results.jsonl")]
    means = {_group(number) for number in numbers if number.seed is None}
    return [number for number in numbers if number.seed is None or _group(number) not in means]


def results_by_seed(run: Path) -> list[Number]:
    """Return the numbers of each seed: rows of results.jsonl, or in version 0.1.0 the lines of a separate file.

    A study with a single seed, and a model that no arm trains, have only a row without a seed.
    """
    lines = _lines(run / "results.jsonl")
    if any("arm" in line for line in lines):
        return [_number(line) for line in lines]
    return [_number(line, by_seed=True) for path in sorted(run.glob("*seeds.jsonl")) for line in _lines(path)]


def pair_up(old: Sequence[Number], new: Sequence[Number]) -> list[Pair]:
    """Return for every old number the nearest new number of the same arm, seed, condition and data or task.

    Protocol and metric restrict the choice where both versions have the same names.
    """
    return [Pair(number, _counterpart(number, new)) for number in old]


def _counterpart(old: Number, new: Sequence[Number]) -> Number | None:
    """Return the nearest new number that may be the same as an old one, None where there is none."""
    candidates = [
        number
        for number in new
        if (number.arm, number.condition) == (old.arm, old.condition)
        and number.places & old.places
        and (old.seed is None or number.seed in (old.seed, None))
    ]
    criteria: list[Callable[[Number], bool]] = [
        lambda number: number.seed == old.seed,
        lambda number: number.protocol == old.protocol,
        lambda number: number.metric == old.metric,
        lambda number: _words(number.metric) <= _words(old.metric) or _words(old.metric) <= _words(number.metric),
    ]
    for matches in criteria:
        candidates = [number for number in candidates if matches(number)] or candidates
    return min(candidates, key=lambda number: _difference(old.value, number.value), default=None)


def _number(line: dict[str, Any], by_seed: bool = False) -> Number:
    later = "arm" in line and "low" in line
    metric = line.get("metric") or line.get("measure") or "accuracy"
    named = [line.get("data"), line.get("task"), line.get("data") and f"{line['data']}:{line.get('split', '')}"]
    if not later and not by_seed and ":" in line["protocol"]:
        named.append(line["protocol"].partition(":")[0])  # the task of a language model
    if "delta_m" in f"{metric} {line.get('task')}":
        named.append("delta_m")
    half = line.get("ci95")
    if later and line["low"] is not None and line["high"] is not None:
        half = max(line["high"] - line["value"], line["value"] - line["low"])
    return Number(
        frozenset(place for name in named if name for place in _places(str(name))),
        str(line.get("protocol", "")),
        line.get("condition", "clean"),
        metric,
        line.get("arm") or line["model"],
        line.get("seed") if later or by_seed else None,
        line["value"],
        half,
    )


def _places(name: str) -> set[str]:
    """Return a name as few-shot rows write it, with and without split and folder, which old rows have before the card."""
    card = name.partition(":")[0]
    variants = (name, card, card.rpartition("/")[2], name.removeprefix("sets-"))
    return {re.sub(r"[:/]", "-", variant).strip("-") for variant in variants}


def _words(metric: str) -> set[str]:
    return set(re.findall(r"[\w@-]+", metric.lower()))


def _group(number: Number) -> tuple[object, ...]:
    return number.places, number.protocol, number.condition, number.metric, number.arm


def _difference(first: float, second: float) -> float:
    """Return the absolute difference, 0 for two NaN or equal infinities."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    return abs(first - second)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
