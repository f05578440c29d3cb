"""Runs of images fitted into `size`: one adapted backbone, a head for each task, one forward pass for all tasks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vismt.backbones import timm_models
from vismt.base.errors import UserError, need_names
from vismt.engine import training_files
from vismt.engine.study import Training, validates
from vismt.evaluation.sections import asked_features, check_held_out, fitted_keys
from vismt.jobs.graphs import Graph, Named, image_graph
from vismt.jobs.image_job import MAPPED_IMAGES
from vismt.jobs.multitask import models
from vismt.jobs.multitask.base import MultitaskJob
from vismt.jobs.multitask.classifier_job import ClassifierJob
from vismt.jobs.multitask.config import (
    DELTA,
    PANELS,
    MultitaskConfig,
    all_tasks,
    baseline_arms,
    class_tasks,
    image_tasks,
    trained_tasks,
    window_of,
)
from vismt.jobs.multitask.delta import deltas
from vismt.jobs.multitask.figures import confusions, sections, write_predictions
from vismt.jobs.multitask.maps_data import DenseBatches, DenseData, FittedImages
from vismt.jobs.multitask.maps_evaluation import Evaluation
from vismt.jobs.multitask.maps_predict import (
    named_tasks,
    names_in_sets,
    output_names,
    predict_images,
)
from vismt.jobs.multitask.pooled_score import PooledScore
from vismt.jobs.predictions import Options, Predictions, check_target, image_files
from vismt.jobs.training_job import recorded_sets
from vismt.methods import METHODS, needs
from vismt.multitask.mtlora.method import merge_shared
from vismt.multitask.nets import DenseNet, Union
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import Classification
from vismt.multitask.tasks.maps import Depth
from vismt.report.panels import spread
from vismt.report.results import RECORDS, Result
from vismt.report.tables import Section
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject, atomic_write
from vismt.uncertainty.features import COUNTS, PROBABILITIES, VALIDATION, Feature, View
from vismt.uncertainty.intervals import CLEAN, Score

_FITTED = (
    "fit into {} x {} pixels without changing the shape (bilinear, antialiased), then pad below and right with grey"
)


class MapsJob(MultitaskJob[DenseNet]):
    """A backbone with a head for each task, on images that are fitted into a canvas."""

    names_tasks = True
    predict_options = frozenset({"arm", "top", "maps", "own_size", "flip"})
    next_steps = (
        "predict {run} my_images --arm {arm} --maps",
        "export {run} --arm {arm} --format onnx",
        "merge {run} --arm {arm}",
    )
    default_attack = "pgd"

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str) -> None:
        super().__init__(config, folder, config_hash)
        losses = {task.name: f"{task.name}: training loss" for task in all_tasks(config)}
        self.logged = {"loss": "Training loss of all tasks", **losses, "fade": "Router fade"}

    @cached_property
    def data(self) -> DenseData:
        return DenseData(self.config)

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.study, self.data)

    def check_data(self) -> None:
        settings = self.config.evaluate
        validated = validates(self.config) or fitted_keys(settings)
        splits = {self.split, "validation"} if validated else {self.split}
        for split in splits:
            if len(self.data.part(split)) < 2:
                raise UserError(f"data: one {split} image; an interval needs two or more.")
        self.check_features(settings)
        for name in (name for feature in asked_features(settings) for name in feature.sets):
            self.data.outside(name)
        if window_of(self.config) != tuple(self.config.size):
            net = models.make_backbone(self.config, window_of(self.config))
            net.set_input_size((self.config.size[0], self.config.size[1]))
        for config in self.study.arms.values():
            self.batches(config)
            self.data.counted(trained_tasks(config))
        if any(COUNTS in feature.needs for feature in asked_features(settings)):
            for task in class_tasks(self.config):
                self.data.class_counts(task)

    def skeleton(self, config: MultitaskConfig) -> nn.Module:
        return timm_models.skeleton(config.model.name, (config.size[0], config.size[1]))

    def fresh(self, config: MultitaskConfig) -> DenseNet:
        return models.maps_net(config)

    def prepare(self, net: DenseNet, config: MultitaskConfig) -> str:
        """Adapt the timm model and return the method's name. A head of depth starts at the mean of the training depths."""
        if Depth.name in net.heads:
            head: Any = net.heads[Depth.name]
            head.start_at(self.data.mean_depth)
        settings = self.calibrated(net, config).adapt
        if settings is None:
            return super().prepare(net, config)
        if not METHODS[settings.method].layers:
            excluded = need_names("adapt.options.exclude:", settings.options.get("exclude", ()))
            settings = replace(settings, options={**settings.options, "exclude": [*excluded, *_unread(net)]})
        of_tasks = {"tasks": list(net.heads), "task_blocks": net.read_blocks}
        method = self.adapt(net.stock, settings, config.seed, of_tasks)
        given = need_names("adapt.options.task_blocks:", settings.options.get("task_blocks") or ())
        for unread in sorted(set(given) - set(net.read_blocks)):
            raise UserError(
                f"adapt.options.task_blocks: no head reads '{unread}'; name blocks of {', '.join(net.read_blocks)}."
            )
        return method

    def trained(self, config: MultitaskConfig) -> tuple[Sequence[Task], Union, Sequence[float]]:
        tasks = self.data.counted(trained_tasks(config))
        whole = [task for task in tasks if isinstance(task, Classification)]
        union = Union(tuple(task.name for task in whole), tuple(task.classes for task in whole))
        return [task for task in tasks if isinstance(task, MapTask)], union, [task.loss_weight for task in whole]

    def class_counts(self, union: Union) -> list[int]:
        return [count for name in union.tasks for count in self.data.class_counts(self.data.tasks[name])]

    def calibration_images(self, config: MultitaskConfig) -> FittedImages:
        sets = config.calibration.data if config.calibration is not None else ()
        rows = self.data.rows(*sets) if sets else self.batches(config).rows
        return FittedImages(rows, (config.size[0], config.size[1]))

    def training_sets(self) -> dict[str, str]:
        rows = self.data.part("train")
        return {rows.name: rows.files}

    def batches(self, config: MultitaskConfig) -> DenseBatches:
        return DenseBatches(self.data.parts["train"], self.data.size, config)

    def save(self, net: DenseNet, config: MultitaskConfig, folder: Path) -> None:
        atomic_write(folder / models.HEADS_FILE, models.heads_file(net, config))

    def loaded(self, training: Training) -> DenseNet:
        return models.loaded_maps(self.study.config_of(training), training, window_of(self.config))

    def pooled(self, training: Training, split: str) -> dict[str, PooledScore]:
        """Return the images of every task of a training, clean, read from its folder if they are on record."""
        features = asked_features(self.config.evaluate) if split == self.split else []
        net, records = cache(lambda: self.final(training)), training.folder / RECORDS
        return self.evaluation.pooled(net, training, split, records, self.inputs(), features)[CLEAN]

    def features(self, split: str, attacks: Sequence[AttackConfig] | None) -> list[Feature]:
        return asked_features(self.config.evaluate, attacks) if split == self.split else []

    def check_features(self, evaluate: object) -> None:
        super().check_features(evaluate)
        keys = [of.key for of in asked_features(evaluate) if of.needs >= {PROBABILITIES, VALIDATION}]
        if keys and not image_tasks(all_tasks(self.config)):
            raise UserError(
                f"evaluate.{keys[0]}: the run '{self.folder}' has no class probabilities of images; name a run with tasks of "
                "whole images."
            )
        for task in image_tasks(all_tasks(self.config)) if keys else ():
            labels, groups = self.data.classes("validation", task), self.data.class_groups("validation", task)
            check_held_out(evaluate, self.config.tune, labels, groups)

    def classifier(self, arm: str | None = None) -> tuple[nn.Module, list[str], int]:
        raise UserError(
            f"run '{self.folder}': a dense run does not classify images of cards; leave data out, and it is evaluated on its "
            "own images."
        )

    def validated_tasks(self, config: MultitaskConfig) -> list[str]:
        return [task.name for task in trained_tasks(config)]

    def validate(self, training: Training) -> float:
        scores = self.score(training, "validation", [])
        tasks = trained_tasks(self.study.config_of(training))
        return self.evaluation.quality(scores, len(tasks) - sum(not score.measure.further for score in scores))

    def derived(self, scores: Mapping[str, Sequence[Score]], seeds: Sequence[int]) -> dict[str, list[Score]]:
        metrics = {name: task.headline.name for name, task in self.data.tasks.items()}
        of_tasks = {
            arm: [score for score in arm_scores if score.measure.metric == metrics[score.task]]
            for arm, arm_scores in scores.items()
            if arm not in self.references
        }
        return deltas(of_tasks, baseline_arms(self.config))

    def write_panels(self) -> None:
        first = [self.study.trainings(arm)[0] for arm in self.study.arms]
        write_predictions(
            self.folder / PANELS,
            self.data,
            self.split,
            first,
            logits=lambda training, sample: self.evaluation.logits(self.final(training), sample),
            pooled=lambda training: self.pooled(training, self.split),
        )
        rows, size = self.data.part(self.split), (self.config.size[0], self.config.size[1])
        self.write_router_maps(
            lambda training: models.loaded_maps(self.study.config_of(training), training, size),
            lambda: torch.stack([rows.fitted(i, size)["image"] for i in spread(len(rows), MAPPED_IMAGES).tolist()]),
        )

    def sections(self, results: Sequence[Result]) -> list[Section]:
        firsts = [self.study.trainings(arm)[0] for arm in self.study.arms if self.study.is_chosen(arm)]
        return [confusions(self.folder, firsts, self.split), *sections(self.folder)]

    def baselines(self) -> dict[str, str]:
        """Return the arm with which others are compared, by task. delta_m is a difference and has none."""
        return {**baseline_arms(self.config), DELTA: ""}

    def predict(self, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
        """Draw one arm's predictions on images and on images in folders, see `predict_images`."""
        images = image_files(inputs, target)
        training = self.study.find(options.arm)
        config = self.study.config_of(training)
        tasks, classes = self._named(config)
        check_target(target, output_names(images.places, tasks, options.maps), images.places)
        size = (config.size[0], config.size[1]) if options.own_size else window_of(self.config)
        net = models.loaded_maps(config, training, size)
        training_files.fold(net.stock, training)
        # Fitted values hold for images that are predicted like the validation images.
        quantiles = {} if options.own_size or options.flip else self.fitted(training)["quantiles"]
        return predict_images(config, net, tasks, classes, str(training), images, target, options, quantiles)

    def fitted_views(self, training: Training) -> Mapping[str, View]:
        net = cache(lambda: self.final(training))
        return self.evaluation.views(net, training, self.split, training.folder / RECORDS)

    def _named(self, config: MultitaskConfig) -> tuple[dict[str, Task], dict[str, list[str]]]:
        """Return the trained tasks of an arm by name, and the names of their classes."""
        return named_tasks(config, self.kept or self.needed_of_data())

    def needed_of_data(self) -> JsonObject:
        return names_in_sets(self.config)

    def graph(self, arm: str | None, form: str) -> Graph:
        """Return the merged net, with the maps of all tasks at the size of the images. Pairs of tasks stay beside the weights."""
        training = self.study.find(arm)
        config, size = self.study.config_of(training), window_of(self.config)
        tasks, classes = self._named(config)
        outputs = {
            name: {
                "shape": ["batch", *([task.outputs] if isinstance(task, Classification) else [task.channels, *size])],
                "task": type(task).__name__,
                **({"label_names": classes[name]} if name in classes else {}),
            }
            for name, task in tasks.items()
        }
        adapt = config.adapt
        if adapt is not None and "tasks" in needs(adapt.method, adapt.options):
            net = self.loaded(training)
            merge_shared(net.stock)
        else:
            net = self.merged_net(training)
        return image_graph(Named(net, tasks), size, outputs, _FITTED.format(*size))

    def beside(self, training: Training) -> dict[str, bytes]:
        return {models.HEADS_FILE: models.heads_file(self.loaded(training), self.study.config_of(training))}

    def about(self, arm: str | None = None) -> JsonObject:
        # The whole image is seen, and padded to the size.
        whole = {"pretrained_cfg": {"crop_mode": "border"}}
        return {"num_classes": 0, "img_size": list(window_of(self.config)), **whole}


def _unread(net: DenseNet) -> list[str]:
    """Return patterns of parameters that no head depends on. Several processes would wait for a gradient of a trained one."""
    shapes = copy.deepcopy(net.backbone).to("meta").requires_grad_(True)
    taps = shapes.maps(torch.empty(1, 3, *shapes.img_size, device="meta"), net.blocks)
    named = dict(shapes.vit.named_parameters())
    gradients = torch.autograd.grad([tap.sum() for tap in taps], list(named.values()), allow_unused=True)
    return [re.escape(name) for name, gradient in zip(named, gradients, strict=True) if gradient is None]


def JOB(config: MultitaskConfig, folder: Path, config_hash: str) -> MultitaskJob[Any]:
    """Return the job of a configuration: of images fitted into `size`, or of squares with one stock classifier."""
    if not config.size:
        return ClassifierJob(config, folder, config_hash)
    counted = recorded_sets(folder).get("needed", {}).get("counted", {})
    tasks = [
        {**spec, "classes": counted[spec["name"]]} if isinstance(spec, dict) and spec.get("name") in counted else spec
        for spec in config.tasks
    ]
    return MapsJob(replace(config, tasks=tasks) if counted else config, folder, config_hash)
