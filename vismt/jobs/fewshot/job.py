"""The few-shot job: meta-tune an adapted ViT on episodes, evaluate it frozen and adapted on other domains, clean and robust."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vismt import console
from vismt.backbones import vit
from vismt.data.images import ImageSet, open_images
from vismt.data.pixels import Pixels
from vismt.data.transforms import augment
from vismt.engine import runtime
from vismt.engine.log import record_stem, write_lines
from vismt.jobs.fewshot import masking_report as masking
from vismt.jobs.fewshot.config import FewShotConfig, check, models
from vismt.jobs.fewshot.models import Models
from vismt.jobs.fewshot.pool_training import train_one, train_pool
from vismt.lowrank.layer_spec import AdaptReport, factor_rank
from vismt.lowrank.store import load_adapter
from vismt.lowrank.targets import check_patterns
from vismt.metatune.episodes import EpisodeSampler, VariableSampler
from vismt.metatune.maml import LinearLearner, MamlObjective
from vismt.metatune.objective import EpisodeBatches, EpisodeObjective
from vismt.metatune.pool import assemble
from vismt.metatune.protocol import mean_interval, run_protocol
from vismt.metatune.protonet import ProtoNet
from vismt.registry import adapt
from vismt.robustness.conditions import AttackConfig, Condition, CorruptionConfig, conditions, summary
from vismt.robustness.masking import check_episodes
from vismt.robustness.transfer import Source
from vismt.seeds import digest


class FewShotJob:
    """Train, evaluate and merge for one run folder."""

    def __init__(self, config: FewShotConfig, folder: Path, config_hash: str) -> None:
        self.config, self.folder, self.hash = config, folder, config_hash
        check(config)
        self._pixels: dict[str, Pixels] = {}
        self._models = Models(config, folder, self._backbone, self._open)
        self._told: AdaptReport | None = None

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.config.adapt is not None and self.config.train is not None

    def train(self) -> dict[str, Any]:
        """Meta-tune one adapter, or the experts of a pool; what run.json says of the adaptation."""
        config = self.config
        if not self.trains or (config.pool is not None and config.pool.folder):
            return {}
        for (
            name
        ) in config.evaluate.data:  # a set that is not here, or too small, is said before the training, not after
            self._samplers(self._open(name))
        accelerator = runtime.accelerator(config.train.precision, config.train.trackers, self.folder)
        if config.train.trackers:
            accelerator.init_trackers("vismt")
        if config.pool is None:
            proto = self._adapted()
            model = proto.backbone.vit
            objective = EpisodeObjective(proto)
            if config.meta is not None:
                objective = MamlObjective(
                    LinearLearner(proto.backbone, config.source.ways, seed=config.seed), config.meta
                )
            train_one(
                objective,
                self._batches(config.seed),
                config.train,
                self.folder,
                self.hash,
                accelerator,
                model,
                seed=config.seed,
            )
        else:
            experts = train_pool(
                config, self.folder, self.hash, accelerator, adapted=self._adapted, batches=self._batches
            )
            if accelerator.is_main_process:
                assemble(experts, self.folder / "pool")
            accelerator.wait_for_everyone()
        if config.train.trackers:
            accelerator.end_training()
        if self._told is None:  # every expert was done before
            self._adapted()
        told = self._told
        return {
            "method": told.method,
            "rank": factor_rank(told.sites),
            "trainable": told.trainable,
            "total": told.total,
        }

    def _adapted(self) -> ProtoNet:
        """A fresh backbone with untrained factors."""
        config, backbone = self.config, self._backbone()
        options = dict(config.adapt.options)
        unused = [re.escape(name) + r"\..*" for name in backbone.unused_modules()]
        options["exclude"] = [*options.get("exclude", ()), *unused]
        told = adapt(
            backbone.vit,
            config.adapt.method,
            config.adapt.targets,
            config.adapt.rank,
            config.adapt.alpha,
            config.seed,
            **options,
        )
        trims = [config.merging.trim, *(config.select.trim if config.select is not None else ())]
        for trim in trims if config.pool is not None else ():  # before the training, which another value would repeat
            check_patterns("merging.trim", trim, [site.path for site in told.sites])
        for line in [told.summary(), *(f"left out: {remark}" for remark in told.skipped)] if self._told is None else ():
            console.stage("adapt", line)
        self._told = told
        return ProtoNet(backbone)

    def evaluate(self, attacks: list[AttackConfig] | None = None) -> list[dict[str, Any]]:
        """Rows of every domain, protocol, model and condition; interrupted evaluations go on at their episode."""
        settings = self.config.evaluate
        rows = []
        for name in settings.data:
            pixels = self._open(name)
            own = self._conditions(name, settings.attacks, settings.corruptions)
            specs = own if attacks is None else self._conditions(name, attacks, [])
            # Other attacks than the configuration's keep records of their own, named by all of their settings.
            apart, known = (json.dumps([dict(one.settings()) for one in some], sort_keys=True) for some in (specs, own))
            ending = "" if apart == known else f"-{digest(apart.encode())[:8]}"
            for sampler in self._samplers(pixels):
                for model in models(self.config):
                    rows += self._evaluate_one(name, pixels, sampler, model, specs, ending)
        if settings.masking and attacks is None:
            self._check_masking()
        return rows

    def _conditions(
        self, data: str, attacks: Sequence[AttackConfig], corruptions: Sequence[CorruptionConfig]
    ) -> list[Condition]:
        def source(model: str) -> Source:
            return Source(model, self._models.task(model, data), self._models.fingerprint(model, data))

        return conditions(attacks, corruptions, source)

    def _check_masking(self) -> None:
        """The check of every model on every set, with the first of its protocols; writes masking.jsonl."""
        lines = []
        for model in models(self.config):
            for name in self.config.evaluate.data:
                pixels = self._open(name)
                sampler = self._samplers(pixels)[0]
                shown, protocol = _shown(name), str(sampler)
                found = check_episodes(
                    self._models.task(model, name),
                    pixels,
                    sampler,
                    episodes=self.config.evaluate.masking_episodes,
                    records=self.folder / "masking" / f"{record_stem(shown, protocol, model)}.jsonl",
                    data=name,
                    fingerprint=self._models.fingerprint(model, name),
                    label=f"{shown} {protocol} {model} by radius",
                )
                lines.append(masking.line(shown, protocol, model, found, self.hash))
            console.stage("masking", masking.told([one for one in lines if one["model"] == model]))
        write_lines(self.folder / masking.LINES, lines)

    def adapted(self, expert: str | None = None) -> nn.Module:
        """The timm model with the run's adapter; of a pool, with one expert's or their "average"."""
        stock = self._backbone().vit
        if expert == "average" and self.config.pool is not None:
            pool = self._models.pool()
            return pool.mixture(pool.uniform()).put_on(stock)
        return load_adapter(stock, self._models.adapter(expert))

    def merged(self, expert: str | None = None) -> nn.Module:
        """The stock timm model with the adapter folded in; of a pool, with one expert or the "average"."""
        return self._models.one(expert)

    def about(self) -> dict[str, Any]:
        """Nothing besides: a few-shot model has no classes of its own."""
        return {}

    def beside(self, expert: str | None = None) -> dict[str, bytes]:
        """No file: all of a few-shot model is in its weights."""
        return {}

    def _evaluate_one(
        self,
        name: str,
        pixels: Pixels,
        sampler: EpisodeSampler | VariableSampler,
        model: str,
        specs: list[Condition],
        ending: str,
    ) -> list[dict[str, Any]]:
        settings = self.config.evaluate
        shown, protocol = _shown(name), str(sampler)
        stem = f"{shown}-{protocol.replace(' ', '-')}"
        found = run_protocol(
            self._models.task(model, name),
            pixels,
            sampler,
            episodes=settings.episodes,
            attacks=specs,
            records=self.folder / "records" / f"{record_stem(shown, protocol, model)}{ending}.jsonl",
            panel=self.folder / "panels" / f"{stem}.npz" if model == models(self.config)[-1] and not ending else None,
            data=name,
            fingerprint=self._models.fingerprint(model, name),
            label=f"{shown} {protocol} {model}",
        )
        rows = []
        for condition, values in found.items():
            value, half = mean_interval(values)
            rows.append(
                {
                    "data": shown,
                    "protocol": protocol,
                    "condition": condition,
                    "metric": "accuracy",
                    "model": model,
                    "value": value,
                    "ci95": half,
                    "n": len(values),
                    "unit": "episodes",
                    "seed": settings.seed,
                    "config_hash": self.hash,
                }
            )
        text = summary([(row["condition"], row["value"], row["ci95"]) for row in rows])
        console.stage("eval", f"{shown}  {protocol}  {model}   {text}   (n = {settings.episodes} episodes)")
        return rows

    def _backbone(self) -> vit.Backbone:
        model = self.config.model
        return vit.create(
            model.name, model.img_size, model.pretrained, block=model.block, position=model.position, pool=model.pool
        )

    def _batches(self, seed: int) -> EpisodeBatches:
        source = self.config.source
        sets = [self._open(name) for name in source.data]
        samplers = [
            EpisodeSampler(
                pixels.labels,
                ways=source.ways,
                shots=source.shots,
                queries=source.queries,
                seed=seed,
                superclass=pixels.images.superclass if source.hierarchy else None,
                names=pixels.classes,
            )
            for pixels in sets
        ]
        change = None
        if source.augment:

            def change(images: torch.Tensor, number: int) -> torch.Tensor:
                return augment(images, number, crop=(source.crop, 1.0), jitter=source.jitter, flip=source.flip)

        return EpisodeBatches(
            [(pixels.__getitem__, sampler.__getitem__) for pixels, sampler in zip(sets, samplers)],
            seed=seed,
            augment=change,
        )

    def _samplers(self, pixels: Pixels) -> list[EpisodeSampler | VariableSampler]:
        settings = self.config.evaluate
        superclass = pixels.images.superclass if settings.hierarchy else None
        common = {
            "seed": settings.seed,
            "names": pixels.classes,
            "superclass": superclass,
            "classes": self._models.selection.classes(pixels, "test"),
        }
        if settings.rule == "variable":
            nodes = pixels.images.nodes if settings.hierarchy else None
            bounds = {name: getattr(settings, name) for name in ("min_ways", "max_ways", "max_contribution")}
            return [VariableSampler(pixels.labels, nodes=nodes, **bounds, **common)]
        return [
            EpisodeSampler(pixels.labels, ways=settings.ways, shots=shots, queries=settings.queries, **common)
            for shots in settings.shots
        ]

    def _open(self, name: str) -> Pixels:
        """The set 'name' or 'name:split' at the backbone's resolution."""
        if name not in self._pixels:
            card, _, split = name.partition(":")
            images: ImageSet = open_images(
                card, split or "all", on_bad_sample=self.config.on_bad_sample, download=self.config.download
            )
            size = self.config.model.img_size or self._backbone().img_size[0]
            self._pixels[name] = Pixels(images, size)
            console.stage("data", f"{name}   {len(images.classes)} classes   {len(images):,} images")
        return self._pixels[name]


def _shown(name: str) -> str:
    """A set's name in rows and file names."""
    return name.replace(":", "-").replace("/", "-")


CONFIG, JOB = FewShotConfig, FewShotJob
