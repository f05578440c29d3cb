"""Any module as a backbone of images in [0, 1], for models that are given as Python objects."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor, nn

from vismt.backbones.pyramid import Pyramid, image_size
from vismt.backbones.timm_models import as_backbone, check_stages, forward_runs
from vismt.backbones.vit import PixelBackbone
from vismt.base.errors import UserError

UNKNOWN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and deviation of a model that normalises its images itself


class ModuleBackbone(PixelBackbone):
    """Features (b, d) of images (b, 3, h, w), floating point in [0, 1], by any module.

    The features are the module's output, flattened.

    Args:
        model: Module that gets the images as they are.
        img_size: Height and width of the square images in pixels.
    """

    def __init__(self, model: nn.Module, img_size: int) -> None:
        super().__init__(model, (img_size, img_size), *UNKNOWN)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images).flatten(1)


def backbone_of(
    model: nn.Module, img_size: int | None, *, block: int | None = None, pool: str | None = None
) -> PixelBackbone:
    """Return a copy of a model as a backbone: a model of timm as `Backbone` or `Pyramid`, any other model as `ModuleBackbone`.

    Args:
        model: Model to copy.
        img_size: Height and width in pixels. None for the size of a timm model.
        block: Block of a ViT of timm, as in `create`.
        pool: Pooling of a ViT of timm, as in `create`.

    Raises:
        UserError: The model does not take images of the size, or block or pool is given for a model that is not a ViT of timm.
    """
    model = copy.deepcopy(model)
    if hasattr(model, "forward_head"):
        backbone = as_backbone(model, None, block=block, pool=pool, name=type(model).__name__)
        if img_size is not None and backbone.img_size != (img_size, img_size):
            own = backbone.img_size
            backbone.set_input_size((img_size, img_size))
            if isinstance(backbone, Pyramid):
                check_stages(backbone.img_size, type(model).__name__, partial(_runs_at, backbone), own)
        return backbone
    if block is not None or pool is not None:
        raise UserError(f"model: block and pool are for ViTs of timm; {type(model).__name__} gives its own features.")
    # Precomputed features pass through it.
    size = 1 if isinstance(model, nn.Identity) else img_size or image_size(model)[-1]
    return ModuleBackbone(model, size)


def _runs_at(backbone: Pyramid, size: tuple[int, int]) -> bool:
    """Return whether a copy of a hierarchical model takes an image of `size`."""
    trial = copy.deepcopy(backbone).to(next(backbone.parameters()).device).eval()
    image = trial.mean.new_zeros(1, trial.mean.shape[1], *size)

    def run() -> None:
        if trial.img_size != size:
            trial.set_input_size(size)
        trial(image)

    return forward_runs(run)
