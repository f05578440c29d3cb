"""What a report shows of a dense run beside its results: spread over seeds, paired differences, rates, merging, panels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismt.config import read_yaml
from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.jobs.dense.config import DELTA, PANELS, SEEDS
from vismt.jobs.dense.figures import predictions_figure
from vismt.jobs.fewshot.report import Picture
from vismt.multitask.tasks import TASKS
from vismt.multitask.tasks.segmentation import Segmentation
from vismt.report import study_figures
from vismt.report.comparison import aligned, episodes_of, is_share
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
from vismt.report.study_figures import SeedsPanel
from vismt.report.tables import Table, number_text, scale_text
from vismt.stats import mean_interval

FIELDS, ROW = (
    ("arm", "seed", "lr", "task", "value", "n"),
    ("data", "protocol", "condition", "metric", "model", "value", "n"),
)
ARROWS = "↓ lower is better, ↑ higher is better."
SEED_NOTE = (
    f"{ARROWS} Mean over the training seeds ± half width of its 95 % interval (Student's t), and the same of the difference to "
    "{other}, seed by seed; delta_m is a difference itself. The tables of results say how sure the test images make a number; "
    "this one, how sure the seeds do."
)
IMAGES_NOTE = (
    f"{ARROWS} The later arm minus the earlier one on the same images, averaged over the seeds, with the 95 % interval over the "
    "images (jackknife: an image counts by what it does to the pooled score). Many pairs: of twenty true zeros one is expected "
    "to look like a difference."
)
OVER_SEEDS_NOTE = f"{ARROWS} The same differences seed by seed, with the 95 % interval over the seeds (Student's t)."
RATE_NOTE = (
    "Geometric mean over the arm's tasks of the score on the validation images, 1 / score where lower is better, "
    f"{RATE_RULE} Arms with other tasks have other units: compare within a row."
)
MERGE_NOTE = (
    "Every test image through the merged stock model and through the unmerged one. Largest relative difference: of an output, "
    "relative to the largest output of its task, in the task where it is largest."
)
CURVES_CAPTION = (
    f"{TRAINING_CAPTION} The first panel is what is minimised: weighted losses of the arm's tasks, as balanced, and the pull of "
    "retaining; arms with other tasks have another sum. Losses of tasks are without their weight."
)
PANEL_CAPTION = (
    "Evaluated images evenly over the set, not chosen by result; predictions of the first seed, merged. Below each the score of "
    "this image alone, – where it has none. Depth in the colours of its truth. Dark grey: no value. An empty place: the arm does "
    "not train the task."
)


@dataclass(frozen=True)
class Score:
    """One task, or delta_m, of a run: rows of results.jsonl and values by seed, {(arm, seed): value}."""

    task: str
    rows: dict[str, dict[str, Any]]
    values: dict[tuple[str, int], float]

    @property
    def metric(self) -> str:
        return next(iter(self.rows.values()))["metric"]

    @property
    def lower_is_better(self) -> bool:
        return bool(next(iter(self.rows.values())).get("lower_is_better"))

    @property
    def told(self) -> str:
        return scale_text(self.metric, self.lower_is_better)

    @property
    def count(self) -> str:
        """Of images, over all arms."""
        counts = {row["n"] for row in self.rows.values()}
        return " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))

    def interval(self, mean: float, half: float, sign: bool = False) -> str:
        """Mean ± half width, as exact as a half width of two digits, at least one behind the point."""
        if is_share(self.metric) or not half:
            return f"{number_text(mean, self.metric, sign)} ± {number_text(half, self.metric)}"
        digits = max(1, 1 - math.floor(math.log10(half)))
        return f"{mean:{'+' if sign else ''}.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def dense_curves(folder: Path) -> list[Picture]:
    """The arms seed by seed and their training, as far as the run left the files."""
    lines, scores = _read(folder)
    pictures, arms = [], list(dict.fromkeys(line["arm"] for line in lines))
    if scores:
        path = study_figures.seeds_figure(
            [_seeds_panel(score) for score in scores], arms, folder / "figures" / "seeds.png"
        )
        pictures.append(Picture(path, "Arms by seed", f"{SEEDS_CAPTION} n counts images. {ARROWS}"))
    logs = training_logs(folder, lines)
    if logs:
        tasks = {score.task: f"{score.task}: training loss" for score in scores if score.task != DELTA}
        titles = {"loss": "Training loss of all tasks", **tasks, "fade": "Router fade"}
        path = study_figures.curves_figure(logs, titles, folder / "figures" / "training.png")
        pictures.append(Picture(path, "Training", CURVES_CAPTION))
    return pictures


def dense_panels(folder: Path) -> list[Picture]:
    """Images with their truth and every arm's predictions."""
    if not (folder / PANELS).exists():
        return []
    path = predictions_figure(folder / PANELS, folder / "figures" / "predictions.png")
    return [Picture(path, "Predictions", PANEL_CAPTION, IMAGES)]


def dense_tables(folder: Path) -> list[tuple[Table, str]]:
    """Tables with their notes, as far as the run left the files; UserError for files that were changed by hand."""
    lines, scores = _read(folder)
    if not scores:
        return []
    arms, seeds = (list(dict.fromkeys(line[name] for line in lines)) for name in ("arm", "seed"))
    merging = merge_files(folder, arms)
    classes = any(
        issubclass(TASKS[task], Segmentation) for told in merging.values() for task in told[0].get("tasks", ())
    )
    images = {score.task: {arm: episodes_of(folder, row) for arm, row in score.rows.items()} for score in scores}
    return [
        *_by_seed(folder, scores, seeds),
        *_pairs(
            "Paired differences over images", arms, scores, lambda *pair: _over_images(images, *pair), IMAGES_NOTE, True
        ),
        *_pairs(
            f"Paired differences over {len(seeds)} seeds",
            arms,
            scores,
            lambda *pair: _over_seeds(seeds, *pair),
            OVER_SEEDS_NOTE,
        ),
        *((table, RATE_NOTE) for table in rates_table(folder, arms, lambda value: f"{value:.4g}")),
        *((table, MERGE_NOTE) for table in merge_table(merging, "pixels whose class differs" * classes)),
    ]


def _read(folder: Path) -> tuple[list[dict[str, Any]], list[Score]]:
    """The lines by seed and the scores, delta_m last."""
    lines = read_lines(folder / SEEDS, FIELDS)
    rows = read_lines(folder / "results.jsonl", ROW) if lines else []
    scores = []
    for task in sorted(dict.fromkeys(line["task"] for line in lines), key=lambda task: task == DELTA):
        # The metric of a row begins with its task.
        own = {
            row["model"]: row for row in rows if row["metric"].partition(" ")[0] == task and row["condition"] == "clean"
        }
        values = {(line["arm"], line["seed"]): line["value"] for line in lines if line["task"] == task}
        seeds = {line["seed"] for line in lines}
        if {(arm, seed) for arm in own for seed in seeds} != set(values):
            raise UserError(
                f"report: {SEEDS} lacks a seed or an arm of {task}; `vismt evaluate {folder}` writes it anew."
            )
        scores.append(Score(task, own, values))
    return lines, scores


def _seeds_panel(score: Score) -> SeedsPanel:
    share = is_share(score.metric)
    told = "% over the baseline ↑" if score.task == DELTA else score.told.removeprefix(f"{score.task} ")
    values = {key: (100 if share else 1) * value for key, value in score.values.items()}
    digits = ".1f" if share or score.task == DELTA else ".3g"
    return SeedsPanel(f"{score.task}, n = {score.count}", told, values, digits)


def _by_seed(folder: Path, scores: Sequence[Score], seeds: Sequence[int]) -> list[tuple[Table, str]]:
    """A row for each task and arm."""
    if len(seeds) < 2:
        return []
    config = folder / "config.resolved.yaml"
    baseline = (read_yaml(config) if config.exists() else {}).get("baseline")
    rows, best = [], set()
    for score in scores:
        means = {arm: math.fsum(score.values[arm, seed] for seed in seeds) for arm in score.rows}
        first = min(means, key=means.get) if score.lower_is_better else max(means, key=means.get)
        base = baseline.get(score.task) if isinstance(baseline, Mapping) else baseline
        base = base if base in score.rows or score.task == DELTA else next(iter(score.rows))
        for arm in score.rows:
            own = [score.values[arm, seed] for seed in seeds]
            difference = "–"
            if arm != base and base in score.rows:
                apart = [value - score.values[base, seed] for value, seed in zip(own, seeds, strict=True)]
                difference = score.interval(*seeds_interval(apart), sign=True)
            best |= {(len(rows), 2 + len(seeds))} if arm == first and len(means) > 1 else set()
            numbers = [number_text(value, score.metric) for value in own]
            rows.append([score.told, arm, *numbers, score.interval(*seeds_interval(own)), difference])
    other = "baseline" if baseline else "first arm"
    heads = ["Score", "Arm", *(f"seed {seed}" for seed in seeds), "mean", f"− {other}"]
    named = (
        f"the arm that is the task's baseline ({_baselines(baseline)})"
        if baseline
        else "the first arm that trains the task"
    )
    return [(Table(f"By seed, {len(seeds)} seeds", heads, rows, best), SEED_NOTE.format(other=named))]


def _baselines(baseline: Any) -> str:
    return (
        ", ".join(f"{task}: {arm}" for task, arm in baseline.items())
        if isinstance(baseline, Mapping)
        else str(baseline)
    )


def _pairs(
    title: str,
    arms: Sequence[str],
    scores: Sequence[Score],
    cell: Callable[[Score, str, str], str],
    note: str,
    counted: bool = False,
) -> list[tuple[Table, str]]:
    """A row for each two arms that have a score in common. cell(score, later arm, earlier arm): the text, "" for none."""
    rows = []
    for first, second in itertools.combinations(arms, 2):
        texts = [cell(score, second, first) if {first, second} <= set(score.rows) else "" for score in scores]
        if any(texts):
            rows.append([f"{second} − {first}", *(text or "–" for text in texts)])
    heads = ["Arms", *(f"{score.told}{f', n = {score.count}' * counted}" for score in scores)]
    return [(Table(title, heads, rows, set(), texts=1), note)] if rows else []


def _over_images(images: Mapping[str, Mapping[str, Any]], score: Score, later: str, earlier: str) -> str:
    both = aligned(images[score.task][later], images[score.task][earlier])
    if both is None:
        return ""
    return score.interval(*mean_interval([one - other for one, other in zip(*both, strict=True)]), sign=True)


def _over_seeds(seeds: Sequence[int], score: Score, later: str, earlier: str) -> str:
    if len(seeds) < 2:
        return ""
    return score.interval(
        *seeds_interval([score.values[later, s] - score.values[earlier, s] for s in seeds]), sign=True
    )
