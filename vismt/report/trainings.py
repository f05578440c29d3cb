"""The sections about the trainings of a run: scores and costs, curves, choice of the rate, merging, changes of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vismt.engine.log import METRICS
from vismt.engine.study import ARMS, CHOSEN, chosen_trainings, read_choice
from vismt.engine.training_files import DONE, MERGE, VALIDATION_FILE
from vismt.report import arm_figures
from vismt.report.comparison import Comparison, key_comparisons
from vismt.report.conclusion import criterion_names
from vismt.report.tables import Picture, Section, Table, cell_text, scale_text
from vismt.report.weight_changes import changes_section
from vismt.storage.files import JsonObject, read_sealed
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
MERGE_MAY = {"outputs": dict[str, dict[str, float]]}
TRAINING_CAPTION = "First seed of each arm. Thin: logged values. Thick: running mean over a twentieth of the run."
VALIDATION_CAPTION = (
    "The validation score is of the weights at a checkpoint on the validation examples. Higher is better."
)
RATES_CAPTION = "Score of the first seed on the validation examples, by the learning rate. Higher is better."
COST_NOTE = (
    "Costs are those of training one seed at the chosen learning rate. The time is that of the steps. The memory is the largest "
    "that the GPU had allocated, on a CPU the largest resident memory of the process with its libraries and data."
)
COST_CAPTION = (
    "Whiskers: 95 % intervals of the scores. Two of them may overlap although the models are shown to differ."
)
UNFINISHED_NOTE = (
    "The run is not finished: `vismt run` with the same arguments continues it. The curves show the steps so far."
)
METRICS_TYPES = {"elapsed_s": float, "memory_mb": float}


@dataclass(frozen=True)
class Cost:
    """What the training of an arm took.

    Args:
        lr: Learning rate.
        edge: End of the tried rates at which it is, "lowest" or "highest". "" for neither.
        trained: Number of trained parameters.
        seconds: Time of the steps, the mean over the seeds. None if it is not known.
        memory_mb: Largest memory in MB of any seed. None if it is not known.
    """

    lr: float
    edge: str
    trained: int
    seconds: float | None = None
    memory_mb: float | None = None


def read_costs(folder: Path, arms: Sequence[str]) -> dict[str, Cost]:
    """Return what the finished trainings of arms took, by arm."""
    costs = {}
    for arm in arms:
        done = [path for path in chosen_trainings(folder, arm).values() if (path / DONE).exists()]
        if not done:
            continue
        choice = read_choice(folder, arm)
        rates = sorted(map(float, choice.validation))
        ends = dict(zip((rates[0], rates[-1]), ("lowest", "highest"), strict=True)) if len(rates) > 1 else {}
        logs = [read_lines(path / METRICS, {"step": int}, METRICS_TYPES) for path in done]
        seconds = [float(rows[-1]["elapsed_s"]) for rows in logs if rows and "elapsed_s" in rows[-1]]
        memory = [float(row["memory_mb"]) for rows in logs for row in rows if "memory_mb" in row]
        costs[arm] = Cost(
            choice.lr,
            ends.get(choice.lr, ""),
            int(read_sealed(done[0] / DONE, f"run '{folder}'", {"trainable": int})["trainable"]),
            fmean(seconds) if seconds else None,
            max(memory, default=None),
        )
    return costs


def cost_section(folder: Path, comparisons: Sequence[Comparison], costs: Mapping[str, Cost]) -> Section:
    """Return the section with the scores of the models beside what their trainings took.

    costs: Costs by model.
    """
    keys = key_comparisons(comparisons)
    names = dict.fromkeys([*(name for c in keys for name in c.cells), *costs])
    seconds, unit = 1.0, "s"
    longest = max((cost.seconds or 0.0 for cost in costs.values()), default=0.0)
    for size, name in ((60.0, "min"), (3600.0, "h")):
        if longest > 2 * size:
            seconds, unit = size, name
    columns: dict[str, dict[str, float]] = {
        "trained parameters": {arm: cost.trained for arm, cost in costs.items()},
        f"time in {unit}": {arm: cost.seconds / seconds for arm, cost in costs.items() if cost.seconds},
        "memory in MB": {arm: cost.memory_mb for arm, cost in costs.items() if cost.memory_mb},
    }
    columns = {name: values for name, values in columns.items() if values}
    if not keys or not columns:
        return Section("Scores and costs")
    named = zip(criterion_names(keys), keys, strict=True)
    heads = [
        scale_text("".join([name, *c.row.metric.partition(" in ")[1:]]), c.row.scale, c.row.better) for name, c in named
    ]
    rows = []
    for name in names:
        cost = costs.get(name)
        rate = "–" if cost is None else f"{cost.lr:g}" + (f" ({cost.edge} of its grid)" if cost.edge else "")
        found = [values.get(name) for values in columns.values()]
        numbers = ["–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in found]
        rows.append([name, *(cell_text(c.cells.get(name), c.row) for c in keys), *numbers, rate])
    best = {
        (row, 1 + column)
        for row, name in enumerate(names)
        for column, c in enumerate(keys)
        if name in c.cells and c.cells[name].mark == "best"
    }
    table = Table("Models", ["Model", *heads, *columns, "learning rate"], rows, best, texts=1)
    pictures = []
    for number, (name, values) in enumerate(columns.items()):
        drawn = {arm: value for arm, value in values.items() if arm in keys[0].cells}
        if len({*drawn.values()}) > 1:
            path = arm_figures.cost_figure(keys[0], drawn, (heads[0], name), folder / "figures" / f"cost-{number}.svg")
            pictures.append(Picture(path, f"Score by {name}", COST_CAPTION))
    return Section("Scores and costs", [(table, COST_NOTE)], pictures)


def training_sections(folder: Path, arms: Sequence[str], seed: int, logged: Mapping[str, str]) -> list[Section]:
    """Return the sections about the trainings of a run, as far as the run left the files.

    seed: Seed of the trainings whose curves are drawn. logged: Titles of the drawn columns.
    """
    return [
        Section("Training", _rates(folder, arms), [*_curves(folder, arms, seed, logged), *_rate_curves(folder, arms)]),
        Section("Merging", _merging(folder, arms)),
        changes_section(folder, arms),
    ]


def _rates(folder: Path, arms: Sequence[str]) -> list[tuple[Table, str]]:
    """Return the validation score of every arm at every rate, with the choice marked. Return nothing if nothing was chosen."""
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
    """Draw what a seed of each arm has logged at the chosen rate. Before the choice, draw the newest training."""
    logs: dict[str, list[JsonObject]] = {}
    for arm in arms:
        begun = sorted((folder / ARMS / arm).glob(f"lr-*-seed-{seed}/{METRICS}"), key=lambda path: path.stat().st_mtime)
        first = chosen_trainings(folder, arm).get(seed, begun[-1].parent if begun else None)
        values = dict.fromkeys(logged, float | None)
        if first is not None and (rows := read_lines(first / METRICS, {"step": int}, values)):
            logs[arm] = rows + read_lines(first / VALIDATION_FILE, {"step": int, "validation": float}, whole=True)
    drawn = [name for name in logged if name != "fade"]
    if not any(row.get(name) is not None for rows in logs.values() for row in rows for name in drawn):
        return []
    titles = {"validation": "Validation score", **logged}
    path = arm_figures.curves_figure(logs, titles, folder / "figures" / "training.svg")
    validated = any("validation" in row for rows in logs.values() for row in rows)
    caption = " ".join([TRAINING_CAPTION, *([VALIDATION_CAPTION] if validated else [])])
    return [Picture(path, "Training", caption)]


def _rate_curves(folder: Path, arms: Sequence[str]) -> list[Picture]:
    """Draw the validation score of every arm by the learning rate, if several rates were tried."""
    scores = {}
    for arm in arms:
        if (folder / ARMS / arm / CHOSEN).exists():
            tried = read_choice(folder, arm).validation
            scores[arm] = {float(rate): score for rate, score in tried.items() if score is not None}
    if all(len(of_arm) < 2 for of_arm in scores.values()):
        return []
    path = arm_figures.rates_figure(scores, folder / "figures" / "rates.svg")
    return [Picture(path, "Validation", RATES_CAPTION)]


def progress_section(folder: Path, steps: Mapping[str, int]) -> Section:
    """Return the section about the trainings that a run has begun.

    steps: Number of steps of the whole training of each arm.
    """
    rows = []
    for arm, last in steps.items():
        for path in sorted((folder / ARMS / arm).glob(f"lr-*/{METRICS}")):
            logged = read_lines(path, {"step": int}, {"loss": float | None})
            if logged:
                loss = logged[-1].get("loss")
                at = f"{logged[-1]['step']:,} of {last:,}"
                rows.append([arm, path.parent.name, at, "–" if loss is None else f"{loss:.4g}"])
    table = Table("Trainings so far", ["Arm", "training", "step", "loss"], rows, set())
    return Section("Progress", [(table, UNFINISHED_NOTE)] if rows else [])


def _merging(folder: Path, arms: Sequence[str]) -> list[tuple[Table, str]]:
    """Return how far the merged nets are from the unmerged nets, from merge.json of every training."""
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
