"""What reports of runs with arms share: spread over seeds, logs of training, choice of the rate, exactness of merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vismt.engine.arms import CHOSEN, unit_folder
from vismt.engine.log import METRICS, read_lines
from vismt.engine.study_files import MERGE
from vismt.files import read_json
from vismt.report.tables import Table

RATE_RULE = (
    "of the first seed trained at each rate. Every arm has the same grid, the best rate is kept for all seeds, no test image "
    "takes part. A best rate at an end of the grid is no optimum."
)
SEEDS_CAPTION = (
    "Dots of one seed are joined; bar and number are the mean over seeds. Each panel has its own scale, which does not begin "
    "at 0."
)
TRAINING_CAPTION = "First seed of each arm. Thin: as logged. Thick: running mean over a twentieth of the run."


def seeds_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval by Student's t) of two or more values, one for each seed."""
    from scipy.stats import t as student

    n, mean = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def training_logs(folder: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The logged steps of each arm's first seed, as far as they are there. lines: with arm, lr and seed, the first seed first."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["arm"] not in logs:
            logs[line["arm"]] = read_lines(
                unit_folder(folder, line["arm"], line["lr"], line["seed"]) / METRICS, ("step",)
            )
    return {arm: rows for arm, rows in logs.items() if rows}


def rates_table(folder: Path, arms: Sequence[str], text: Callable[[float], str]) -> list[Table]:
    """The validation score of every arm at every rate, the choice marked; no table where nothing was chosen."""
    found = {}
    for arm in arms:
        path = folder / "arms" / arm / CHOSEN
        told = read_json(path, f"run '{folder}': {CHOSEN} of arm '{arm}'") if path.exists() else {}
        if told.get("validation"):
            found[arm] = (f"{told['lr']:g}", told["validation"])
    if not found:
        return []
    rates = sorted({rate for _, tried in found.values() for rate in tried}, key=float)
    best = {(row, 1 + rates.index(chosen)) for row, (chosen, _) in enumerate(found.values())}
    rows = []
    for arm, (chosen, tried) in found.items():
        scores = [
            "–" if rate not in tried else "diverged" if tried[rate] is None else text(tried[rate]) for rate in rates
        ]
        rows.append([arm, *scores, chosen])
    return [Table("Choice of the rate", ["Arm", *rates, "chosen"], rows, best, texts=1)]


def merge_files(folder: Path, arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """merge.json of every training by arm, for arms that have one."""
    found = {
        arm: [
            read_json(path, f"run '{folder}': {MERGE}") for path in sorted((folder / "arms" / arm).glob(f"*/{MERGE}"))
        ]
        for arm in arms
    }
    return {arm: told for arm, told in found.items() if told}


def merge_table(found: Mapping[str, Sequence[Mapping[str, Any]]], different: str, unit: str = "images") -> list[Table]:
    """How far the merged nets are from the unmerged ones. different: the head over the answers that differ, "" for no column."""
    rows = []
    for arm, told in found.items():
        ratio = max(one["largest_difference"] / one["largest_logit"] for one in told)
        answers = [f"{sum(one['different_predictions'] for one in told):,}"] if different else []
        rows.append([arm, str(len(told)), f"{sum(one['n'] for one in told):,}", *answers, f"{ratio:.1e}"])
    heads = ["Arm", "trainings", unit, *[different] * bool(different), "largest relative difference"]
    return [Table("Merging", heads, rows, set(), texts=1)] if rows else []
