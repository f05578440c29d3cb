"""What a report shows of a pool and of corruptions, from the files of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vismt.config import read_yaml
from vismt.engine.log import METRICS, read_lines, record_stem
from vismt.errors import UserError
from vismt.files import read_json
from vismt.jobs.fewshot import figures as pool_figures
from vismt.metatune.pool import INDEX
from vismt.report.comparison import AVERAGE, Comparison
from vismt.report.tables import split_corruptions

FINETUNE = "+finetune"


@dataclass(frozen=True)
class Picture:
    """A PNG inside the run folder and what to say of it; section: the heading that a panel stands under."""

    path: Path
    title: str
    caption: str
    section: str = ""


def pool_pictures(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Training curves of the experts and the mixture per domain, as far as the run left them."""
    labels = _labels(folder)
    return [*_expert_curves(folder, labels), *_mixtures(folder, results, labels)]


def corruption_pictures(folder: Path, comparisons: Sequence[Comparison]) -> list[Picture]:
    """Accuracy against severity, one picture for each protocol; the average over the sets where there is one."""
    pictures = []
    corrupted = split_corruptions(comparisons)[1]
    for (protocol, metric, seed), group in groupby(corrupted, key=lambda c: (c.protocol, c.metric, c.seed)):
        group = list(group)
        for data in [AVERAGE] if any(c.data == AVERAGE for c in group) else dict.fromkeys(c.data for c in group):
            chosen = [c for c in group if c.data == data]
            stem = record_stem(data, protocol, f"{metric}-{seed}")
            path = pool_figures.corruption_curves(chosen, folder / "figures" / f"corruptions-{stem}.png")
            counts = sorted({cell.n for c in chosen for cell in c.cells.values()})
            where = "average over the sets" if data == AVERAGE else data
            text = f"{protocol}, {where}, per cent, n = {counts[-1]:,} {chosen[0].unit}"
            pictures.append(Picture(path, f"Corruptions, {protocol}", f"{text}. Whiskers are 95 % intervals."))
    return pictures


def _labels(folder: Path) -> list[str]:
    """Of the pool's experts in order: of the run's own, else of the assembled one that the configuration names."""
    candidates = [folder / "pool"]
    config = folder / "config.resolved.yaml"
    named = (read_yaml(config).get("pool") or {}) if config.exists() else {}
    if isinstance(named, Mapping) and named.get("folder"):
        candidates.insert(0, Path(str(named["folder"])))
    for pool in candidates:
        if (pool / INDEX).exists():
            index = read_json(pool / INDEX, f"pool '{pool}'")
            try:
                return [str(entry["label"]) for entry in index["experts"]]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"report: '{pool / INDEX}' is no index of a pool ({error!r}); assemble it again."
                ) from error
    return []


def _expert_curves(folder: Path, labels: Sequence[str]) -> list[Picture]:
    logs = {path.parent.name: read_lines(path) for path in sorted((folder / "experts").glob(f"*/{METRICS}"))}
    order = sorted(logs, key=lambda name: labels.index(name) if name in labels else -1)
    logs = {name: logs[name] for name in order}
    if not any(
        row.get("loss") is not None or row.get("accuracy") is not None for rows in logs.values() for row in rows
    ):
        return []
    path = pool_figures.expert_curves(logs, folder / "figures" / "experts.png")
    steps = max(int(row["step"]) for rows in logs.values() for row in rows if "step" in row)
    text = (
        f"Training of each expert by its input budget in 1/255, {steps:,} steps. Thin: as logged. Thick: running mean."
    )
    return [Picture(path, "Training of the experts", text)]


def _mixtures(folder: Path, results: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Picture]:
    shares: dict[str, dict[tuple[str, str], list[float]]] = {}
    several = len({row["protocol"] for row in results}) > 1
    for row in results:
        model, data, protocol = row["model"], row["data"], row["protocol"]
        if model == "average" or model.startswith("expert:") or model.endswith(FINETUNE):
            continue  # the same for every task, or that of the model before fine-tuning
        path = folder / "records" / f"{record_stem(data, protocol, model)}.jsonl"
        weights = [line["mixture"] for line in read_lines(path) if isinstance(line.get("mixture"), list)]
        if not weights or row["condition"] != "clean":
            continue
        if len({len(one) for one in weights}) > 1 or not all(
            isinstance(value, int | float) for one in weights for value in one
        ):
            raise UserError(f"report: '{path}' has mixtures of different pools; move the file away and evaluate again.")
        mean = [math.fsum(column) / len(weights) for column in zip(*weights, strict=True)]
        note = (f"{protocol}, " if several else "") + f"n = {len(weights):,}"
        shares.setdefault(model, {})[data, note] = mean
    experts = {len(mean) for panel in shares.values() for mean in panel.values()}
    if not shares or experts == {1}:
        return []
    if len(experts) > 1:
        raise UserError(f"report: records of '{folder}' have mixtures of {sorted(experts)} experts; evaluate again.")
    count = experts.pop()
    names = list(labels) if len(labels) == count else [f"expert {number}" for number in range(1, count + 1)]
    path = pool_figures.mixture_bars(shares, names, folder / "figures" / "mixture.png")
    what = "" if several else f"{results[0]['protocol']}. "
    text = f"{what}Mean weight of each expert over the episodes (n), in per cent; labels are input budgets in 1/255."
    return [Picture(path, "Pool mixture per domain", text)]
