"""Arms that merge the adapters of other arms: the merged net, and how the adapters meet each other in every layer.

    W + D,    D = rule(w D_1, .., w D_T)    for every adapted weight,    D_t of the arm that was trained on task t

`vismt.lowrank.combine` has the rules. For each task the head has the rows of the arm that was trained on the task. w is chosen
on the validation images of all tasks, for each seed. RegMean and the interference need the inputs of a layer. These are
computed in the net of the task's own arm, on training images of the task. The report shows the interference of the first seed.
For the other seeds, only RegMean collects inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.engine import runtime
from vismt.engine.study import Training
from vismt.engine.training_files import ADAPTER
from vismt.jobs.calibration import ImageCalibrationConfig, image_batches
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.evaluation import Evaluation
from vismt.jobs.multitask.models import PixelNet
from vismt.jobs.training_job import TrainingJob
from vismt.llm.corda.covariance import collect_covariance, observed_modules
from vismt.lowrank.files.combining import combine, interference
from vismt.lowrank.files.updates import Updates, read_updates
from vismt.lowrank.model.merge import merge
from vismt.methods import schedules
from vismt.report.plotting import MUTED, axes_at, new_figure, save_figure, short, write
from vismt.report.tables import Picture, Section, Table
from vismt.storage.files import JsonObject, atomic_write, read_sealed, sealed

Job = TrainingJob[MultitaskConfig, PixelNet]
FILE = "interference.json"  # in the folder of a merged arm's training
TYPES = {
    "arms": list[str],
    "layers": list[str],
    "cosine": list[list[list[float]]],
    "error": list[list[float | None]],
    "weight": float | None,
    "rank": int,
    "validation": dict[str, float],
}
_NOTE = (
    "Relative error of a layer's update on the inputs of an arm's own tasks, mean over the layers: 0 where the arm's update is "
    "kept, 1 where it is lost. Weight: of each adapter, chosen on validation images where several were tried. First seed."
)
_CAPTION = (
    "Left: cosine of the updates of two arms, by layer. Then for each merged arm the relative error of its update on the inputs "
    "of each arm's own tasks, by layer. First seed."
)


def check_merging_arms(job: Job, data: TaskData, config: MultitaskConfig) -> None:
    """Raise UserError, before any training, for adapters or heads that cannot be merged. config: Merged arm."""
    section: Any = config.merge
    for name in section.arms:
        arm = job.study.arms[name]
        net = job.prepared(arm)[0]
        steps = arm.training.steps
        for schedule in schedules(net.stock, torch.optim.SGD(net.parameters()), steps, arm):
            schedule.on_step(steps)  # after the training
        updates = read_updates(net.stock, what=f"merge.arms: '{name}'")
        if updates.also_train:
            raise UserError(
                f"merge.arms: '{name}' trains '{next(iter(updates.also_train))}' whole, which no rule merges; leave "
                "adapt.options.also_train out."
            )
        observed_modules(job.fresh(arm).stock, [*updates.low_rank])
        if any(len(value) != data.union.num_classes for value in net.heads.parameters()):
            raise UserError(
                f"merge.arms: rows of the {type(net.head).__name__} of {arm.model.name} cannot be merged; take another model."
            )


def merged_net(job: Job, data: TaskData, evaluation: Evaluation, training: Training) -> tuple[PixelNet, JsonObject]:
    """Return the net of a merged arm with the merged adapter, and the content of interference.json."""
    config = job.study.config_of(training)
    section: Any = config.merge
    experts = [one for arm in section.arms for one in job.study.trainings(arm) if one.seed == training.seed]
    adapters = [read_updates(one.folder / ADAPTER, what=f"arms.{training.arm}") for one in experts]
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.low_rank))
    collects = section.method == "regmean" or training.seed == job.study.seeds[0]
    inputs = [_inputs(job, data, one, paths) for one in experts] if collects else []
    heads = [job.loaded(one).heads for one in experts]

    def net_of(merged: Updates) -> PixelNet:
        net, union = job.fresh(config), data.union
        merged.put_on(net.stock)
        for expert, head in zip(experts, heads):
            for task in job.study.arms[expert.arm].trained_tasks:
                rows = union.span(union.tasks.index(task))
                for name, value in net.heads.named_parameters():
                    value.data[rows] = head.get_parameter(name).data[rows]
        return net.requires_grad_(False).eval()

    tried: dict[float | None, tuple[float, Updates]] = {}
    for weight in section.weights or [None]:
        merged = combine(
            adapters,
            None if weight is None else [weight] * len(adapters),
            section.method,
            covariances=inputs if section.method == "regmean" else None,
            seed=training.seed,
        )
        value = 0.0
        if len(section.weights) > 1:
            net = net_of(merged)
            merge(net.stock)
            value = evaluation.validation_accuracy(net.to(runtime.processes().device), training)
        tried[weight] = value, merged
    weight = max(tried, key=lambda weight: tried[weight][0])
    merged = tried[weight][1]
    layers = interference(adapters, merged, inputs) if inputs else {}
    return net_of(merged), {
        "method": section.method,
        "arms": section.arms,
        "layers": list(layers),
        "cosine": [layer.cosine.tolist() for layer in layers.values()],
        "error": [[one if isfinite(one) else None for one in layer.error.tolist()] for layer in layers.values()],
        "weight": weight,
        "rank": max(update.rank for update in merged.low_rank.values()),
        "validation": {f"{tried_weight:g}": value for tried_weight, (value, _) in tried.items()}
        if len(tried) > 1
        else {},
    }


def _inputs(job: Job, data: TaskData, expert: Training, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the covariances of the inputs of layers in an arm's net, on up to 256 training images of its tasks."""
    net = job.loaded(expert)
    merge(net.stock)
    images = data.training(job.study.arms[expert.arm].trained_tasks)
    batches = image_batches(net.backbone, images, ImageCalibrationConfig())
    return collect_covariance(net.to(runtime.processes().device).stock, batches, list(paths))


def write_interference(about: JsonObject, training: Training) -> None:
    """Write interference.json, and print the chosen weight."""
    if about["validation"]:
        scores = "   ".join(f"{weight} {100 * value:.1f}" for weight, value in about["validation"].items())
        console.stage("merge", f"{training.arm}   validation accuracy by weight: {scores}   chosen {about['weight']:g}")
    atomic_write(training.folder / FILE, sealed(about))


def merge_section(folder: Path, trainings: Sequence[Training]) -> list[Section]:
    """Return the section on merged arms. trainings: Trainings of the first seed, of which merged trainings have a file."""
    found = {
        one.arm: read_sealed(one.folder / FILE, f"run '{folder}'", TYPES)
        for one in trainings
        if (one.folder / FILE).exists()
    }
    if not found:
        return []
    arms = list(dict.fromkeys(arm for about in found.values() for arm in about["arms"]))
    rows = []
    for name, about in found.items():
        columns = dict(zip(about["arms"], zip(*about["error"])))
        errors = {arm: [value for value in column if value is not None] for arm, column in columns.items()}
        means = [f"{fmean(errors[arm]):.2f}" if errors.get(arm) else "–" for arm in arms]
        weight = "of the method" if about["weight"] is None else f"{about['weight']:g}"
        rows.append([name, weight, str(about["rank"]), *means])
    table = Table("Merged arms", ["Arm", "Weight", "Rank", *arms], rows, set(), texts=2)
    picture = Picture(interference_figure(found, folder / "figures" / "interference.svg"), "Interference", _CAPTION)
    return [Section("Merged arms", [(table, _NOTE)], [picture])]


def interference_figure(found: dict[str, JsonObject], path: Path) -> Path:
    """Draw a map of layers by pairs of arms, then one of layers by arms for each merged arm."""
    first = next(iter(found.values()))
    layers = list(dict.fromkeys(path for about in found.values() for path in about["layers"]))
    pairs = list(combinations(range(len(first["arms"])), 2))
    names = [f"{first['arms'][a]} · {first['arms'][b]}" for a, b in pairs]
    cosines = {path: [line[a][b] for a, b in pairs] for path, line in zip(first["layers"], first["cosine"])}
    maps = [("cosine", cosines, names)]
    maps += [(arm, dict(zip(about["layers"], about["error"])), about["arms"]) for arm, about in found.items()]
    letters = max(len(short(name, 24)) for _, _, columns in maps for name in columns)
    cell, line, top, left, gap = 0.22, 0.17, 0.45 + 0.078 * letters, 2.5, 0.35
    height = line * len(layers)
    figure = new_figure(left + sum(cell * len(columns) + gap for _, _, columns in maps) + 0.9, top + height + 0.2)
    errors = [error for _, by_layer, _ in maps[1:] for row in by_layer.values() for error in row if error is not None]
    scales = [("RdBu_r", -1.0, 1.0), *[("viridis", 0.0, max([1.0, *errors]))] * len(found)]
    x = left
    for (title, by_layer, columns), (colors, lowest, highest) in zip(maps, scales):
        values = np.array([by_layer.get(path, [None] * len(columns)) for path in layers], dtype=float)
        axes = axes_at(figure, x, top, cell * len(columns), height)
        drawn = axes.imshow(values, colors, aspect="auto", interpolation="nearest", vmin=lowest, vmax=highest)
        texts = [short(name, 24) for name in columns]
        axes.set_xticks(range(len(columns)), texts, rotation=90, fontsize=8.5, color=MUTED)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(layers)), layers if x == left else [""] * len(layers), fontsize=8.5)
        axes.tick_params(colors=MUTED, length=0)
        write(figure, x, 0.2, short(title, 16), weight="bold", fontsize=8.5)
        x += cell * len(columns) + gap
    bar = figure.colorbar(drawn, cax=axes_at(figure, x, top, 0.12, min(height, 1.5)), format="%.1f")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    return save_figure(figure, path)
