"""The nets of a dense run, each made from the files of its training's folder.

adapter/ or backbone.safetensors (full fine-tuning) or neither (heads alone); heads.safetensors, "<task>.<parameter>"; done.json
last, which says that the training is finished.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from vismt.backbones import vit
from vismt.engine.arms import Unit, unit_config
from vismt.engine.dense_config import DenseConfig, trained_tasks
from vismt.engine.multitask_models import ADAPTER, DONE, adapted, done
from vismt.errors import UserError
from vismt.lowrank.files import atomic_write, read_tensors
from vismt.lowrank.inject import merge
from vismt.lowrank.parts import parts_of
from vismt.lowrank.store import check_tensors, load_adapter, save_adapter
from vismt.multitask.dense import DenseNet, default_blocks
from vismt.multitask.heads import make_head
from vismt.multitask.moefied import MoEfiedMlp
from vismt.seeds import digest, mix_seed

BACKBONE, HEADS = "backbone.safetensors", "heads.safetensors"


def fresh(config: DenseConfig) -> DenseNet:
    """The net before training: the backbone as it is, heads drawn from the configuration's seed and their task's name."""
    model = config.model
    backbone = vit.create(
        model.name, (config.size[0], config.size[1]), model.pretrained, position=model.position, seed=config.seed
    )
    blocks = default_blocks(backbone.depth) if config.blocks is None else config.blocks
    heads = {
        task.name: make_head(
            config.head.name, [backbone.width] * len(blocks), task.channels, seed=mix_seed(config.seed, "head", task.name),
            **config.head.options,
        )
        for task in trained_tasks(config)
    }
    return DenseNet(backbone, heads, blocks)


def routes(net: nn.Module) -> bool:
    """Whether a router still weighs experts, so that no merged weights say the same."""
    return any(isinstance(part, MoEfiedMlp) and part.fade_value != 1 for part in parts_of(net).values())


def save(net: DenseNet, config: DenseConfig, folder: Path, about: dict[str, Any]) -> None:
    """Write a finished training."""
    if config.adapt is not None:
        save_adapter(net.vit, folder / ADAPTER)
    if config.full:
        atomic_write(folder / BACKBONE, safetensors.torch.save(_state(net.vit)))
    atomic_write(folder / HEADS, heads_file(net, config))
    atomic_write(folder / DONE, json.dumps(about))


def heads_file(net: DenseNet, config: DenseConfig) -> bytes:
    """heads.safetensors; its metadata "heads" say which, on which blocks and at which size, so that they can be made again."""
    told = {
        "head": config.head.name, "options": config.head.options, "blocks": net.blocks, "size": config.size,
        "tasks": {task.name: task.channels for task in trained_tasks(config)},
    }
    # One entry: safetensors writes several in an order of its own, and the same heads would be other bytes.
    return safetensors.torch.save(_state(net.heads), metadata={"heads": json.dumps(told)})


def loaded(config: DenseConfig, unit: Unit) -> DenseNet:
    """A trained net as it was trained, not merged; UserError when it is not finished or its files do not fit."""
    what = f"run '{unit.folder}'"
    if done(unit) is None:
        raise UserError(f"{what}: is not trained yet; `vismt train` goes on with it.")
    own = unit_config(config, unit)
    net = fresh(own)
    if adapted(unit):
        load_adapter(net.vit, unit.folder / ADAPTER)
    if own.full:
        _load(net.vit, unit.folder / BACKBONE, what)
    _load(net.heads, unit.folder / HEADS, what)
    return net.requires_grad_(False).eval()


def final(config: DenseConfig, unit: Unit) -> DenseNet:
    """A trained net with its update folded in; as it is where a router still routes."""
    net = loaded(config, unit)
    if adapted(unit) and not routes(net):
        merge(net.vit)
    return net


def fingerprint(unit: Unit) -> str:
    """What tells this training from another: heads are always trained, so their file does."""
    return digest(read_tensors(unit.folder / HEADS, f"run '{unit.folder}': {HEADS}")[0])


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _load(module: nn.Module, path: Path, what: str) -> None:
    tensors = read_tensors(path, f"{what}: {path.name}")[1]
    check_tensors(f"{what}: {path.name}", {name: tuple(value.shape) for name, value in module.state_dict().items()}, tensors)
    module.load_state_dict(tensors)
