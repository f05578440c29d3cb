"""The nets of a dense run, built from the files in the folders of its trainings.

A folder has adapter/ (unless only heads are trained), heads.safetensors with the tensors "<task>.<parameter>", and done.json,
which is written last and marks the training as finished.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
import torch

from vismt.backbones import timm_models
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.base.seeds import digest, mix_seed
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.jobs.multitask.config import MultitaskConfig, trained_tasks
from vismt.lowrank.model.record import record_of
from vismt.multitask.heads import Head, make_map_head, make_pooled_head
from vismt.multitask.nets import DenseNet, check_blocks, default_blocks
from vismt.multitask.tasks import MapTask, Task
from vismt.multitask.tasks.classes import UnionClassification
from vismt.storage.files import read_tensors

HEADS = "heads.safetensors"


def fresh(config: MultitaskConfig) -> DenseNet:
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


def loaded(config: MultitaskConfig, training: Training, size: tuple[int, int]) -> DenseNet:
    """Return a trained net, not merged, for images of `size`.

    For a size other than the trained size, the position table is resampled once, from the grid of the pretrained weights. If
    training has changed the table or the weights are random, it is resampled from the trained table. Raises UserError if the
    training is not finished or its files do not fit.

    config: Configuration of the training.
    """
    net = fresh(config)
    stock: Any = net.stock
    table = getattr(stock, "pos_embed", None) if isinstance(net.backbone, Backbone) else None
    before = None if table is None or not config.model.pretrained else table.detach().clone()
    what = training_files.restore(net.stock, training)
    training_files.load_state(net.heads, training.folder / HEADS, what)
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
    return digest(read_tensors(training.folder / HEADS, f"run '{training.folder}': {HEADS}")[0])
