"""Runs of whole images alone: one adapted model with one classifier over the classes of all tasks in place of timm's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.backbones.vit import classifier_paths
from vismt.base import console, ranks
from vismt.base.errors import UserError
from vismt.data.batching import Gathered, ShuffledBatches
from vismt.data.cards import load_card
from vismt.data.copies import found_copy
from vismt.data.image_set import ImageSource
from vismt.data.set_entries import card_and_split, overlap, row_name
from vismt.data.transforms import augment
from vismt.engine import training_files
from vismt.engine.study import Training, validates
from vismt.evaluation.quality import Quality
from vismt.evaluation.sections import asked_features, check_held_out, fitted_keys
from vismt.jobs.graphs import Graph, Named, image_graph
from vismt.jobs.image_job import MAPPED_IMAGES
from vismt.jobs.multitask.base import MultitaskJob
from vismt.jobs.multitask.config import MultitaskConfig, entry_name, own_parts
from vismt.jobs.multitask.data import TaskData
from vismt.jobs.multitask.evaluation import Evaluation
from vismt.jobs.multitask.figures import EXAMPLES_FILE, examples, sections, write_confusions
from vismt.jobs.multitask.merging import check_merging_arms, merge_section, merged_net, write_interference
from vismt.jobs.multitask.models import HEAD_FILE, PixelNet, classifier_net, load_head, stored, with_linear_head
from vismt.jobs.predictions import CLASSES, Options, Predictions, images_for, predict_classes
from vismt.lowrank.model.inject import train_along
from vismt.lowrank.model.record import count_parameters
from vismt.multitask.nets import Union
from vismt.multitask.tasks import Task
from vismt.report.panels import spread
from vismt.report.results import RECORDS, Result
from vismt.report.tables import Section
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject
from vismt.uncertainty.features import Feature, View
from vismt.uncertainty.intervals import CLEAN
from vismt.uncertainty.last_layers import is_variational
from vismt.uncertainty.predictive import GaussianHead


class ClassifierJob(MultitaskJob[PixelNet]):
    """A ViT with a head over the classes of all tasks in place of timm's head."""

    predict_options = CLASSES
    next_steps = (
        "predict {run} my_images --arm {arm}",
        "export {run} --arm {arm} --format timm",
        "merge {run} --arm {arm}",
    )
    logged: Mapping[str, str] = {
        "ce": "Training cross-entropy",
        "accuracy": "Training accuracy (%)",
        "fade": "Router fade",
    }

    def __init__(self, config: MultitaskConfig, folder: Path, config_hash: str) -> None:
        super().__init__(config, folder, config_hash)
        self._features = ExitStack()  # of the training in progress

    @cached_property
    def data(self) -> TaskData:
        size = self.config.model.img_size or timm_models.create(self.config.model.name).img_size[0]
        return TaskData(self.config, size, self.kept)

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.study, self.data)

    def check_arm(self, config: MultitaskConfig) -> None:
        super().check_arm(config)
        merges = [arm.merge for arm in self.study.arms.values() if arm.merge is not None]
        # If several rules merge the same arms, with the first rule.
        if config.merge is not None and config.merge == next(m for m in merges if m.arms == config.merge.arms):
            check_merging_arms(self, self.data, config)

    def train_one(self, training: Training) -> None:
        config = self.study.config_of(training)
        if config.merge is None or training_files.read_done(training) is not None:
            super().train_one(training)
            self._features.close()
        else:
            ranks.on_first(lambda: self._merge_arms(training, config))

    def _merge_arms(self, training: Training, config: MultitaskConfig) -> None:
        console.stage("merge", f"{training.arm}   seed {training.seed}")
        net, about = merged_net(self, self.data, self.evaluation, training)
        write_interference(about, training)
        facts = {
            "method": f"merged by {about['method']}",
            "rank": about["rank"],
            "trainable": 0,
            "total": count_parameters(net)[1],
        }
        self.finish(net, config, training, facts)

    def check_data(self) -> None:
        settings = self.config.evaluate
        for task in range(len(self.data.union.tasks)):
            self.data.check_part(task, self.split)
            for name in (name for feature in asked_features(settings) for name in feature.sets):
                self.data.outside(name)
            if validates(self.config) or fitted_keys(settings):
                self.data.check_part(task, "validation")
            if fitted_keys(settings):
                labels, groups = self.data.part(task, "validation").labels, self.data.validation_groups(task)
                check_held_out(settings, self.config.tune, labels, groups)

    def skeleton(self, config: MultitaskConfig) -> nn.Module:
        return timm_models.skeleton(config.model.name, config.model.img_size, num_classes=1)

    def fresh(self, config: MultitaskConfig) -> PixelNet:
        return classifier_net(config, self.data.union.num_classes, sum(self.data.class_counts(config.trained_tasks)))

    def trained(self, config: MultitaskConfig) -> tuple[Sequence[Task], Union, Sequence[float]]:
        factors = {entry_name(spec): spec.get("loss_weight", 1.0) for spec in config.tasks if not isinstance(spec, str)}
        return (), self.data.union, [float(factors[name]) for name in self.data.union.tasks]

    def class_counts(self, union: Union) -> list[int]:
        return self.data.class_counts()

    def calibration_images(self, config: MultitaskConfig) -> Gathered:
        sets = config.calibration.data if config.calibration is not None else ()
        return self.data.outside(*sets) if sets else self.data.training(config.trained_tasks)

    def training_sets(self) -> dict[str, str]:
        return {task: self.data.training([task]).content for task in self.data.union.tasks}

    def needed_of_data(self) -> JsonObject:
        return self.data.needed

    def batches(self, config: MultitaskConfig) -> ShuffledBatches:
        settings = config.augment
        crop = (settings.crop, 1.0) if settings.crop < 1 else None
        images = self.data.training(config.trained_tasks)
        if crop is None and not settings.jitter and not settings.flip:
            images = self._features.enter_context(stored(images))
            return ShuffledBatches(images, config.batch, seed=config.seed)

        def change(images: Tensor, seed: int) -> Tensor:
            return augment(images, seed, crop=crop, jitter=settings.jitter, flip=settings.flip)

        return ShuffledBatches(images, config.batch, seed=config.seed, augment=change)

    def save(self, net: PixelNet, config: MultitaskConfig, folder: Path) -> None:
        training_files.write_state(net.heads, folder / HEAD_FILE)

    def loaded(self, training: Training) -> PixelNet:
        return load_head(self.fresh(self.study.config_of(training)), training)

    def features(self, split: str, attacks: Sequence[AttackConfig] | None) -> list[Feature]:
        validated = split != "validation" and self.evaluation.validated
        return [Quality(None), *asked_features(self.config.evaluate, attacks, validated=validated)]

    def is_untrained(self, arm: str, data: str) -> bool:
        tasks = self.validated_tasks(self.study.arms[arm]) if arm in self.study.arms else [data]
        return data in self.validated_tasks(self.config) and data not in tasks

    def validated_tasks(self, config: MultitaskConfig) -> Sequence[str]:
        return config.trained_tasks or [entry_name(spec) for spec in config.tasks]

    def validate(self, training: Training) -> float:
        """Return the mean accuracy over the tasks that the arm is trained on, on the images that choose rates."""
        values = []
        chosen = self.validated_tasks(self.study.arms[training.arm])
        net, records = partial(self.final, training), self.records(training, "validation", [])
        for score in self.evaluation.scores(net, training, "validation", records, self.inputs()):
            if score.condition == CLEAN and score.measure.metric == "accuracy" and score.data in chosen:
                number = self.data.union.tasks.index(score.data)
                chooses, _ = self.evaluation.parts(number)
                names = list(compress(self.data.part(number, "validation").ids, chooses.tolist()))
                values.append(math.fsum(score.measure.values[name] for name in names) / len(names))
        return sum(values) / len(values)

    def fitted_views(self, training: Training) -> Mapping[str, View]:
        net, records = self.final(training), training.folder / RECORDS
        tasks = enumerate(self.data.union.tasks)
        return {task: self.evaluation.view(net, training, self.split, number, records) for number, task in tasks}

    def exports_fitted(self, training: Training) -> bool:
        # Merged weights have the means of a Bayesian head, while fitted values belong to its probabilities.
        return not is_variational(self.study.config_of(training).head_name)

    def write_panels(self) -> None:
        first = [self.study.trainings(arm)[0] for arm in self.study.arms]
        examples(self.folder, self.data, self.split, first, self.folder / EXAMPLES_FILE)
        write_confusions(
            self.folder, self.data, self.split, {arm: self.study.trainings(arm) for arm in self.study.arms}
        )
        self.write_router_maps(self.loaded, self._mapped_images)

    def _mapped_images(self) -> Tensor:
        tasks = len(self.data.union.tasks)
        wanted = (torch.arange(MAPPED_IMAGES) * tasks // MAPPED_IMAGES).tolist()
        parts = [(self.data.part(task, self.split), wanted.count(task)) for task in sorted(set(wanted))]
        return torch.cat([part[spread(len(part), count)] for part, count in parts])

    def sections(self, results: Sequence[Result]) -> list[Section]:
        first = [self.study.trainings(arm)[0] for arm in self.study.arms]
        return [*merge_section(self.folder, first), *sections(self.folder)]

    def merged(self, arm: str | None = None) -> nn.Module:
        """Return one arm's stock model with merged weights. A Bayesian head becomes the linear head of its means."""
        return with_linear_head(super().merged(arm))

    def graph(self, arm: str | None, form: str) -> Graph:
        """Return the merged net. A Bayesian head gives log-probabilities."""
        net, size = self.merged_net(self.study.find(arm)), self.data.size
        bayesian = isinstance(net.head, GaussianHead)
        name = "log_probabilities" if bayesian else "logits"
        outputs = {name: {"shape": ["batch", self.data.union.num_classes], **self.about(arm)}}
        return image_graph(Named(net), (size, size), outputs)

    def adapted(self, arm: str | None = None) -> nn.Module:
        """Return one arm's stock model with its adapter and the head marked as trained along, so that exports include it."""
        model = with_linear_head(super().adapted(arm))
        for path in classifier_paths(model):
            train_along(model, [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()])
        return model

    def classifier(self, arm: str | None = None) -> tuple[nn.Module, list[str], int]:
        net = self.final(self.study.find(arm))
        return net, self.data.label_names, net.backbone.img_size[0]

    def predict(self, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
        training = self.study.find(options.arm)
        images = images_for(inputs, target, options)
        net, size, batch = self.final(training), self.data.size, self.config.evaluate.batch
        groups = self.evaluation.softmaxes(training, self.fitted(training)["quantiles"])
        found = predict_classes(net, size, groups, images, target, options, label=str(training), batch=batch)
        trained_on = self._training_folders() if found.accuracy is not None else ()
        for folder in trained_on:
            if any(path.resolve().is_relative_to(folder.resolve()) for path in images.places):
                text = f"'{folder}' has images that the run was trained on, and they count"
                console.stage("", f"{text}; the report has only the test images")
        return found

    def _training_folders(self) -> Iterator[Path]:
        """Yield the folders of the copies that the run is trained on."""
        entries = {entry for of in own_parts(self.config).values() for entry in (*of.train, *of.validation)}
        for card, split in map(card_and_split, sorted(entries)):
            with suppress(UserError):  # a Python object has no folder
                yield found_copy(load_card(card), ImageSource, split)[1]

    def cards_of_tasks(self) -> dict[str, set[str]]:
        if len(self.config.tasks) == 1:  # the outputs of a single task are named by class alone
            return {}
        return {
            name: {row_name(card_and_split(entry)[0]) for entry in (*of.train, *of.validation, *of.test)}
            for name, of in own_parts(self.config).items()
        }

    def test_ids(self, entry: str) -> set[str] | None:
        used = [name for of in own_parts(self.config).values() for name in (*of.train, *of.validation)]
        used += [name for arm in self.study.arms.values() if arm.calibration for name in arm.calibration.data]
        return self.data.test_ids(entry) if any(overlap(entry, name) for name in used) else None

    def about(self, arm: str | None = None) -> JsonObject:
        """Return the classes for config.json beside merged weights, with timm's keys."""
        several = len(self.config.tasks) > 1
        space = {"label_space": "separate"} if several and self.evaluation.separate(self.study.find(arm)) else {}
        return {"num_classes": self.data.union.num_classes, "label_names": self.data.label_names, **space}
