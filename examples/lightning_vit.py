"""Train a ViT with EMTAL's mixture of low-rank experts in Lightning.

Its routers fade, so that the result merges into a stock model.

pip install lightning && python examples/lightning_vit.py
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vismt
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.multitask.emtal.fading import FadeConfig

try:
    import lightning.pytorch as pl

    from vismt.integrations.lightning import VismtCallback
except ImportError:
    sys.exit("error: lightning is not installed: pip install lightning")


class Classifier(pl.LightningModule):
    """A timm ViT with an adapter and a new head."""

    def __init__(self, name: str, size: int, classes: int, pretrained: bool) -> None:
        super().__init__()
        self.vit = timm.create_model(name, pretrained=pretrained, img_size=size, num_classes=classes)
        vismt.adapt(self.vit, "emtal", rank=4, n_experts=4, also_train=["head"])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.vit(batch[0] * 2 - 1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser of what is trained."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def main(
    out: str | Path = "runs/lightning_vit",
    name: str = "vit_tiny_patch16_224.augreg_in21k",
    size: int = 64,
    steps: int = 100,
    pretrained: bool = True,
) -> torch.nn.Module:
    """Return the stock model with merged weights."""
    images = open_images("digits")
    pixels = Pixels(images, size)
    module = Classifier(name, size, len(images.classes), pretrained)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=out,
        logger=False,
        callbacks=[VismtCallback(fade=FadeConfig(0.0, 0.5))],
    )
    trainer.fit(module, DataLoader(TensorDataset(pixels[torch.arange(256)], images.labels[:256]), 32, shuffle=True))
    return vismt.merge(module.vit)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the hub did not answer, and the cache lacks the weights
        sys.exit(f"error: {str(error).splitlines()[0]}")
