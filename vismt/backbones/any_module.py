"""Any module as a backbone of images in [0, 1], for models that are given as Python objects."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn

from vismt.backbones.pyramid import Pyramid, image_size
from vismt.backbones.timm_models import as_backbone, check_stages, forward_runs
from vismt.backbones.vit import PixelBackbone
from vismt.base import console
from vismt.base.errors import UserError

UNKNOWN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and deviation of a model that normalises its images itself


class ModuleBackbone(PixelBackbone):
    """Features (b, d) of images (b, 3, h, w), floating point in [0, 1], by any module.

    The features are the module's output, pooled as `pooled` says.

    Args:
        model: Module that gets the images as they are.
        img_size: Height and width of the square images in pixels.
    """

    def __init__(self, model: nn.Module, img_size: int) -> None:
        super().__init__(model, (img_size, img_size), *UNKNOWN)

    def forward(self, images: Tensor) -> Tensor:
        features = pooled(self.vit(images), type(self.vit).__name__)
        if not torch.is_grad_enabled() and not bool(features.isfinite().all()):
            bad = int((~features.isfinite().all(1)).sum())
            raise UserError(
                f"model: {type(self.vit).__name__} gives features that are not finite for {bad} of {len(features)} images."
            )
        return features


def pooled(output: object, name: str) -> Tensor:
    """Return features (b, d) from the output of a module.

    An output (b, d) is taken as it is, and (b, c, h, w) is averaged over h and w. Of tokens (b, n, d), the first one is taken if
    n - 1 is a square number, as in a ViT with a class token, and otherwise their mean. Of the outputs of Hugging Face models,
    `pooler_output` is taken, or else `last_hidden_state`, and of a tuple the first entry. A line says what was pooled.

    Args:
        output: Output of the module.
        name: Name of the module in messages.

    Raises:
        UserError: If the output has another form.
    """
    if isinstance(output, Mapping):
        known = [key for key in ("pooler_output", "last_hidden_state") if output.get(key) is not None]
        if not known:
            raise UserError(
                f"model: {name} gives a mapping with {', '.join(map(str, output))}; features need pooler_output or "
                "last_hidden_state. Wrap the model in a module that returns features (b, d)."
            )
        _say(f"{name}   features are '{known[0]}' of its outputs")
        output = output[known[0]]
    elif isinstance(output, tuple | list) and output:
        _say(f"{name}   features are the first of its {len(output)} outputs")
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"model: {name} gives {found}; features need (b, d), tokens (b, n, d) or maps (b, c, h, w).")
    shape = ", ".join(map(str, output.shape[1:]))
    if output.ndim == 4:
        if output[0, 0].numel() > 1:
            _say(f"{name}   features are the mean of its maps (b, {shape}) over the pixels")
        return output.mean((2, 3))
    if output.ndim == 2:
        return output
    first = math.isqrt(output.shape[1] - 1) ** 2 == output.shape[1] - 1
    _say(f"{name}   features are {'the first' if first else 'the mean'} of its tokens (b, {shape})")
    return output[:, 0] if first else output.mean(1)


@cache
def _say(text: str) -> None:
    """Print a line once in a process."""
    console.stage("model", text)


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
