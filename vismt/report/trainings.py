"""The sections about the trainings of a run: choice of the rate, curves, merging, changes of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismt.engine.log import METRICS
from vismt.engine.study import ARMS, CHOSEN, chosen_trainings, read_choice
from vismt.engine.training_files import DONE, MERGE
from vismt.report import arm_figures
from vismt.report.tables import Picture, Section, Table
from vismt.report.weight_changes import changes_section
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines

RATE_NOTE = (
    "Score of the first seed at each rate on the validation examples; higher is better. Every arm has the same grid and keeps "
    "its best rate for all seeds; test examples take no part. A best rate at an end of the grid may not be the optimum."
)
MERGE_NOTE = (
    "The merged stock model against the unmerged one on some test examples of each set: answers that differ, and the largest "
    "difference of an output relative to the largest output."
)
MERGE_TYPES = {"n": int, "different_predictions": int, "largest_difference": float, "largest_logit": float}
MERGE_MAY = {"outputs": dict[str, dict[str, float]]}  # files of an earlier version have none
TRAINING_CAPTION = "First seed of each arm. Thin: logged values. Thick: running mean over a twentieth of the run."


def training_sections(folder: Path, arms: Sequence[str], seed: int, logged: Mapping[str, str]) -> list[Section]:
    """Return the sections about the trainings of a run, as far as the run left the files.

    seed: of the trainings whose curves are drawn. logged: titles of the drawn columns.
    """
    return [
        Section("Training", _rates(folder, arms), _curves(folder, arms, seed, logged)),
        Section("Merging", _merging(folder, arms)),
        changes_section(folder, arms),
    ]


def training_cost(folder: Path, arm: str) -> dict[str, float]:
    """Return rate and number of trained parameters of an arm's first training; {} without one."""
    trained = next((path for path in chosen_trainings(folder, arm).values() if (path / DONE).exists()), None)
    if trained is None:
        return {}
    return {
        "lr": read_choice(folder, arm).lr,
        "trained": float(read_sealed(trained / DONE, f"run '{folder}'", {"trainable": int})["trainable"]),
    }


def _rates(folder: Path, arms: Sequence[str]) -> list[tuple[Table, str]]:
    """Return the validation score of every arm at every rate, the choice marked; nothing where nothing was chosen."""
    choices = {arm: read_choice(folder, arm) for arm in arms if (folder / ARMS / arm / CHOSEN).exists()}
    choices = {arm: choice for arm, choice in choices.items() if choice.validation}
    rates = sorted({rate for choice in choices.values() for rate in choice.validation}, key=float)
    if not rates:
        return []
    best = {(row, 1 + rates.index(f"{choice.lr:g}")) for row, choice in enumerate(choices.values())}
    rows = []
    for arm, choice in choices.items():
        texts = {rate: "diverged" if score is None else f"{score:.4g}" for rate, score in choice.validation.items()}
        rows.append([arm, *(texts.get(rate, "–") for rate in rates), f"{choice.lr:g}"])
    return [(Table("Choice of the rate", ["Arm", *rates, "chosen"], rows, best, texts=1), RATE_NOTE)]


def _curves(folder: Path, arms: Sequence[str], seed: int, logged: Mapping[str, str]) -> list[Picture]:
    """Draw what a seed of each arm has logged at the chosen rate; arms without a choice are left out."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        first = chosen_trainings(folder, arm).get(seed)
        values = dict.fromkeys(logged, float | None)
        rows = read_lines(first / METRICS, {"step": int}, values) if first is not None else []
        if rows:
            logs[arm] = rows
    drawn = [name for name in logged if name != "fade"]
    if not any(row.get(name) is not None for rows in logs.values() for row in rows for name in drawn):
        return []
    path = arm_figures.curves_figure(logs, logged, folder / "figures" / "training.svg")
    return [Picture(path, "Training", TRAINING_CAPTION)]


def _merging(folder: Path, arms: Sequence[str]) -> list[tuple[Table, str]]:
    """Return how far the merged nets are from the unmerged ones, from merge.json of every training."""
    rows = []
    for arm in arms:
        paths = sorted((folder / ARMS / arm).glob(f"*/{MERGE}"))
        checks = [read_sealed(path, f"run '{folder}'", MERGE_TYPES, MERGE_MAY) for path in paths]
        if checks:
            ratio = max(check["largest_difference"] / max(check["largest_logit"], 1e-12) for check in checks)
            n = sum(check["n"] for check in checks)
            outputs = [output for check in checks for output in check.get("outputs", {}).values()]
            answers = not outputs or any("different" in output for output in outputs)
            different = f"{sum(check['different_predictions'] for check in checks):,}" if answers else "–"
            rows.append([arm, str(len(checks)), f"{n:,}", different, f"{ratio:.1e}"])
    heads = ["Arm", "trainings", "examples", "answers that differ", "largest relative difference"]
    return [(Table("Merged and unmerged", heads, rows, set(), texts=1), MERGE_NOTE)] if rows else []
