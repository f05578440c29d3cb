"""Any module as a backbone or a classifier of images in [0, 1], for models that are given as Python objects."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vismt.backbones.vit import NEEDED, Backbone, PixelBackbone
from vismt.base.errors import UserError

UNKNOWN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and deviation of a model that normalises its images itself


class ModuleBackbone(PixelBackbone):
    """Features (b, d) of images (b, 3, h, w) in [0, 1], floating point, by any module; `vit` is the module.

    A model of timm gets images normalised by its pretrained_cfg and gives the features before its classifier. Any other module
    gets the images as they are, and its output, flattened, is the feature.

    Args:
        model: the module.
        img_size: pixels of the square images.
    """

    def __init__(self, model: nn.Module, img_size: int) -> None:
        super().__init__()
        self.vit = model
        self.img_size = (img_size, img_size)
        settings = getattr(model, "pretrained_cfg", None) or {}
        for name, values in zip(("mean", "std"), UNKNOWN):
            self.register_buffer(name, torch.tensor(settings.get(name, values)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.vit
        if not hasattr(model, "forward_head"):
            return model(images).flatten(1)
        normalised = (images - self.mean) / self.std
        return model.forward_head(model.forward_features(normalised), pre_logits=True).flatten(1)


def backbone_of(
    model: nn.Module, img_size: int | None, *, block: int | None = None, pool: str | None = None
) -> PixelBackbone:
    """Return a copy of a model as a backbone: a ViT of timm as `Backbone`, any other module as `ModuleBackbone`.

    img_size: pixels, None for the size of a timm model. Raises UserError for a size that the model does not have, and for
    block and pool of a model that is not a ViT of timm.
    """
    model = copy.deepcopy(model)
    if all(hasattr(model, name) for name in NEEDED):
        backbone = Backbone(model, block=block, pool=pool)
        if img_size is not None and backbone.img_size != (img_size, img_size):
            backbone.set_input_size((img_size, img_size))
        return backbone
    if block is not None or pool is not None:
        raise UserError(f"model: block and pool are for ViTs of timm; {type(model).__name__} gives its own features.")
    return ModuleBackbone(model, size_of(model, img_size))


def size_of(model: nn.Module, img_size: int | None) -> int:
    """Return the pixels of a model's square images: `img_size`, else that of a timm model. Raises UserError for neither."""
    embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    settings = getattr(model, "pretrained_cfg", None) or {}
    if img_size is None and embed is None and "input_size" not in settings:
        raise UserError(f"model: {type(model).__name__} does not say the size of its images; give img_size in pixels.")
    return int(img_size or (embed or settings["input_size"])[-1])
