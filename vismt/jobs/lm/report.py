"""What a report shows of a language-model run beside its results: arms by seed, training, what was forgotten, merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from vismt.config import read_yaml
from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.jobs.fewshot.report import Picture
from vismt.jobs.lm.config import FROZEN, REFERENCES
from vismt.jobs.lm.evaluation import SEEDS
from vismt.jobs.lm.figures import Point, forgetting_figure
from vismt.report import study_figures
from vismt.report.comparison import is_share
from vismt.report.study import (
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

FIELDS = ("arm", "seed", "lr", "task", "data", "condition", "metric", "value", "n", "lower_is_better", "tokens")
SEED_NOTE = (
    "A value for each training seed, and their mean ± half width of its 95 % interval (Student's t) where there are two or "
    "more; in brackets Wilson's 95 % interval of a share of rows. Tokens are those that count, over all rows: a perplexity is "
    "e to the nats a token over all of them."
)
RATE_NOTE = (
    "e to the minus NLL on validation rows (a token for causal tasks), in %, of the first seed trained at each rate; the share "
    "of right answers for generation. Every arm has the same grid, the best rate is kept for all seeds, no test row takes part. "
    "A best rate at an end of the grid is no optimum."
)
MERGE_NOTE = (
    "The logits of rows' last tokens from the merged LM and from the unmerged one: most likely tokens that differ, and the "
    "largest difference relative to the largest logit. A base in bfloat16 rounds the merged weights."
)
PERPLEXITY = "perplexity"
FORGETTING_CAPTION = (
    "A dot for each training, squares and a line for the means over seeds of arms that differ in the rate alone, which stands "
    "beside them. Compare at equal values of the trained task: a method forgets less where its line lies lower. Dashed: the "
    "model before training, where it is within the picture."
)
LOGGED = {
    "loss": "Training loss",
    "kl": "KL of the last layer's posterior",
    "infeasibility": "Infeasibility of the factors",
    "stable_rank": "Stable rank of the updates",
}


def lm_curves(folder: Path) -> list[Picture]:
    """The arms seed by seed, their training, and what they forgot, as far as the run left the files."""
    lines = read_lines(folder / SEEDS, FIELDS)
    if not lines:
        return []
    config = folder / "config.resolved.yaml"
    sections = (read_yaml(config) if config.exists() else {}).get("tasks") or []
    trained = next((section["name"] for section in sections if section.get("train")), None)
    plain = [line for line in lines if line["condition"] == "clean"]
    arms = list(dict.fromkeys(line["arm"] for line in plain if line["arm"] not in REFERENCES))
    if not arms or trained not in {line["task"] for line in plain}:
        return []
    panels = _panels(plain, trained)
    path = study_figures.seeds_figure(panels, arms, folder / "figures" / "seeds.png")
    pictures = [Picture(path, "Arms by seed", f"{SEEDS_CAPTION} n counts rows. ↓ lower is better, ↑ higher is better.")]
    logs = training_logs(folder, [line for line in plain if line["arm"] not in REFERENCES])
    if logs:
        path = study_figures.curves_figure(logs, LOGGED, folder / "figures" / "training.png")
        pictures.append(Picture(path, "Training", TRAINING_CAPTION))
    others = dict.fromkeys((line["task"], line["data"]) for line in plain if line["metric"] == PERPLEXITY)
    for number, (task, data) in enumerate(other for other in others if other[0] != trained):
        path = folder / "figures" / f"forgetting-{number}.png"
        _forgetting(folder, plain, trained, (task, data), path)
        pictures.append(Picture(path, f"Forgetting of {data}", FORGETTING_CAPTION))
    return pictures


def _panels(lines: Sequence[Mapping[str, Any]], trained: str) -> list[SeedsPanel]:
    """Every measure of the trained task, and the perplexity of others, on their first set."""
    first = {line["task"]: line["data"] for line in reversed(lines)}
    shown = [line for line in lines if line["data"] == first[line["task"]] and line["arm"] not in REFERENCES]
    shown = [line for line in shown if line["task"] == trained or line["metric"] == PERPLEXITY]
    panels = []
    for task, metric in dict.fromkeys((line["task"], line["metric"]) for line in shown):
        own = [line for line in shown if (line["task"], line["metric"]) == (task, metric)]
        share = is_share(metric)
        values = {(line["arm"], line["seed"]): (100 if share else 1) * line["value"] for line in own}
        told = scale_text(metric, own[0]["lower_is_better"])
        panels.append(SeedsPanel(f"{first[task]}, n = {own[0]['n']:,}", told, values, ".1f" if share else ".3g"))
    return panels


def _forgetting(
    folder: Path, lines: Sequence[Mapping[str, Any]], trained: str, other: tuple[str, str], path: Path
) -> None:
    """The figure of one set that was not trained on."""
    own = next(line for line in lines if line["task"] == trained)
    score = {
        (line["arm"], line["seed"]): line
        for line in lines
        if (line["task"], line["data"], line["metric"]) == (trained, own["data"], own["metric"])
    }
    texts = {
        (line["arm"], line["seed"]): line
        for line in lines
        if (line["task"], line["data"], line["metric"]) == (*other, PERPLEXITY)
    }
    points = {
        key: Point(line["lr"], key[1], line["value"], texts[key]["value"])
        for key, line in score.items()
        if key in texts
    }
    families: dict[str, list[Point]] = {}
    named = _families(folder)
    for (arm, _), point in points.items():
        if arm not in REFERENCES:
            families.setdefault(named.get(arm, arm), []).append(point)
    frozen = next((point for (arm, _), point in points.items() if arm == FROZEN), None)
    told = f"{trained} on {own['data']}: {scale_text(own['metric'], own['lower_is_better'])}"
    forgetting_figure(families, frozen, told, f"{other[1]}: {PERPLEXITY} ↓", path)


def _families(folder: Path) -> dict[str, str]:
    """Arm -> what the names of the arms have in common that differ from it in the rate alone."""
    arms = read_yaml(folder / "config.resolved.yaml").get("arms") or {}
    groups: dict[str, list[str]] = {}
    for arm, changes in arms.items():
        groups.setdefault(repr(sorted((key, value) for key, value in changes.items() if key != "train.lr")), []).append(
            arm
        )
    found = {}
    for group in groups.values():
        common = "".join(letters[0] for letters in takewhile(lambda one: len(set(one)) == 1, zip(*group)))
        found |= dict.fromkeys(group, common.rstrip("-_ ") or group[0])
    return found


def lm_tables(folder: Path) -> list[tuple[Table, str]]:
    """Tables with their notes, as far as the run left the files; UserError for files that were changed by hand."""
    lines = read_lines(folder / SEEDS, FIELDS)
    if not lines:
        return []
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm not in REFERENCES]
    merging = merge_table(merge_files(folder, arms), "tokens that differ", "rows")
    return [
        *_by_seed(lines),
        *((table, RATE_NOTE) for table in rates_table(folder, arms, lambda value: f"{100 * value:.1f}")),
        *((table, MERGE_NOTE) for table in merging),
    ]


def _by_seed(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Table, str]]:
    """One table for each task, set and condition: a row for each arm and measure."""
    found = []
    for task, data, condition in dict.fromkeys((line["task"], line["data"], line["condition"]) for line in lines):
        own = [line for line in lines if (line["task"], line["data"], line["condition"]) == (task, data, condition)]
        seeds = list(dict.fromkeys(line["seed"] for line in own if line["arm"] not in REFERENCES))
        rows = []
        for metric, arm in dict.fromkeys((line["metric"], line["arm"]) for line in own):
            lines_of = {line["seed"]: line for line in own if (line["metric"], line["arm"]) == (metric, arm)}
            values = {seed: line["value"] for seed, line in lines_of.items()}
            if arm not in REFERENCES and set(values) != set(seeds):
                raise UserError(f"report: {SEEDS} lacks a seed of arm '{arm}'; `vismt evaluate` writes it anew.")
            each = [_one(lines_of[seed], metric) if seed in values else "–" for seed in seeds]
            rates = {line["lr"] for line in own if line["arm"] == arm}
            rate = "–" if arm in REFERENCES else f"{min(rates):g}"
            rows.append([metric, arm, rate, *each, _mean(list(lines_of.values()), metric)])
        tokens = max(line["tokens"] for line in own)
        counted = f", {tokens:,} tokens" if tokens else ""
        title = f"{task} on {data}{'' if condition == 'clean' else f', {condition}'}, n = {own[0]['n']:,}{counted}"
        heads = ["Measure", "Arm", "rate", *(f"seed {seed}" for seed in seeds), "mean"]
        found.append((Table(title, heads, rows, set(), folded=len(rows) > 12), SEED_NOTE))
    return found


def _one(line: Mapping[str, Any], metric: str) -> str:
    """A value, and Wilson's interval where it is a share of rows."""
    low, high = line.get("wilson") or (None, None)
    value = number_text(line["value"], metric)
    return value if low is None else f"{value} [{number_text(low, metric)}, {number_text(high, metric)}]"


def _mean(lines: Sequence[Mapping[str, Any]], metric: str) -> str:
    if len(lines) < 2:
        return _one(lines[0], metric)
    values = [line["value"] for line in lines]
    mean, half = seeds_interval(values)
    return f"{number_text(mean, metric)} ± {number_text(half, metric)}" + " %" * is_share(metric)
