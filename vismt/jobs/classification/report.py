"""What a report shows of a multi-task run beside its results: spread over seeds, choice of the rate, exactness of merging."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismt.engine.log import read_lines, record_stem
from vismt.errors import UserError
from vismt.jobs.classification import figures as multitask_figures
from vismt.jobs.classification.evaluation import SEEDS
from vismt.jobs.classification.panels import EXAMPLES
from vismt.jobs.fewshot.report import Picture
from vismt.report.routers import IMAGES
from vismt.report.study import (
    RATE_RULE,
    SEEDS_CAPTION,
    TRAINING_CAPTION,
    merge_files,
    merge_table,
    rates_table,
    seeds_interval,
    training_logs,
)
from vismt.report.tables import Table
from vismt.stats import domain_average

FIELDS = ("arm", "seed", "lr", "data", "condition", "value", "n")
SEED_NOTE = (
    "Each task weighs the same. Mean over the training seeds ± half width of its 95 % interval (Student's t), and the same of "
    "the difference to the first arm, seed by seed. The table of results says how sure the test images make a number; this one, "
    "how sure the seeds do."
)
PAIR_NOTE = (
    "The later arm minus the earlier one on the same images, each image averaged over the seeds and each task weighing the "
    "same, with the 95 % interval over the images; and seed by seed, with that over the seeds (Student's t). Many pairs: of "
    "twenty true zeros one is expected to look like a difference."
)
RATE_NOTE = f"Mean accuracy over the tasks on their validation images, in %, {RATE_RULE}"
MERGE_NOTE = (
    "Every test image through the merged stock model and through the unmerged one: answers that differ, and the largest "
    "difference of a logit relative to the largest logit."
)

CURVES_CAPTION = f"{TRAINING_CAPTION} Cross-entropy on training batches, without the pull of retaining."
EXAMPLES_CAPTION = (
    "Evaluated images evenly over each task, not chosen by result; answers of the first seed. ✓ right, ✗ wrong; an answer of "
    "another task is named with it."
)


def multitask_curves(folder: Path) -> list[Picture]:
    """The arms seed by seed and their training, as far as the run left the files."""
    lines = [line for line in read_lines(folder / SEEDS, FIELDS) if line["condition"] == "clean"]
    pictures = []
    if lines:
        path = multitask_figures.seeds_figure(lines, folder / "figures" / "seeds.png")
        pictures.append(Picture(path, "Arms by seed", SEEDS_CAPTION))
    logs = training_logs(folder, lines)
    if logs:
        path = multitask_figures.curves_figure(logs, folder / "figures" / "training.png")
        pictures.append(Picture(path, "Training", CURVES_CAPTION))
    return pictures


def multitask_panels(folder: Path) -> list[Picture]:
    """Images with every arm's answer."""
    if not (folder / EXAMPLES).exists():
        return []
    path = multitask_figures.examples_figure(folder / EXAMPLES, folder / "figures" / "examples.png")
    return [Picture(path, "Examples", EXAMPLES_CAPTION, IMAGES)]


def multitask_tables(folder: Path) -> list[tuple[Table, str]]:
    """Tables with their notes, as far as the run left the files; UserError for files that were changed by hand."""
    lines = read_lines(folder / SEEDS, FIELDS)
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    rates = rates_table(folder, arms, lambda value: f"{100 * value:.1f}")
    merging = merge_table(merge_files(folder, arms), "answers that differ")
    return [
        *_by_seed(lines, arms),
        *_pairs(folder, lines, arms),
        *((table, RATE_NOTE) for table in rates),
        *((table, MERGE_NOTE) for table in merging),
    ]


def _by_seed(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[tuple[Table, str]]:
    clean = [line for line in lines if line["condition"] == "clean"]
    seeds = list(dict.fromkeys(line["seed"] for line in clean))
    if len(seeds) < 2:
        return []
    tasks = list(dict.fromkeys(line["data"] for line in clean))
    values = {(line["arm"], line["seed"], line["data"]): line["value"] for line in clean}
    if len(values) != len(arms) * len(seeds) * len(tasks):
        raise UserError(f"report: {SEEDS} lacks a task or seed of an arm; `vismt evaluate` writes it anew.")
    rows, best = [], set()
    means = {arm: [sum(values[arm, seed, task] for task in tasks) / len(tasks) for seed in seeds] for arm in arms}
    highest = max(arms, key=lambda arm: sum(means[arm]))
    for arm in arms:
        by_task = [_spread([values[arm, seed, task] for seed in seeds]) for task in tasks]
        difference = [one - other for one, other in zip(means[arm], means[arms[0]])]
        best |= {(len(rows), 1 + len(tasks) + len(seeds))} if arm == highest else set()
        rows.append(
            [
                arm,
                *by_task,
                *(f"{100 * value:.1f}" for value in means[arm]),
                _spread(means[arm]),
                "–" if arm == arms[0] else _spread(difference, sign=True),
            ]
        )
    heads = ["Arm", *tasks, *(f"mean, seed {seed}" for seed in seeds), "mean", f"− {arms[0]}"]
    return [(Table(f"By seed, accuracy in %, {len(seeds)} seeds", heads, rows, best, texts=1), SEED_NOTE)]


def _pairs(folder: Path, lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[tuple[Table, str]]:
    """Every two arms that were asked the same question (one protocol)."""
    rows = read_lines(folder / "results.jsonl", ("data", "protocol", "model", "condition"))
    asked = {row["model"]: row["protocol"] for row in rows if row["condition"] == "clean"}
    tasks = list(dict.fromkeys(line["data"] for line in lines))
    images = {arm: {task: _images(folder, task, asked.get(arm, ""), arm) for task in tasks} for arm in arms}
    values = {
        (line["arm"], line["seed"], line["data"]): line["value"] for line in lines if line["condition"] == "clean"
    }
    seeds = list(dict.fromkeys(line["seed"] for line in lines))
    told = []
    for first, second in itertools.combinations(arms, 2):
        pairs = {task: (images[second][task], images[first][task]) for task in tasks}
        if asked.get(first) != asked.get(second) or any(
            not one or one.keys() != other.keys() for one, other in pairs.values()
        ):
            continue
        mean, half = domain_average({task: [one[i] - other[i] for i in one] for task, (one, other) in pairs.items()})
        by_seed = [sum(values[second, s, t] - values[first, s, t] for t in tasks) / len(tasks) for s in seeds]
        over_seeds = _spread(by_seed, sign=True) if len(seeds) > 1 else "–"
        told.append([f"{second} − {first}", f"{100 * mean:+.1f} ± {100 * half:.1f}".replace("-", "−"), over_seeds])
    heads = ["Arms", "over images", f"over {len(seeds)} seeds"]
    return [(Table("Paired differences, accuracy in points", heads, told, set(), texts=1), PAIR_NOTE)] if told else []


def _images(folder: Path, task: str, protocol: str, arm: str) -> dict[str, float]:
    """Share of right answers by image, from the record that reproduces the arm's row; empty without one."""
    found = read_lines(folder / "records" / f"{record_stem(task, protocol, arm)}.jsonl")
    return {line["episode"]: float(line["clean"]) for line in found if "episode" in line and "clean" in line}


def _spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean and half width over the seeds, in per cent."""
    mean, half = seeds_interval(values)
    return f"{100 * mean:{'+' if sign else ''}.1f} ± {100 * half:.1f}".replace("-", "−")
