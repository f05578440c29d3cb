"""The nets of a dense run, each made from the files of its training's folder.

adapter/ or backbone.safetensors (full fine-tuning) or neither (heads alone); heads.safetensors, "<task>.<parameter>"; done.json
last, which says that the training is finished.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from vismt.backbones import vit
from vismt.engine import study_files
from vismt.engine.arms import Unit, unit_config
from vismt.files import atomic_write, read_tensors
from vismt.jobs.dense.config import DenseConfig, trained_tasks
from vismt.multitask.dense import DenseNet, default_blocks
from vismt.multitask.heads import Head, make_head, make_pooled_head
from vismt.multitask.tasks import DenseTask, MapTask
from vismt.seeds import digest, mix_seed

BACKBONE, HEADS = "backbone.safetensors", "heads.safetensors"


def fresh(config: DenseConfig) -> DenseNet:
    """The net before training: the backbone as it is, heads drawn from the configuration's seed and their task's name."""
    backbone = make_backbone(config, (config.size[0], config.size[1]))
    blocks = default_blocks(backbone.depth) if config.blocks is None else config.blocks
    widths = [backbone.width] * len(blocks)
    return DenseNet(backbone, {task.name: _head(config, task, widths) for task in trained_tasks(config)}, blocks)


def _head(config: DenseConfig, task: DenseTask, widths: list[int]) -> Head:
    """The configured head, but for a task of whole images, which has one kind."""
    seed = mix_seed(config.seed, "head", task.name)
    if isinstance(task, MapTask):
        return make_head(config.head.name, widths, task.channels, seed=seed, **config.head.options)
    return make_pooled_head(widths, task.channels, seed=seed)


def make_backbone(config: DenseConfig, size: tuple[int, int]) -> vit.Backbone:
    """The backbone as it is, for images of `size`; UserError for one that does not fit the patches."""
    model = config.model
    return vit.create(model.name, size, model.pretrained, position=model.position, seed=config.seed)


def save(net: DenseNet, config: DenseConfig, folder: Path) -> None:
    """Write backbone.safetensors where it is trained, and heads.safetensors."""
    if config.full:
        atomic_write(folder / BACKBONE, safetensors.torch.save(study_files.state(net.stock)))
    atomic_write(folder / HEADS, heads_file(net, config))


def heads_file(net: DenseNet, config: DenseConfig) -> bytes:
    """heads.safetensors; its metadata "heads" say which, on which blocks and at which size, so that they can be made again."""
    told = {
        "head": config.head.name,
        "options": config.head.options,
        "blocks": net.blocks,
        "size": config.size,
        "tasks": {task.name: task.channels for task in trained_tasks(config)},
        "pooled": [task.name for task in trained_tasks(config) if not isinstance(task, MapTask)],
    }
    # One entry: safetensors writes several in an order of its own, and the same heads would be other bytes.
    return safetensors.torch.save(study_files.state(net.heads), metadata={"heads": json.dumps(told)})


def loaded(config: DenseConfig, unit: Unit, size: tuple[int, int] | None = None) -> DenseNet:
    """A trained net, not merged, for images of `size` (the trained one).

    The position table for another size is that of the stock weights, resampled once from their own grid; where training has
    changed it, the trained one. UserError when the training is not finished or its files do not fit.
    """
    own = unit_config(config, unit)
    net = fresh(own)
    what = study_files.restore(net, unit)
    if own.full:
        study_files.load_state(net.stock, unit.folder / BACKBONE, what)
    study_files.load_state(net.heads, unit.folder / HEADS, what)
    if size is not None and size != net.backbone.img_size:
        net.backbone.set_input_size(
            size, None if own.full else getattr(make_backbone(own, size).vit, "pos_embed", None)
        )
    return net.requires_grad_(False).eval()


def fingerprint(unit: Unit) -> str:
    """What tells this training from another: heads are always trained, so their file does."""
    return digest(read_tensors(unit.folder / HEADS, f"run '{unit.folder}': {HEADS}")[0])
