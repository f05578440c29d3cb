"""The nets of a multi-task run, each made from the files of its training's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from vismt.backbones import vit
from vismt.backbones.vit import Backbone
from vismt.engine.arms import Unit, unit_config
from vismt.engine.multitask_config import MultitaskConfig
from vismt.errors import UserError
from vismt.lowrank.files import atomic_write, read_json, read_tensors
from vismt.lowrank.inject import merge
from vismt.lowrank.parts import parts_of
from vismt.lowrank.store import check_tensors, fingerprint, load_adapter, save_adapter
from vismt.multitask.moefied import MoEfiedMlp

ADAPTER, HEAD, DONE = "adapter", "head.safetensors", "done.json"


class PixelNet(nn.Module):
    """A backbone with timm's head: images (b, 3, h, w) in [0, 1] -> logits (b, C)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images)

    @property
    def vit(self) -> nn.Module:
        """The timm model, its classifier `head` included."""
        return self.backbone.vit

    def routes(self) -> bool:
        """Whether a router still weighs experts, so that no merged weights say the same."""
        return any(isinstance(part, MoEfiedMlp) and part.fade_value != 1 for part in parts_of(self).values())

    def fingerprint(self) -> str:
        """What tells the weights of this net from another's."""
        return fingerprint(self.vit, [path for path, module in self.vit.named_modules() if isinstance(module, nn.Linear)])


def fresh(config: MultitaskConfig, num_classes: int) -> PixelNet:
    """The backbone before adaptation, its head drawn from the configuration's seed."""
    model = config.model
    return PixelNet(vit.create(
        model.name, model.img_size, model.pretrained, position=model.position, num_classes=num_classes, new_head=True,
        seed=config.seed,
    ))


def save(net: PixelNet, folder: Path, adapted: bool, about: dict[str, Any]) -> None:
    """Write adapter/ and head.safetensors; done.json last, which says that the training is finished."""
    if adapted:
        save_adapter(net.vit, folder / ADAPTER)
    head = {name: value.detach().cpu().contiguous() for name, value in net.vit.head.state_dict().items()}
    atomic_write(folder / HEAD, safetensors.torch.save(head))
    atomic_write(folder / DONE, json.dumps(about))


def done(unit: Unit) -> dict[str, Any] | None:
    """What `save` was told of a finished training, None for one that is not."""
    return read_json(unit.folder / DONE, f"run '{unit.folder}'") if (unit.folder / DONE).exists() else None


def adapted(unit: Unit) -> bool:
    """Whether a finished training has an adapter beside its head."""
    return (unit.folder / ADAPTER).is_dir()


def loaded(config: MultitaskConfig, unit: Unit, num_classes: int) -> PixelNet:
    """A trained net as it was trained, not merged; UserError when it is not finished or its files do not fit."""
    what = f"run '{unit.folder}'"
    if done(unit) is None:
        raise UserError(f"{what}: is not trained yet; `vismt train` goes on with it.")
    net = fresh(unit_config(config, unit), num_classes)
    if adapted(unit):
        load_adapter(net.vit, unit.folder / ADAPTER)
    tensors = read_tensors(unit.folder / HEAD, f"{what}: {HEAD}")[1]
    head = net.vit.head
    check_tensors(f"{what}: {HEAD}", {name: tuple(value.shape) for name, value in head.state_dict().items()}, tensors)
    head.load_state_dict(tensors)
    return net.requires_grad_(False).eval()


def final(config: MultitaskConfig, unit: Unit, num_classes: int) -> PixelNet:
    """A trained net with its update folded in; as it is where a router still routes."""
    net = loaded(config, unit, num_classes)
    if adapted(unit) and not net.routes():
        merge(net.vit)
    return net
