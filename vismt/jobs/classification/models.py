"""The net of a multi-task run, and its head's file head.safetensors beside the adapter."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from vismt.backbones import vit
from vismt.backbones.vit import Backbone
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.files import atomic_write
from vismt.jobs.classification.config import MultitaskConfig
from vismt.lowrank.store import fingerprint

HEAD = "head.safetensors"


class PixelNet(nn.Module):
    """A backbone with timm's head: images (b, 3, h, w) in [0, 1] -> logits (b, k)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images)

    @property
    def stock(self) -> nn.Module:
        """The timm model with its classifier `head`."""
        return self.backbone.vit

    def fingerprint(self) -> str:
        """Return the fingerprint of the net's weights."""
        return fingerprint(
            self.stock, [path for path, module in self.stock.named_modules() if isinstance(module, nn.Linear)]
        )


def fresh(config: MultitaskConfig, num_classes: int) -> PixelNet:
    """Return the backbone before adaptation, its head drawn from the configuration's seed."""
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
            dtype=model.dtype,
        )
    )


def save_head(net: PixelNet, folder: Path) -> None:
    """Write head.safetensors."""
    atomic_write(folder / HEAD, safetensors.torch.save(training_files.state(net.stock.get_submodule("head"))))


def load_head(net: PixelNet, training: Training) -> PixelNet:
    """Load the adapter and head of a training into a fresh net.

    Raises UserError for an unfinished training and for files that do not fit.
    """
    what = training_files.restore(net.stock, training)
    training_files.load_state(net.stock.get_submodule("head"), training.folder / HEAD, what)
    return net.requires_grad_(False).eval()
