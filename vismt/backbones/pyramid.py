"""Hierarchical timm models as backbones: Swin, ConvNeXt, Hiera, EfficientViT, ResNet, PVT, MaxViT, FastViT, MetaFormer, ...

    taps_s = output of stage s, (b, d_s, h / stride_s, w / stride_s)      as timm's features_only: without the final norm
    features = forward_head(forward_features(x), pre_logits=True)         (b, d), the input of timm's classifier

The numbers of taps are the places in timm's `feature_info`. Most models have four taps, at strides 4 to 32. A ResNet or MaxViT
has five, from stride 2. EfficientViT of MSRA has three. The features are wider than the last tap if a head or a last
convolution widens them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.backbones.vit import TappedBackbone, widened
from vismt.base.errors import UserError
from vismt.storage.wheels import one_line


class Pyramid(TappedBackbone):
    """A timm model that is not a plain ViT, on images (b, 3, h, w), floating point in [0, 1], of the size `img_size` = (h, w).

    Args:
        vit: Stock timm model.
        img_size: Size (h, w) of the images. None for the size of the model.
        mean: Mean of the normalisation, as in PixelBackbone.
        std: Deviation of the normalisation, as in PixelBackbone.

    Attributes:
        width: Number of channels d of the features.
        widths: Number of channels of every tap, empty for a model without taps.

    Raises:
        UserError: The model has no features of timm.
    """

    def __init__(
        self,
        vit: nn.Module,
        img_size: Sequence[int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        missing = [name for name in ("forward_features", "forward_head", "num_features") if not hasattr(vit, name)]
        if missing:
            raise UserError(
                f"{type(vit).__name__} gives no features as timm's models do (it lacks {', '.join(missing)})."
            )
        super().__init__(vit, image_size(vit) if img_size is None else img_size, mean, std)
        model: Any = vit
        self.width: int = getattr(model, "head_hidden_size", model.num_features)
        if hasattr(model, "forward_intermediates"):
            self.widths = tuple(tap["num_chs"] for tap in model.feature_info)
        self._note_size()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, d)."""
        tokens = self.vit.forward_features(self.normalise(images))
        return widened(self.vit.forward_head(tokens, pre_logits=True).flatten(1))

    def _maps(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        return self.vit.forward_intermediates(
            self.normalise(images), indices=blocks, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )

    def last_block(self, tap: int) -> str:
        model = self.vit
        stage = model.feature_info[tap]["module"]
        blocks = getattr(model.get_submodule(stage), "blocks", None)
        return stage if blocks is None else f"{stage}.blocks.{len(blocks) - 1}"

    def as_maps(self, tokens: Tensor) -> Tensor:
        """Return an output (b, rows, columns, d) of `last_block` of a Swin in the layout of `maps`."""
        return widened(rearrange(tokens, "b r c d -> b d r c"))

    def set_input_size(self, size: tuple[int, int], table: Tensor | None = None) -> None:
        """Take images of another size from now on.

        The windows of a Swin keep their size, as in a model that is created for the new size. timm resamples the tables of
        relative positions if windows change.

        Args:
            size: New size (h, w).
            table: Position table of a ViT. It is None here.

        Raises:
            UserError: The model is built for one size, or the size does not fit its stages.
        """
        change = getattr(self.vit, "set_input_size", None)
        if change is not None:
            windows = getattr(self.vit, "_ref_window_sizes", None)
            try:
                change(img_size=tuple(size), **({} if windows is None else {"window_size": windows}))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = one_line(str(error), 160)
                raise UserError(f"img_size {size} does not fit {type(self.vit).__name__} ({reason}).") from error
        elif takes_size(self.vit) and not same_at(self.vit, size):
            raise UserError(
                f"{type(self.vit).__name__} takes only images of the size that it was created for; create it with img_size "
                f"{size} instead, and in a dense run leave evaluate.mode at slide."
            )
        self.img_size = (size[0], size[1])
        self._note_size()

    def _note_size(self) -> None:
        """Put the size into timm's settings of the model. Exports and classifiers read it there."""
        model = self.vit
        settings = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = {**settings, "input_size": (self.mean.shape[1], *self.img_size)}


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return the size (h, w) of a timm model's images. Raises UserError if the model does not have it."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", ())[-2:]
    if not size:
        raise UserError(f"model: {type(model).__name__} does not say the size of its images; give img_size in pixels.")
    return int(size[0]), int(size[1])


def takes_size(model: nn.Module) -> bool:
    """Return whether the constructor of a timm model has img_size. Other models take images of any size."""
    return any("img_size" in inspect.signature(kind).parameters for kind in type(model).__mro__ if kind is not object)


def same_at(model: nn.Module, size: Sequence[int]) -> bool:
    """Return whether timm builds a model for images of `size` that has the same tensors."""
    import timm

    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    try:
        with torch.device("meta"):
            built = timm.create_model(str(name), img_size=tuple(size))
    except (AssertionError, RuntimeError, ValueError, TypeError):
        return False
    shapes, own = ({key: value.shape for key, value in net.state_dict().items()} for net in (built, model))
    return all(own[key] == shapes[key] for key in own.keys() & shapes.keys() if not key.startswith("head."))
