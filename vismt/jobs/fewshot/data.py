"""The sets of a few-shot run, opened once at the backbone's resolution, and their training and test episodes."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.backbones.any_module import ModuleBackbone, backbone_of
from vismt.backbones.vit import PixelBackbone
from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.objects import object_named
from vismt.data.batching import Gathered
from vismt.data.formats.python_sets import features_of
from vismt.data.images import ImageSet
from vismt.data.near_duplicates import groups_of
from vismt.data.pixels import Pixels
from vismt.data.set_entries import card_and_split, row_name
from vismt.data.transforms import augment
from vismt.evaluation.sections import asked_features
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.sets import Sets
from vismt.metatune.protocol.episodes import DisjointSampler, EpisodeSampler, VariableSampler
from vismt.metatune.protonet import EpisodeBatches
from vismt.robustness.corruptions import CORRUPTIONS, corrupt
from vismt.uncertainty.features import PIXELS


class Vectors:
    """Precomputed features in the place of pixels: `vectors[index]` is float32 (b, d)."""

    key, content = None, ""

    def __init__(self, images: ImageSet, values: Tensor) -> None:
        self.images, self.values = images, values
        self.name, self.classes, self.labels, self.ids = images.name, images.classes, images.labels, images.ids
        self.group_of: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.values[index]

    def groups(self, index: Tensor) -> tuple[dict[str, str], str]:
        return {}, ""


SELECT_SEED = 2  # of the validation episodes
_PARTS = 5  # more of them are smaller, and a few episodes in each vary more


class FewShotData:
    """Sets by name, 'card' or 'card:split'."""

    def __init__(self, config: FewShotConfig) -> None:
        self.config = config
        self._sets = Sets(config.on_bad_sample, config.download)
        self._pixels: dict[tuple[str, int], Pixels | Vectors] = {}
        self._groups: dict[str, Tensor | None] = {}

    def variant(self, config: FewShotConfig) -> FewShotData:
        """Return the same sets for an arm with another backbone. Sets of one image size are shared."""
        other = FewShotData(config)
        other._sets, other._pixels, other._groups = self._sets, self._pixels, self._groups
        return other

    @cached_property
    def size(self) -> int:
        """The backbone's image size in pixels."""
        return self.config.model.img_size or self.backbone().img_size[0]

    def backbone(self) -> PixelBackbone:
        """Return a copy of the stock backbone."""
        return copy.deepcopy(self._stock)

    @cached_property
    def _stock(self) -> PixelBackbone:
        """The stock backbone, which is never changed. A copy takes less time than building it again."""
        model = self.config.model
        given = object_named(model.name)
        if given is not None:
            return backbone_of(given, model.img_size, block=model.block, pool=model.pool)
        return timm_models.create(
            model.name,
            model.img_size,
            model.pretrained,
            block=model.block,
            position=model.position,
            pool=model.pool,
            dtype=model.dtype,
        )

    def gathered(self, names: Sequence[str]) -> Gathered:
        """Return the images of several sets, with 0 as their labels."""
        sets = [pixels for name in names if isinstance(pixels := self.open(name), Pixels)]
        return Gathered([(pixels, torch.zeros(len(pixels), dtype=torch.long)) for pixels in sets])

    def open(self, name: str) -> Pixels | Vectors:
        """Return the set 'name' or 'name:split' at the backbone's resolution, or its precomputed features."""
        size = self.size
        if (name, size) not in self._pixels:
            card, split = card_and_split(name)
            given = object_named(card)
            features = None if given is None else features_of(given, row_name(card), split)
            if features is None:
                images = self._sets.images(name, grouped=False)
                if isinstance(getattr(self._stock, "vit", None), nn.Identity) and self.config.model.img_size is None:
                    what = f"data '{row_name(name)}': it has images"
                    raise UserError(f"{what}, and nn.Identity() is for precomputed features; give another model.")
                self._pixels[name, size] = Pixels(images, size)
            else:
                images, values = features
                self._check_vectors(row_name(name), values)
                self._pixels[name, size] = Vectors(images, values)
            console.stage("data", f"{row_name(name)}   {len(images.classes)} classes   {len(images):,} images")
        return self._pixels[name, size]

    def _check_vectors(self, name: str, values: Tensor) -> None:
        """Raise UserError for a model and conditions that need pixels."""
        settings = self.config.evaluate
        of_pixels = [feature.key for feature in asked_features(settings) if PIXELS in feature.needs]
        if of_pixels:
            raise UserError(f"data '{name}': it has features and no pixels; leave out {', '.join(of_pixels)}.")
        if self.config.train is not None:
            raise UserError(f"data '{name}': it has features, and training needs images; set train to null.")
        try:
            with torch.no_grad():
                found = self._stock(values[:2]) if isinstance(self._stock, ModuleBackbone) else None
        except (RuntimeError, TypeError, ValueError, IndexError):  # of a module for images
            found = None
        if found is None or len(found) != len(values[:2]):
            raise UserError(
                f"data '{name}': it has features of {values.shape[1]} numbers, which the model does not take; give "
                "nn.Identity(), or a module of such vectors."
            )

    def outside(self, name: str) -> Pixels | Vectors:
        """Return a set of other classes, whose `group_of` says which images are not independent."""
        pixels = self.open(name)
        pixels.group_of = self.groups(name)
        return pixels

    def groups(self, name: str) -> Tensor | None:
        """Return the group of each image of a set, int64 (n,). None if all images are independent."""
        if name not in self._groups:
            images = self.open(name).images
            self._groups[name] = None if images.groups == {} else groups_of(images)
        return self._groups[name]

    def batches(self, config: FewShotConfig) -> EpisodeBatches:
        """Return the training episodes of an arm, by number."""
        source = config.source
        seed = config.training_seed
        sets = [self.open(name) for name in source.data]
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
        pairs = [(pixels.__getitem__, sampler.__getitem__) for pixels, sampler in zip(sets, samplers)]
        return EpisodeBatches(
            pairs, seed=seed, augment=augment if source.augment else None, classes=source.labels == "set"
        )

    def samplers(self, name: str) -> list[EpisodeSampler | VariableSampler]:
        """Return the test episodes of a set, a sampler for each number of shots."""
        settings = self.config.evaluate
        pixels = self.open(name)
        common: dict[str, Any] = {
            "seed": settings.seed,
            "names": pixels.classes,
            "superclass": pixels.images.superclass if settings.hierarchy else None,
            "groups": self.groups(name),
        }
        if settings.rule == "variable":
            nodes = pixels.images.nodes if settings.hierarchy else None
            bounds = {name: getattr(settings, name) for name in ("min_ways", "max_ways", "max_contribution")}
            return [VariableSampler(pixels.labels, nodes=nodes, **bounds, **common)]
        ways = settings.ways_in(name, len(pixels.labels.unique()))
        make: type[EpisodeSampler] = EpisodeSampler
        if settings.sampling == "without_replacement":
            make = DisjointSampler
        elif settings.sampling == "parts":
            common["parts"] = min(_PARTS, settings.episodes)
        return [
            make(pixels.labels, ways=ways, shots=shots, queries=settings.queries, **common) for shots in settings.shots
        ]

    def validation_sampler(self, name: str) -> EpisodeSampler:
        """Return the episodes of the `select` section on a set: other sets, or other splits of a card, than the evaluation."""
        select, pixels = self.config.selection, self.open(name)
        return EpisodeSampler(
            pixels.labels,
            ways=self.config.evaluate.ways_in(name, len(pixels.labels.unique())),
            shots=select.shots,
            queries=select.queries,
            seed=SELECT_SEED,
            names=pixels.classes,
            groups=self.groups(name),
        )


def draw_corruption(images: Tensor, severity: int, seed: int) -> Tensor:
    """Return images (b, 3, h, w) under one of the fifteen corruptions, which the seed draws."""
    return corrupt(images, random.Random(seed).choice(list(CORRUPTIONS)), severity, seed=seed)
