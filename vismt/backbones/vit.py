"""timm's vision transformers as backbones: images in [0, 1] become features of any block.

`Backbone.vit` is the stock timm model. Adapters are inserted into it, and its merged weights have timm's keys. The backbone
normalises the images, so that attacks and augmentations work on pixels in [0, 1]. Hierarchical models and convolutional
networks are in pyramid.py. timm_models.py creates both kinds by name.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vismt.base.errors import UserError
from vismt.lowrank.model.targets import heads_of

POOLS = ("token", "avg", None)
NEEDED = ("blocks", "patch_embed", "forward_intermediates", "forward_head", "num_prefix_tokens", "num_features")
Self = TypeVar("Self", bound="PixelBackbone")


class PixelBackbone(nn.Module):
    """A stock model `vit` that gives features (b, d) of images (b, 3, h, w) in [0, 1], of the size `img_size` = (h, w).

    BatchNorm keeps its running statistics in training mode, too. Statistics of episodes and small batches are noise, and a
    merged model consists of base weights and adapter alone.

    Args:
        vit: Stock model.
        img_size: Size (h, w) of the images.
        mean: Mean of the normalisation, 3 values. None for the mean of timm's pretrained_cfg.
        std: Deviation of the normalisation, 3 values. None for the deviation of timm's pretrained_cfg.

    Attributes:
        mean: Buffer (1, 3, 1, 1), not saved.
        std: Buffer (1, 3, 1, 1), not saved.
    """

    vit: Any  # a model of timm: its attributes differ by family
    img_size: tuple[int, int]
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        img_size: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.vit, self.img_size = vit, (img_size[0], img_size[1])
        for key, given in (("mean", mean), ("std", std)):
            values = given if given is not None else getattr(vit, "pretrained_cfg", {}).get(key)
            if values is None:
                raise UserError(f"{type(vit).__name__} has no pretrained_cfg with {key}: pass {key}=(r, g, b).")
            self.register_buffer(key, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.train(vit.training)

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode of all modules except BatchNorm, which stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """Return the class scores (b, num_classes) of timm's classifier.

        Raises:
            UserError: The model was created without classes.
        """
        if not self.vit.num_classes:
            raise UserError(
                f"{type(self.vit).__name__}: the model has no classifier head; create it with num_classes > 0."
            )
        return self.vit(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std in the dtype of the model. Raises UserError if the images have another size or type."""
        if images.ndim != 4 or images.shape[1:] != (self.mean.shape[1], *self.img_size):
            needed = f"(b, {self.mean.shape[1]}, {self.img_size[0]}, {self.img_size[1]})"
            raise UserError(
                f"images are {tuple(images.shape)}, needed {needed}: resize them or create it with another img_size."
            )
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}, the backbone takes floating point in [0, 1]: divide by 255.")
        dtype = next(weight.dtype for weight in self.vit.parameters() if weight.is_floating_point())
        return ((images - self.mean) / self.std).to(dtype)

    def unused_modules(self) -> list[str]:
        """Return the names, inside `vit`, of the modules that never run. Adaptation excludes them."""
        return []


class TappedBackbone(PixelBackbone, ABC):
    """A backbone that also gives its features as maps, at several depths.

    Attributes:
        widths: Number of channels of every tap, from shallow to deep.
    """

    widths: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Number of taps: the blocks of a ViT, or the stages of a hierarchical model."""
        return len(self.widths)

    def maps(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Return the taps in `blocks`, numbers from 0 or from the end, as maps (b, d, rows, columns) without prefix tokens."""
        wanted = [check_block(block, self.depth, type(self.vit).__name__) for block in blocks]
        order = sorted(set(wanted))
        map_of = dict(zip(order, map(widened, self._maps(images, order)), strict=True))
        return [map_of[block] for block in wanted]

    @abstractmethod
    def _maps(self, images: Tensor, blocks: list[int]) -> list[Tensor]: ...

    @abstractmethod
    def last_block(self, tap: int) -> str:
        """Return the path in `vit` of the block whose output is tap number `tap`."""

    @abstractmethod
    def as_maps(self, tokens: Tensor) -> Tensor:
        """Return an output of `last_block` in the layout of `maps`: (b, d, rows, columns)."""


class Backbone(TappedBackbone):
    """A timm ViT that takes images (b, 3, h, w), floating point in [0, 1], of the size `img_size` = (h, w).

    Blocks compute in the dtype of the ViT's weights. Features and class scores of half-precision weights are float32.

    Args:
        vit: Stock timm model.
        block: Index of the block whose output is used, or None for the last block. Later blocks are not run.
        pool: "token" (class token), "avg" (mean of the patch tokens) or None (as in timm's model, usually the class token).
        mean: Mean of the normalisation, as in PixelBackbone.
        std: Deviation of the normalisation, as in PixelBackbone.

    Attributes:
        width: Number of channels d.
        depth: Number of blocks.
        img_size: Size (h, w) of the images.
        grid: Number of patches (rows, columns).

    Raises:
        UserError: The model is not a plain ViT of timm, does not have the block, or cannot do the pooling.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        block: int | None = None,
        pool: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        name = type(vit).__name__
        missing = lacks_of_vit(vit)
        if missing:
            raise UserError(f"{name} is not a plain vision transformer of timm (it lacks {', '.join(missing)}).")
        model: Any = vit
        super().__init__(vit, model.patch_embed.img_size, mean, std)
        self.width: int = model.num_features
        self.widths = (self.width,) * len(model.blocks)
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.block = None if block is None else check_block(block, self.depth, name)
        self.pool = _check_pool(pool, vit, name)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, d) at `block`: the tokens after the final norm, pooled."""
        return widened(self._pooled(self._tokens(images)))

    def tokens(self, images: Tensor, block: int | None = None) -> Tensor:
        """Return the tokens (b, n, d) after the final norm, class and register tokens first.

        A block of None is the backbone's block.
        """
        return widened(self._tokens(images, block))

    def _tokens(self, images: Tensor, block: int | None = None) -> Tensor:
        last = self.block if block is None else check_block(block, self.depth, type(self.vit).__name__)
        output = self._taps(images, [self.depth - 1 if last is None else last], "NLC")[0]
        if isinstance(output, Tensor):
            return output
        patches, prefix = output
        return torch.cat([prefix, patches], dim=1)

    def _maps(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Return the patch tokens of each block, after the final norm."""
        outputs = self._taps(images, blocks, "NCHW")
        return [output if isinstance(output, Tensor) else output[0] for output in outputs]

    def last_block(self, tap: int) -> str:
        return f"blocks.{tap}"

    def as_maps(self, tokens: Tensor) -> Tensor:
        patches = self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :]
        return widened(rearrange(patches, "b (r c) d -> b d r c", r=self.grid[0]))

    def logits(self, images: Tensor) -> Tensor:
        """Return the class scores (b, num_classes) of timm's head, on the features at `block` if a block is set."""
        if not self.vit.num_classes or (self.block is None and self.pool is None):
            return super().logits(images)
        return self.vit.head(self(images))

    def set_input_size(self, size: tuple[int, int], table: Tensor | None = None) -> None:
        """Take images of another size from now on.

        Args:
            size: New size (h, w), multiples of the patch size.
            table: Position table (1, prefix + rows * columns, d) for the new grid. None to let timm resample the present table.

        Raises:
            UserError: The size does not fit the patches, or the model cannot change its size.
        """
        change, name = getattr(self.vit, "set_input_size", None), type(self.vit).__name__
        if change is None:
            raise UserError(f"{name} cannot change its input size; create it with img_size {size} instead.")
        check_size(size, self.vit, name)
        change(img_size=tuple(size))
        if table is not None:
            with torch.no_grad():
                self.vit.pos_embed.copy_(table)
        self.img_size, self.grid = tuple(self.vit.patch_embed.img_size), tuple(self.vit.patch_embed.grid_size)

    def unused_modules(self) -> list[str]:
        """Return the names, inside `vit`, of the blocks after `block`."""
        return [] if self.block is None else [f"blocks.{index}" for index in range(self.block + 1, self.depth)]

    def _taps(self, images: Tensor, blocks: list[int], layout: str) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        return self.vit.forward_intermediates(
            self.normalise(images),
            indices=blocks,
            return_prefix_tokens=self.vit.num_prefix_tokens > 0,
            norm=True,
            stop_early=True,
            output_fmt=layout,
            intermediates_only=True,
        )

    def _pooled(self, tokens: Tensor) -> Tensor:
        if self.pool is None:
            return self.vit.forward_head(tokens, pre_logits=True)
        picked = tokens[:, 0] if self.pool == "token" else tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)
        return self.vit.fc_norm(picked) if hasattr(self.vit, "fc_norm") else picked


def widened(features: Tensor) -> Tensor:
    """Return features of half precision in float32."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a timm model that map features to class scores.

    A distilled model has two, most models one, some none.
    """
    return heads_of(model, "get_classifier")


def classifier_paths(model: nn.Module) -> list[str]:
    """Return the paths of `classifiers(model)` in the model, in their order."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in classifiers(model)]


def lacks_of_vit(model: Any) -> list[str]:
    """Return what a model lacks to be a plain ViT of timm: patches, prefix tokens and a sequence of blocks with features."""
    missing = [part for part in NEEDED if not hasattr(model, part)]
    if not missing and not (
        hasattr(model.patch_embed, "grid_size") and isinstance(model.blocks, nn.Sequential | nn.ModuleList)
    ):
        missing = ["a plain sequence of blocks on a grid of patches"]
    if not missing and "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:
        missing = ["prefix tokens at every block"]
    return missing


def check_block(block: int, depth: int, name: str) -> int:
    """Return the index from 0 of `block`, which may count from the end. Raises UserError if the model does not have the block."""
    if not -depth <= block < depth:
        raise UserError(f"block {block} is outside of {name}, which has blocks 0 to {depth - 1} (or -{depth} to -1).")
    return block % depth


def check_size(sizes: Sequence[int], vit: nn.Module, name: str) -> None:
    """Raise UserError unless (h, w) are multiples of the model's patches."""
    embed: Any = vit.patch_embed
    patches = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    for size, patch in zip(sizes, patches):
        if size % patch or size < patch:
            low = size // patch * patch
            fits = " or ".join(str(fit) for fit in (low, low + patch) if fit)
            raise UserError(f"img_size {size} does not fit the {patch}-pixel patches of {name}: use {fits}.")


def _check_pool(pool: str | None, vit: nn.Module, name: str) -> str | None:
    if pool not in POOLS:
        raise UserError(f"pool '{pool}' is unknown, it must be 'token', 'avg' or None.")
    if pool == "token" and not vit.num_prefix_tokens:
        raise UserError(f"pool 'token': {name} has no class token; use 'avg'.")
    if pool is None and not getattr(vit, "global_pool", ""):
        return "token" if vit.num_prefix_tokens else "avg"
    return pool
