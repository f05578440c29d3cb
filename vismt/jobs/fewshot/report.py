"""The report sections of a few-shot run: mixtures and episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vismt.base.errors import UserError
from vismt.engine.study import Study
from vismt.jobs.fewshot.arms import pool_members, split_head, strategy_of, untrained_arms
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.fewshot.evaluation import episodes_file
from vismt.jobs.fewshot.figures import episode_grid, mixture_bars
from vismt.metatune.amt.pool import read_pool
from vismt.report.panels import read_panel
from vismt.report.results import Result
from vismt.report.tables import Picture, Section, Table
from vismt.storage.lines import read_lines


def sections(
    folder: Path, config: FewShotConfig, study: Study[FewShotConfig], results: Sequence[Result]
) -> list[Section]:
    """Return the sections of a few-shot run, as far as the run folder has the files."""
    return [
        Section("Arms left out", _left_out(config, results)),
        Section("Pool", pictures=_mixtures(folder, config, study, results)),
        Section("Episodes", pictures=_panels(folder), folded=True),
    ]


def _left_out(config: FewShotConfig, results: Sequence[Result]) -> list[tuple[Table, str]]:
    scored = {split_head(row.arm)[0] for row in results}
    arms = {arm: changed.model.name for arm, changed in untrained_arms(config).items() if arm not in scored}
    if not arms:
        return []
    note = "No weights of these backbones could be had when the run was evaluated: no source of them answered."
    return [(Table("Not evaluated", ["Arm", "Backbone"], [list(pair) for pair in arms.items()], set()), note)]


def _panels(folder: Path) -> list[Picture]:
    pictures = []
    for path in sorted((folder / "panels").glob("*.npz")):
        panel = read_panel(path)
        drawn = episode_grid(panel, folder / "figures" / f"episode-{path.stem}.svg")
        pictures.append(Picture(drawn, f"{path.stem}, {panel['model']}", _panel_caption(panel)))
    return pictures


def _panel_caption(panel: dict[str, np.ndarray]) -> str:
    truth = panel["query_labels"]
    count = len(truth)
    right = int((panel["predictions"] == truth).sum())
    text = (
        f"The first episode drawn of this set, not chosen by result, {panel['model']}: the first images of each class. "
    )
    text += f"Of {count} query images in the panel file, {right} are right"
    if "adversarial_predictions" not in panel:
        return text + "."
    attack = str(panel["condition"]) if "condition" in panel else "attack"
    withstood = panel.get("adversarial_right", panel["adversarial_predictions"] == truth)
    return f"{text}, {int(withstood.sum())} under {attack}. ✓ right, ✗ wrong."


def _mixtures(
    folder: Path, config: FewShotConfig, study: Study[FewShotConfig], results: Sequence[Result]
) -> list[Picture]:
    """Draw the mean mixture of every model whose mixture depends on the task, for the first seed."""
    if config.pool is None:
        return []
    rows = [row for row in results if row.condition == "clean" and row.seed is None]
    several = len({row.protocol for row in rows}) > 1
    shares: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        if split_head(row.arm)[1] or strategy_of(config, row.arm) in ("average", "expert"):
            continue  # the same for every task, or that of the model with prototypes
        path = episodes_file(folder, study.seeds[0], row.data, row.protocol, row.arm)
        weights = [line["mixture"] for line in read_lines(path) if isinstance(line.get("mixture"), list)]
        if not weights:
            continue
        numbers = all(isinstance(value, int | float) for mixture in weights for value in mixture)
        if len({len(mixture) for mixture in weights}) > 1 or not numbers:
            raise UserError(f"report: '{path}' has mixtures of different pools; move the file away and evaluate again.")
        mean = [math.fsum(column) / len(weights) for column in zip(*weights, strict=True)]
        note = (f"{row.protocol}, " if several else "") + f"n = {len(weights):,}"
        shares.setdefault(row.arm, {})[row.data, note] = mean
    experts = {len(mean) for panel in shares.values() for mean in panel.values()}
    if not shares or experts == {1}:
        return []
    if len(experts) > 1:
        raise UserError(f"report: episodes of '{folder}' have mixtures of {sorted(experts)} experts; evaluate again.")
    count = experts.pop()
    labels = pool_members(config, study.arms)
    if config.pool.folder:
        labels = [expert.label for expert in read_pool(Path(config.pool.folder))]
    names = labels if len(labels) == count else [f"expert {number}" for number in range(1, count + 1)]
    path = mixture_bars(shares, names, folder / "figures" / "mixture.svg")
    protocol = "" if several else f"{rows[0].protocol}. "
    labels_text = "" if config.pool.experts else "; labels are input budgets in 1/255"
    text = f"{protocol}Mean weight of each expert over the episodes (n), in per cent{labels_text}."
    return [Picture(path, "Pool mixture per domain", text)]
