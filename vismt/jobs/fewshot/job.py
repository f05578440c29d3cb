"""The few-shot job: meta-tune adapted ViTs on episodes and evaluate them beside the frozen ViT on other domains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.base import console, ranks
from vismt.base.errors import UserError, WeightsUnavailable, near
from vismt.base.objects import object_named
from vismt.data.pixels import Pixels
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.stream import Batches
from vismt.engine.study import FROZEN, Study, Training
from vismt.engine.training_files import ADAPTER
from vismt.evaluation.sections import asked_features, outside_entries
from vismt.jobs.calibration import Calibrations
from vismt.jobs.fewshot.arms import (
    evaluated_models,
    merged_text,
    pool_members,
    resolve_experts,
    split_head,
    trained_on,
    untrained_arms,
)
from vismt.jobs.fewshot.config import CLEAN_EXPERT, EXPERT, MERGED, ExpertConfig, FewShotConfig
from vismt.jobs.fewshot.config_checks import check, check_sets
from vismt.jobs.fewshot.data import FewShotData, draw_corruption
from vismt.jobs.fewshot.evaluation import Evaluation
from vismt.jobs.fewshot.models import OWN_FILE, Models, make_net, read_scale
from vismt.jobs.fewshot.report import sections
from vismt.jobs.graphs import Graph, Named, image_graph
from vismt.jobs.predict import fit_few_shot
from vismt.jobs.predictions import CLASSES, Options, Predictions, images_for, predict_classes
from vismt.jobs.training_job import TrainingJob
from vismt.lowrank.files.save_load import load_adapter
from vismt.lowrank.model.merge import merge
from vismt.lowrank.model.modules import check_mergeable
from vismt.metatune.amt.method import AdversarialObjective
from vismt.metatune.amt.pool import Expert, ExpertPool, assemble, read_pool
from vismt.metatune.maml import MamlNet
from vismt.metatune.protonet import EpisodeObjective, ProtoNet, prototypes
from vismt.report.results import Result
from vismt.report.tables import Section
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject, atomic_write
from vismt.uncertainty.intervals import Score

EpisodeNet = ProtoNet | MamlNet
_AVERAGE = "average"
_FIRST = 10  # images of a class, whose mean starts its vector


class FewShotJob(TrainingJob[FewShotConfig, Any]):
    """Arms are adapters of one backbone, or the experts of a pool. Models built from them are evaluated seed by seed."""

    predict_options = CLASSES | {"support"}
    next_steps = (
        "predict {run} my_images --support my_examples --arm {arm}",
        "export {run} --arm {arm} --format timm",
        "merge {run} --arm {arm}",
    )
    logged: Mapping[str, str] = {
        "loss": "Training loss",
        "accuracy": "Training accuracy (%)",
        "robust": "Training accuracy under attack (%)",
    }

    def __init__(self, config: FewShotConfig, folder: Path, config_hash: str) -> None:
        check(config)
        super().__init__(config, folder, config_hash)
        self.data = FewShotData(config)
        self.untrained = untrained_arms(config)
        self.skipped: dict[str, str] = {}
        self.references = [
            model for model in self.evaluated() if split_head(model)[0] in (FROZEN, *self.untrained)
        ]  # what no arm trains
        self._models: dict[tuple[int, str], Models] = {}
        self.calibrations = Calibrations(folder)

    def make_study(self) -> Study[FewShotConfig]:
        return Study(self.config, self.folder, resolve_experts(self.config))

    def trained_on(self, config: FewShotConfig) -> str:
        return trained_on(config)

    def described(self, arm: str) -> str:
        stem, head = split_head(arm)
        if stem in self.untrained:
            text = f"{self.untrained[stem].model.name}, nothing trained"
        else:
            text = super().described(stem.removeprefix(EXPERT)) or merged_text(self.config, stem)
        return f"{text}; head {head} in place of prototypes" if head else text

    # ---- training -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        check_sets(self.config)
        super().check()

    def check_data(self) -> None:
        for name in self.config.evaluate.data:
            self.data.samplers(name)
        for name in outside_entries(asked_features(self.config.evaluate)):
            self.data.open(name)
        if self.config.select is not None:
            for name in self.config.select.data:
                self.data.validation_sampler(name)

    def skeleton(self, config: FewShotConfig) -> nn.Module:
        given = object_named(config.model.name)
        return timm_models.skeleton(config.model.name, config.model.img_size) if given is None else given

    def fresh(self, config: FewShotConfig) -> EpisodeNet:
        """Return the net of an arm, with untrained factors if the configuration has any."""
        backbone = self.data.backbone()
        if config.adapt is not None:
            unused = [re.escape(name) + r"\..*" for name in backbone.unused_modules()]
            options = {**config.adapt.options, "exclude": [*config.adapt.options.get("exclude", ()), *unused]}
            settings = replace(config.adapt, options=options)
            if config.calibration is not None:
                images = self.data.gathered(config.calibration.data or config.source.data)
                settings = self.calibrations.on_images(backbone, settings, config.calibration, images)
            self.adapt(backbone.vit, settings, config.seed)
        return make_net(backbone, config)

    def check_arm(self, config: FewShotConfig) -> None:
        self.data.batches(config)  # opens the sets
        if self.config.pool is None or self.config.arms:  # else experts of a pool, which are built alike
            super().check_arm(config)

    def prepared(self, config: FewShotConfig) -> tuple[EpisodeNet, str, list[Tensor]]:
        if config.adapt is None:
            raise UserError(
                "adapt: trains nothing; an arm of a few-shot run needs a method that trains the backbone. A linear probe is "
                "'frozen+logistic' in evaluate.models."
            )
        net = self.fresh(config)
        if config.meta is None:
            try:
                check_mergeable(self.stock(net), "adapt")
            except UserError as error:
                raise UserError(
                    f"{error} Few-shot models are evaluated with merged weights; a router takes adapt.options.fade: 1."
                ) from error
        return net, config.adapt.method, []

    def stock(self, net: EpisodeNet) -> nn.Module:
        return net.get_submodule("learner.backbone.vit" if isinstance(net, MamlNet) else "backbone.vit")

    def objective(
        self, config: FewShotConfig, net: EpisodeNet, balanced: Sequence[Tensor]
    ) -> EpisodeObjective | AdversarialObjective:
        if isinstance(net, ProtoNet) and config.source.labels == "set":
            pixels, device = self.data.open(config.source.data[0]), runtime.net_device()
            first = [(pixels.labels == label).nonzero()[:_FIRST, 0] for label in range(len(pixels.classes))]
            net.to(device).eval()
            with torch.no_grad():
                found = [net.backbone(pixels[part].to(device)) for part in torch.cat(first).split(100)]
                means = prototypes(torch.cat(found), pixels.labels[torch.cat(first)].to(device))
            net.vectors = nn.Parameter(means)
        if isinstance(config, ExpertConfig) and config.adversary is not None:
            if not isinstance(net, ProtoNet):
                raise UserError("pool: experts classify by prototypes; leave meta out.")
            return AdversarialObjective(net, replace(config.adversary, seed=config.training_seed), draw_corruption)
        return EpisodeObjective(net)

    def step(self, objective: nn.Module, number: int) -> None:
        if number % 10 == 0 and isinstance(objective, AdversarialObjective):
            objective.collapsed(number)

    def training_sets(self) -> dict[str, str]:
        names = dict.fromkeys(name for config in self.study.arms.values() for name in config.source.data)
        opened = {row_name(name): self.data.open(name) for name in names}
        return {name: pixels.content if isinstance(pixels, Pixels) else "" for name, pixels in opened.items()}

    def batches(self, config: FewShotConfig) -> Batches:
        return self.data.batches(config)

    def save(self, net: EpisodeNet, config: FewShotConfig, folder: Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in net.own_tensors().items()}
        atomic_write(folder / OWN_FILE, safetensors.torch.save(tensors))

    def train(self) -> JsonObject:
        about = super().train()
        if self.config.pool is not None:
            ranks.on_first(self._assemble_pools)
        return about

    def _assemble_pools(self) -> None:
        for seed in self.study.seeds:
            experts = []
            for label in pool_members(self.config, self.study.arms):
                folder = next(training.folder for training in self.study.trainings(label) if training.seed == seed)
                experts.append(Expert(label, folder / ADAPTER, read_scale(folder)))
            assemble(experts, self.folder / "pool" / f"seed-{seed}")

    # ---- evaluation -----------------------------------------------------------------------------------------------------

    def evaluated(self) -> list[str]:
        models = evaluated_models(self.config, list(self.study.arms))
        return [model for model in models if split_head(model)[0] not in self.skipped]

    def trainings(self, arm: str) -> list[Training]:
        """Return a placeholder for every seed of an evaluated model, which may be built from several trainings."""
        seeds = self.study.seeds[:1] if arm in self.references else self.study.seeds
        return [Training(arm, 0.0, seed, self.folder) for seed in seeds]

    def models(self, seed: int, name: str = FROZEN) -> Models:
        """Return the models of one training seed. In a run that trains nothing, they are on the backbone of the model `name`."""
        arm = split_head(name)[0] if self.untrained else ""
        if (seed, arm) not in self._models:
            if self.untrained:
                self._models.clear()  # large backbones are kept one at a time
            self._models[seed, arm] = Models(self._data(name), self.study, seed)
        return self._models[seed, arm]

    def _data(self, name: str) -> FewShotData:
        arm = self.untrained.get(split_head(name)[0])
        return self.data if arm is None else self.data.variant(arm)

    def loaded(self, training: Training) -> EpisodeNet:
        return self.models(training.seed).trained(training, merged=False)

    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        models = self.models(training.seed, training.arm)
        evaluation = Evaluation(self.folder, self._data(training.arm))
        if split == "validation":
            return evaluation.validation_scores(models, training)
        with_panel = training.arm == self.evaluated()[-1] and training.seed == self.study.seeds[0]
        return evaluation.scores(models, training.arm, attacks, with_panel=with_panel)

    def evaluate_references(self) -> None:
        if not any(
            feature.models for feature in asked_features(self.config.evaluate)
        ):  # else trained models make the attacks
            super().evaluate_references()

    def check_evaluation(self, attacks: Sequence[AttackConfig] | None) -> None:
        """Leave out untrained arms whose weights cannot be loaded, with a line for each."""
        self.skipped = {}
        for arm in self.untrained:
            try:
                self._data(arm).backbone()
            except WeightsUnavailable as error:
                self.skipped[arm] = str(error)
                console.stage("skip", f"{arm}   left out: {error}")
            except UserError as error:
                raise UserError(f"arms.{arm}: {error}") from error
        if self.untrained and not self.evaluated():
            raise UserError(f"evaluate: the weights of no arm can be had: {next(iter(self.skipped.values()))}")

    def check_merge(self, training: Training) -> None:
        """Do nothing, because every evaluated model except MAML's is merged already."""

    def sections(self, results: Sequence[Result]) -> list[Section]:
        return sections(self.folder, self.config, self.study, results)

    def facts(self) -> JsonObject:
        left_out = {"skipped": self.skipped} if self.untrained else {}
        return {**super().facts(), "evaluation_seed": self.config.evaluate.seed, **left_out}

    # ---- export of one arm ---------------------------------------------------------------------------------------------

    def adapted(self, arm: str | None = None) -> nn.Module:
        """Return the timm model with one arm's adapter. For a pool, also "average" or "average:seed" of all experts."""
        pool, model = self.config.pool, arm
        arm = self._arm_of(arm)
        if pool is None:
            return super().adapted(arm)
        name = (arm or "").partition(":")[0]
        if name == _AVERAGE:
            experts = self._averaged_pool(arm)
            return experts.mixture(experts.uniform()).put_on(self.data.backbone().vit)
        assembled = {expert.label: expert.folder for expert in read_pool(Path(pool.folder))} if pool.folder else {}
        names = list(assembled if pool.folder else self.study.arms)
        if name not in names:
            made = merged_text(self.config, split_head(model or MERGED)[0])  # "" for an unknown name
            reason = f"'{model or MERGED}' is {made}" if made else f"it has no single adapter '{model}'"
            raise UserError(
                f"run '{self.folder}': {reason}; name one expert ({', '.join(names)}), or {_AVERAGE} for the mean of all."
            )
        folder = assembled[name] if pool.folder else self.study.find(arm).folder / ADAPTER
        return load_adapter(self.data.backbone().vit, folder)

    def arm_of(self, model: str) -> str:
        return super().arm_of(model.removeprefix(EXPERT))

    def _arm_of(self, model: str | None) -> str | None:
        """Return the arm of an evaluated model's name ("expert:LABEL", with or without a head). None means the only expert."""
        if model is not None:
            return split_head(model)[0].removeprefix(EXPERT)
        experts = [] if self.config.pool is None else pool_members(self.config, self.study.arms)
        return experts[0] if len(experts) == 1 else None

    def chosen_arm(self, name: str | None) -> str | None:
        # The experts of a pool meet other attacks each, and no validation score compares them.
        return name if self.config.pool is not None else super().chosen_arm(name)

    def name_of(self, arm: str | None = None) -> str:
        arm = self._arm_of(arm)
        name = (arm or "").partition(":")[0]
        if self.config.pool is not None and self.config.pool.folder and name != _AVERAGE:
            return name
        if self.config.pool is not None and name == _AVERAGE:
            return f"{name}-seed-{self._averaged_seed(arm)}"
        return super().name_of(arm)

    def _averaged_seed(self, arm: str | None) -> int:
        """Return the seed in "name:seed", the first seed for "name"."""
        name, _, seed = (arm or "").partition(":")
        seeds = {str(known): known for known in self.study.seeds}
        if seed and seed not in seeds:
            raise UserError(f"run '{self.folder}': '{name}' has no seed '{seed}'; take one of {', '.join(seeds)}.")
        return seeds.get(seed, self.study.seeds[0])

    def _averaged_pool(self, arm: str | None) -> ExpertPool:
        return self.models(self._averaged_seed(arm)).pool()

    def merged(self, arm: str | None = None) -> nn.Module:
        """Return the timm model with one arm's merged weights, or frozen. For a pool, also "average" or "average:seed"."""
        if arm is not None and split_head(arm)[0] == FROZEN:
            return self.data.backbone().vit
        if self.config.pool is not None and (arm or "").partition(":")[0] == _AVERAGE:
            pool = self._averaged_pool(arm)
            backbone = self.data.backbone()
            backbone.load_state_dict(pool.weights(pool.uniform()), strict=False)
            return backbone.vit
        return merge(self.adapted(arm))

    def predict(self, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
        """Write the classes of images among the classes of `options.support`, by the evaluated model that `options.arm` names."""
        name, seed = self._evaluated(options.arm)
        what = f"model '{name}' of the run '{self.folder}'"
        images = images_for(inputs, target, options)
        model, size = self.models(seed, name).task(name), self._data(name).size
        net, classes = fit_few_shot(model, options.support, size, what)
        return predict_classes(net, size, [classes], images, target, options, label=name)

    def _evaluated(self, text: str | None) -> tuple[str, int]:
        """Return the evaluated model and the seed that "model" or "model:seed" names. None means the only trained model."""
        models = self.evaluated()
        trained = [model for model in models if model not in self.references] or models
        if text is None and len(trained) > 1:
            raise UserError(f"run '{self.folder}': it evaluates several models; name one as arm: {', '.join(models)}.")
        text = text or trained[0]
        name, _, seed = text.rpartition(":")
        if text in models or int(seed if seed.isdecimal() else -1) not in self.study.seeds:
            name, seed = text, str(self.study.seeds[0])
        with_head = [model for model in models if split_head(model)[0] == name]
        name = with_head[0] if len(with_head) == 1 else name
        if name not in models:
            raise UserError(f"run '{self.folder}': no evaluated model '{text}'.{near(text, models)}")
        return name, int(seed)

    def graph(self, arm: str | None, form: str) -> Graph:
        """Return the backbone with merged weights, from images to features."""
        backbone = self.data.backbone()
        backbone.vit = self.merged(arm)
        outputs = {"features": {"shape": ["batch", "width"], **self.about(arm)["features"]}}
        return image_graph(Named(backbone), backbone.img_size, outputs)

    def about(self, arm: str | None = None) -> JsonObject:
        """Return where the features are taken and the scale of their cosines, for config.json beside merged weights."""
        features: JsonObject = {"block": self.config.model.block, "pool": self.config.model.pool}
        name, arm = split_head(arm or "")[0].partition(":")[0], self._arm_of(arm)
        beside = {CLEAN_EXPERT, *self.config.arms} & self.study.arms.keys()
        if self.config.pool is not None and name not in beside:
            features["scale"] = self._averaged_pool(arm).scale
            return {"features": features}
        training = self.study.find(arm)  # a training beside the pool has a scale of its own
        if self.study.arms[training.arm].meta is None:
            features["scale"] = read_scale(training.folder)
        return {"features": features}

    def files_beside(self, arm: str | None = None) -> dict[str, bytes]:
        """Return no file, because the weights are the whole few-shot model."""
        return {}


JOB = FewShotJob
