"""The nets of a multi-task run, each made from the files of its training's folder."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from vismt.backbones import vit
from vismt.backbones.vit import Backbone
from vismt.engine import study_files
from vismt.engine.arms import Unit, unit_config
from vismt.files import atomic_write
from vismt.jobs.classification.config import MultitaskConfig
from vismt.lowrank.store import fingerprint

HEAD = "head.safetensors"


class PixelNet(nn.Module):
    """A backbone with timm's head: images (b, 3, h, w) in [0, 1] -> logits (b, C)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images)

    @property
    def stock(self) -> nn.Module:
        """The timm model, its classifier `head` included."""
        return self.backbone.vit

    def fingerprint(self) -> str:
        """What tells the weights of this net from another's."""
        return fingerprint(
            self.stock, [path for path, module in self.stock.named_modules() if isinstance(module, nn.Linear)]
        )


def fresh(config: MultitaskConfig, num_classes: int) -> PixelNet:
    """The backbone before adaptation, its head drawn from the configuration's seed."""
    model = config.model
    return PixelNet(
        vit.create(
            model.name,
            model.img_size,
            model.pretrained,
            position=model.position,
            num_classes=num_classes,
            new_head=True,
            seed=config.seed,
        )
    )


def save_head(net: PixelNet, folder: Path) -> None:
    """Write head.safetensors."""
    atomic_write(folder / HEAD, safetensors.torch.save(study_files.state(net.stock.head)))


def loaded(config: MultitaskConfig, unit: Unit, num_classes: int) -> PixelNet:
    """A trained net as it was trained, not merged; UserError when it is not finished or its files do not fit."""
    net = fresh(unit_config(config, unit), num_classes)
    study_files.load_state(net.stock.head, unit.folder / HEAD, study_files.restore(net, unit))
    return net.requires_grad_(False).eval()
