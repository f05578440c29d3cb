"""The nets of multi-task runs, built from the files in the folders of their trainings.

A folder has adapter/, unless only heads are trained; head.safetensors with the classifier of a stock model, or heads.safetensors
with the tensors "<task>.<parameter>"; and done.json, written last, which marks the training as finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.backbones import timm_models
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.vit import Backbone, PixelBackbone, classifier_paths, classifiers
from vismt.base.errors import UserError
from vismt.base.identity import weights_digest
from vismt.base.seeds import digest, mix_seed
from vismt.data.batching import Gathered
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.evaluation.sections import asked_features
from vismt.jobs.multitask.config import MultitaskConfig, trained_tasks
from vismt.lowrank.model.record import record_of
from vismt.metatune.features import FeatureStore, features, number
from vismt.multitask.heads import Head, make_map_head, make_pooled_head
from vismt.multitask.nets import DenseNet, check_blocks, default_blocks
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import UnionClassification
from vismt.storage.files import read_tensors
from vismt.uncertainty.features import HEAD
from vismt.uncertainty.last_layers import is_variational, make_head
from vismt.uncertainty.predictive import GaussianHead

HEAD_FILE, HEADS_FILE = "head.safetensors", "heads.safetensors"


class PixelNet(nn.Module):
    """A backbone with a head: images (b, 3, h, w) in [0, 1] -> logits (b, k), or log-probabilities of a Bayesian head.

    Log-probabilities are the logarithm of the probit without draws (vismt/uncertainty/predictive.py). An answer therefore does
    not depend on the other images of the batch, and an attack follows the gradient of the evaluated function.

    Attributes:
        frozen: Whether no training changes the backbone. It then stays in evaluation mode, and computes the features of `stored`
            images once.
    """

    frozen = False

    def __init__(self, backbone: PixelBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        head: Any = self.head
        if isinstance(head, GaussianHead):
            return head.log_probabilities(self.features(images))
        return head(self.features(images)) if self.frozen else self.backbone.logits(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the input (b, d) of the head."""
        if not self.frozen or images.requires_grad or torch.compiler.is_compiling():
            return self.backbone(images)
        with torch.no_grad():
            return features(self.backbone, images)

    def train(self, mode: bool = True) -> PixelNet:
        """Set the mode of the net. With a frozen backbone, only the mode of the head is set."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            self.head.train(mode)
        return self

    @property
    def head(self) -> nn.Module:
        """The classifier of the stock model."""
        return classifiers(self.stock)[0]

    @property
    def heads(self) -> nn.Module:
        """The classifier that is trained, or both of a distilled ViT, whose logits are their mean."""
        found = classifiers(self.stock)
        return found[0] if len(found) == 1 else nn.ModuleList(found)

    @property
    def stock(self) -> nn.Module:
        """The timm model with its classifier."""
        return self.backbone.vit

    def fingerprint(self) -> str:
        return weights_digest(self.stock)


def classifier_net(config: MultitaskConfig, num_classes: int, num_train: int) -> PixelNet:
    """Return the backbone before adaptation, with a head drawn from the configuration's seed. num_train: Training images."""
    model = config.model
    net = PixelNet(
        timm_models.create(
            model.name,
            model.img_size,
            model.pretrained,
            position=model.position,
            num_classes=num_classes,
            new_head=True,
            seed=config.seed,
            dtype=model.dtype,
        )
    )
    head, alone = config.head_name, len(classifiers(net.stock)) == 1
    around = [f"evaluate.{feature.key}" for feature in asked_features(config.evaluate) if HEAD in feature.needs]
    around += [head] if is_variational(head) else []
    if not alone and around:
        raise UserError(
            f"model: {model.name} averages two classifiers, and {around[0]} is around one; take another model."
        )
    if is_variational(head):
        if not isinstance(net.head, nn.Linear):
            raise UserError(
                f"head: '{head}' takes the place of a linear classifier, and {model.name} has a "
                f"{type(net.head).__name__}; set head.name to linear."
            )
        rows = net.head.weight.detach()
        replace_head(net.stock, make_head(head, rows, None, num_train, config.seed, config.head_section.options))
    net.frozen = config.adapt is None and alone
    return net


@contextmanager
def stored(images: Gathered) -> Iterator[Gathered]:
    """Yield images marked as rows of a store of features (vismt/metatune/features.py), which is written at the end."""
    with FeatureStore(images.key) as store:
        yield images.marked(lambda batch, index: number(batch, store, index))


def replace_head(model: nn.Module, head: nn.Module) -> None:
    """Put another classifier in the place of a stock model's."""
    model.set_submodule(classifier_paths(model)[0], head)


def with_linear_head(model: nn.Module) -> nn.Module:
    """Replace a Bayesian head of a stock model by the linear head of its means, which timm can load."""
    head = classifiers(model)[0]
    if isinstance(head, GaussianHead):
        linear = nn.Linear(head.mean.shape[1], head.mean.shape[0])
        linear.load_state_dict({"weight": head.mean.detach(), "bias": torch.zeros(len(head.mean))})
        linear.register_forward_pre_hook(timm_models.widen_inputs)
        replace_head(model, linear)
    return model


def load_head(net: PixelNet, training: Training) -> PixelNet:
    """Load the adapter and head of a training into a fresh net.

    Raises UserError for an unfinished training and for files that do not fit.
    """
    what = training_files.restore(net.stock, training)
    training_files.load_state(net.heads, training.folder / HEAD_FILE, what)
    return net.requires_grad_(False).eval()


def maps_net(config: MultitaskConfig) -> DenseNet:
    """Return the net before training: stock backbone, heads drawn from the seed of the configuration and the name of the task."""
    backbone = make_backbone(config, (config.size[0], config.size[1]))
    blocks = default_blocks(backbone.depth) if config.blocks is None else config.blocks
    widths = [backbone.widths[block] for block in check_blocks(blocks, backbone.depth)]
    tasks = trained_tasks(config)
    union = [task.name for task in tasks if isinstance(task, UnionClassification)]
    return DenseNet(backbone, {task.name: _head(config, task, widths) for task in tasks}, blocks, union)


def _head(config: MultitaskConfig, task: Task, widths: list[int]) -> Head:
    seed = mix_seed(config.seed, "head", task.name)
    if isinstance(task, MapTask):
        return make_map_head(config.head_name, widths, task.channels, seed=seed, **config.head_section.options)
    return make_pooled_head(widths, task.channels, seed=seed)


def make_backbone(config: MultitaskConfig, size: tuple[int, int]) -> Backbone | Pyramid:
    """Return the stock backbone for images of `size` in pixels. Raise UserError if the size does not fit the patches."""
    model = config.model
    backbone = timm_models.create(
        model.name, size, model.pretrained, position=model.position, seed=config.seed, dtype=model.dtype
    )
    if not backbone.depth:
        raise UserError(
            f"model: timm's {model.name} gives no maps of its stages, which heads read; take another model."
        )
    return backbone


def heads_file(net: DenseNet, config: MultitaskConfig) -> bytes:
    """Return the bytes of heads.safetensors. Its metadata entry "heads" describes the heads, so that they can be built again."""
    about = {
        "head": config.head_name,
        "options": config.head_section.options,
        "blocks": net.blocks,
        "size": config.size,
        "tasks": {task.name: task.channels for task in trained_tasks(config)},
        "labels": config.head_section.labels,
        "pooled": [task.name for task in trained_tasks(config) if not isinstance(task, MapTask)],
    }
    # A single entry: safetensors writes several in varying order, and equal heads would give different bytes.
    return safetensors.torch.save(training_files.state(net.heads), metadata={"heads": json.dumps(about)})


def loaded_maps(config: MultitaskConfig, training: Training, size: tuple[int, int]) -> DenseNet:
    """Return a trained net, not merged, for images of `size`.

    For a size other than the trained size, the position table is resampled once, from the grid of the pretrained weights. If
    training has changed the table or the weights are random, it is resampled from the trained table. Raises UserError if the
    training is not finished or its files do not fit.

    config: Configuration of the training.
    """
    net = maps_net(config)
    stock: Any = net.stock
    table = getattr(stock, "pos_embed", None) if isinstance(net.backbone, Backbone) else None
    before = None if table is None or not config.model.pretrained else table.detach().clone()
    what = training_files.restore(net.stock, training)
    training_files.load_state(net.heads, training.folder / HEADS_FILE, what)
    if size != net.backbone.img_size:
        kept = before is not None and torch.equal(stock.pos_embed, before)
        pretrained: Any = make_backbone(config, size).vit if kept else None
        grid: Any = getattr(net.backbone, "grid", None)  # of a table of positions
        net.backbone.set_input_size(size, pretrained.pos_embed if kept else None)
        record = record_of(stock)
        if record is not None and "pos_embed" in record.also_train:
            from timm.layers import resample_abs_pos_embed

            new: Any = net.backbone.grid
            trained = record.also_train["pos_embed"]  # (1, prefix + rows * columns, d)
            prefix = trained.shape[1] - grid[0] * grid[1]
            record.also_train["pos_embed"] = resample_abs_pos_embed(
                trained, list(new), list(grid), num_prefix_tokens=prefix
            )
    return net.requires_grad_(False).eval()


def fingerprint(training: Training) -> str:
    """Return the weight fingerprint of a training: the digest of its heads, which are always trained."""
    training_files.check_files(training.folder)
    return digest(read_tensors(training.folder / HEADS_FILE, f"run '{training.folder}': {HEADS_FILE}")[0])
