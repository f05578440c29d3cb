"""What a report shows of a language-model run beside its results: values by seed, choice of the rate, what merging did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismt.engine.comparison import is_share
from vismt.engine.lm_config import FROZEN
from vismt.engine.lm_evaluation import SEEDS
from vismt.engine.log import read_lines
from vismt.engine.study_report import merge_files, merge_table, rates_table, seeds_interval
from vismt.engine.tables import Table, number_text
from vismt.errors import UserError

FIELDS = ("arm", "seed", "lr", "task", "data", "condition", "metric", "value", "n", "lower_is_better", "tokens")
SEED_NOTE = (
    "A value for each training seed, and their mean ± half width of its 95 % interval (Student's t) where there are two or "
    "more. Tokens are those that count, over all rows: a perplexity is e to the nats a token over all of them."
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


def lm_tables(folder: Path) -> list[tuple[Table, str]]:
    """Tables with their notes, as far as the run left the files; UserError for files that were changed by hand."""
    lines = read_lines(folder / SEEDS, FIELDS)
    if not lines:
        return []
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != FROZEN]
    merging = merge_table(merge_files(folder, arms), "tokens that differ", "rows")
    return [
        *_by_seed(lines), *((table, RATE_NOTE) for table in rates_table(folder, arms, lambda value: f"{100 * value:.1f}")),
        *((table, MERGE_NOTE) for table in merging),
    ]


def _by_seed(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Table, str]]:
    """One table for each task, set and condition: a row for each arm and measure."""
    found = []
    for task, data, condition in dict.fromkeys((line["task"], line["data"], line["condition"]) for line in lines):
        own = [line for line in lines if (line["task"], line["data"], line["condition"]) == (task, data, condition)]
        seeds = list(dict.fromkeys(line["seed"] for line in own if line["arm"] != FROZEN))
        rows = []
        for metric, arm in dict.fromkeys((line["metric"], line["arm"]) for line in own):
            values = {line["seed"]: line["value"] for line in own if (line["metric"], line["arm"]) == (metric, arm)}
            if arm != FROZEN and set(values) != set(seeds):
                raise UserError(f"report: {SEEDS} lacks a seed of arm '{arm}'; `vismt evaluate` writes it anew.")
            each = [number_text(values[seed], metric) if seed in values else "–" for seed in seeds]
            rates = {line["lr"] for line in own if line["arm"] == arm}
            rows.append([metric, arm, "–" if arm == FROZEN else f"{min(rates):g}", *each, _mean(list(values.values()), metric)])
        tokens = max(line["tokens"] for line in own)
        counted = f", {tokens:,} tokens" if tokens else ""
        title = f"{task} on {data}{'' if condition == 'clean' else f', {condition}'}, n = {own[0]['n']:,}{counted}"
        heads = ["Measure", "Arm", "rate", *(f"seed {seed}" for seed in seeds), "mean"]
        found.append((Table(title, heads, rows, set(), folded=len(rows) > 12), SEED_NOTE))
    return found


def _mean(values: Sequence[float], metric: str) -> str:
    if len(values) < 2:
        return number_text(values[0], metric)
    mean, half = seeds_interval(values)
    return f"{number_text(mean, metric)} ± {number_text(half, metric)}" + " %" * is_share(metric)
