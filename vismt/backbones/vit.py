"""timm's vision transformers by name, as backbones: images in [0, 1] become features of any block.

`Backbone.vit` is the stock timm model: adapters are inserted into it, and its merged weights have timm's keys.
The backbone normalises the images, so that attacks and augmentations work on pixels in [0, 1].
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.backbones.asset_cards import AssetCard
from vismt.backbones.assets import get_asset, list_assets, load_asset_card
from vismt.backbones.position import check_position
from vismt.backbones.weight_sources import quiet_logger
from vismt.backbones.weights import load_weights, read_checkpoint
from vismt.base.errors import UserError, WeightsUnavailable, near
from vismt.storage.wheels import one_line

POOLS = ("token", "avg", None)
NEEDED = ("blocks", "patch_embed", "forward_intermediates", "forward_head", "num_prefix_tokens", "num_features")


class PixelBackbone(nn.Module):
    """A stock model `vit` that gives features (b, d) of images (b, 3, h, w) in [0, 1], of the size `img_size` = (h, w).

    mean, std: buffers (1, 3, 1, 1) of the normalisation, not saved.
    """

    vit: nn.Module
    img_size: tuple[int, int]
    mean: Tensor
    std: Tensor

    def unused_modules(self) -> list[str]:
        """Return the names, inside `vit`, of the modules that never run: exclude them when adapting."""
        return []


class Backbone(PixelBackbone):
    """A timm ViT that takes images (b, 3, h, w), floating point in [0, 1], of the size `img_size` = (h, w).

    Blocks compute in the dtype of the ViT's weights; features and class scores of half-precision weights are float32.

    Args:
        vit: the stock timm model.
        block: index of the block whose output is used, or None for the last; later blocks are not run.
        pool: "token" (class token), "avg" (mean of the patch tokens) or None (as timm's model does: usually the class token).
        mean: of the normalisation, 3 values; None for that of timm's pretrained_cfg.
        std: likewise.

    Attributes:
        width: channels d.
        depth: number of blocks.
        img_size: (h, w) of the images.
        grid: (rows, columns) of patches.
        mean: buffer (1, 3, 1, 1), not saved. std: likewise.

    Raises:
        UserError: a model that is not a plain ViT of timm, a block outside of it, and a pool that it cannot do.
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
        super().__init__()
        name = type(vit).__name__
        check_vit(vit, name)
        self.vit = vit
        model: Any = vit
        self.width: int = model.num_features
        self.depth: int = len(model.blocks)
        self.img_size = tuple(model.patch_embed.img_size)
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        self.block = None if block is None else check_block(block, self.depth, name)
        self.pool = _check_pool(pool, vit, name)
        for key, given in (("mean", mean), ("std", std)):
            values = given if given is not None else getattr(vit, "pretrained_cfg", {}).get(key)
            if values is None:
                raise UserError(f"{name} has no pretrained_cfg with {key}: pass {key}=(r, g, b).")
            self.register_buffer(key, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, d) at `block`: the tokens after the final norm, pooled."""
        return _widened(self._pooled(self._tokens(images)))

    def tokens(self, images: Tensor, block: int | None = None) -> Tensor:
        """Return the tokens (b, n, d) after the final norm, class and register tokens first; block: None for the backbone's."""
        return _widened(self._tokens(images, block))

    def _tokens(self, images: Tensor, block: int | None = None) -> Tensor:
        last = self.block if block is None else check_block(block, self.depth, type(self.vit).__name__)
        output = self._taps(images, [self.depth - 1 if last is None else last], "NLC")[0]
        if isinstance(output, Tensor):
            return output
        patches, prefix = output
        return torch.cat([prefix, patches], dim=1)

    def maps(self, images: Tensor, blocks: list[int]) -> list[Tensor]:
        """Return the patch tokens of each block in `blocks`, after the final norm, as maps (b, d, rows, columns)."""
        wanted = [check_block(block, self.depth, type(self.vit).__name__) for block in blocks]
        order = sorted(set(wanted))
        outputs = self._taps(images, order, "NCHW")
        maps = [_widened(output if isinstance(output, Tensor) else output[0]) for output in outputs]
        map_of = dict(zip(order, maps, strict=True))
        return [map_of[block] for block in wanted]

    def as_maps(self, tokens: Tensor) -> Tensor:
        """Return what a block returned (b, n, d) as `maps` does: (b, d, rows, columns), after the final norm."""
        patches = self.vit.norm(tokens)[:, self.vit.num_prefix_tokens :]
        return _widened(rearrange(patches, "b (r c) d -> b d r c", r=self.grid[0]))

    def logits(self, images: Tensor) -> Tensor:
        """Return the class scores (b, num_classes) of timm's head, on the features at `block` where a block is set.

        Raises:
            UserError: the model was created without classes.
        """
        if not self.vit.num_classes:
            raise UserError(
                f"{type(self.vit).__name__}: the model has no classifier head; create it with num_classes > 0."
            )
        if self.block is None and self.pool is None:
            return self.vit(self.normalise(images))
        return self.vit.head(self(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std in the dtype of the model. Raises UserError for images of another size or type."""
        if images.ndim != 4 or images.shape[1:] != (self.mean.shape[1], *self.img_size):
            needed = f"(b, {self.mean.shape[1]}, {self.img_size[0]}, {self.img_size[1]})"
            raise UserError(
                f"images are {tuple(images.shape)}, needed {needed}: resize them or create it with another img_size."
            )
        if not images.is_floating_point():
            raise UserError(f"images are {images.dtype}, the backbone takes floating point in [0, 1]: divide by 255.")
        embed: Any = self.vit.patch_embed
        return ((images - self.mean) / self.std).to(next(embed.parameters()).dtype)

    def set_input_size(self, size: tuple[int, int], table: Tensor | None = None) -> None:
        """Take images of `size` (h, w) from now on.

        Args:
            size: (h, w), multiples of the patches.
            table: position table (1, prefix + rows * columns, d) for the new grid; None for the present one, resampled by timm.

        Raises:
            UserError: a size that does not fit the patches, and a model that cannot change its size.
        """
        change = getattr(self.vit, "set_input_size", None)
        if change is None:
            raise UserError(
                f"{type(self.vit).__name__} cannot change its input size; create it with img_size {size} instead."
            )
        check_size(size, self.vit, type(self.vit).__name__)
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


def create(
    name: str,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool | str | Path = False,
    *,
    block: int | None = None,
    position: str = "timm",
    pool: str | None = None,
    num_classes: int = 0,
    new_head: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> Backbone:
    """Return a backbone on the CPU, in training mode, like a model of timm.

    Args:
        name: an asset of `vismt assets list`, the path of an asset card, or any timm ViT, with or without its tag
            ("vit_small_patch16_224.dino").
        img_size: pixels of the square input or (h, w), multiples of the patch size; None for the size of the model.
        pretrained: False for random weights drawn from `seed` (the global generator does not change); True for the weights
            of the asset or timm; a path of a .safetensors file or torch checkpoint.
        block: index of the block to take features from (-1 the last, None the last).
        position: how a pretrained position table is resampled to another grid: "timm", "dino" or "onnx"; see
            vismt.backbones.position. Random weights are drawn at the right size.
        pool: see Backbone.
        num_classes: 0 for no head. Weights with a head of another number of classes give a fresh head, with a message.
        new_head: draw the head from `seed`, whatever the weights have.
        seed: of random weights.
        dtype: "float32", "bfloat16" or "float16", in which the weights are held, once; the classifier head and the
            normalisation of images stay float32.

    Raises:
        UserError: an unknown name (with the near ones), a model that is not a ViT, a size that does not fit the patches, and
            weights that do not fit.
    """
    check_position(position)
    card = load_asset_card(name) if name in list_assets() or name.endswith((".yaml", ".yml")) else None
    architecture = architecture_of(name, card)
    options: dict[str, int | tuple[int, int]] = {"num_classes": num_classes}
    if img_size is not None:
        options["img_size"] = img_size
    by_timm = pretrained is True and card is None and position == "timm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = from_hub(architecture, **options) if by_timm else build(architecture, **options)
        if by_timm and new_head:
            vit.reset_classifier(num_classes)
    check_vit(vit, name)
    check_size(vit.patch_embed.img_size, vit, name)
    backbone = Backbone(vit, block=block, pool=pool)
    if isinstance(pretrained, str | Path):
        origin = f"the weights of '{pretrained}'"
        load_weights(vit, read_checkpoint(pretrained), position, origin, own_head=True, new_head=new_head)
    elif pretrained and not by_timm:
        state: Mapping[str, Tensor] = (
            from_hub(architecture).state_dict() if card is None else read_checkpoint(get_asset(name))
        )
        load_weights(vit, state, position, f"the weights of '{name}'", new_head=new_head)
    if dtype != "float32":
        vit.to(getattr(torch, dtype))
        if num_classes:
            vit.head.float().register_forward_pre_hook(_widen_inputs)
    return backbone


def skeleton(name: str, img_size: int | tuple[int, int] | None = None, *, num_classes: int = 0) -> nn.Module:
    """Return timm's model of a backbone on the meta device: its modules and shapes without values, made in no time."""
    with torch.device("meta"):
        return create(name, img_size, num_classes=num_classes).vit


def _widened(features: Tensor) -> Tensor:
    """Return features of half precision in float32."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def _widen_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_widened(value) for value in inputs)


def check_vit(model: nn.Module, name: str) -> None:
    """Raise UserError unless `model` is a plain ViT of timm: patches, prefix tokens and a sequence of blocks with features."""
    missing = [part for part in NEEDED if not hasattr(model, part)]
    if not missing and not (
        hasattr(model.patch_embed, "grid_size") and isinstance(model.blocks, nn.Sequential | nn.ModuleList)
    ):
        missing = ["a plain sequence of blocks on a grid of patches"]
    if not missing and "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:
        missing = ["prefix tokens at every block"]
    if missing:
        raise UserError(f"'{name}' is not a plain vision transformer of timm (it lacks {', '.join(missing)}).{ADVICE}")


def check_block(block: int, depth: int, name: str) -> int:
    """Return the index from 0 of `block`, which may count from the end. Raises UserError outside of the model."""
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


ADVICE = " Take one of timm.list_models('vit_*')."


def architecture_of(name: str, card: AssetCard | None) -> str:
    """Return the timm name, with its tag, that a backbone's `name` stands for. Raises UserError, with near names, for others."""
    if card is not None:
        if card.architecture is None:
            raise UserError(f"asset '{name}' is a language model, not a ViT: use vismt.backbones.lm.create_lm.")
        return card.architecture
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = near(base, [*list_assets(), *timm.list_models()])
        raise UserError(f"backbone '{name}' is neither an asset nor a timm model.{hint}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        raise UserError(f"backbone '{name}': timm's {base} has no weights tagged '{tag}'.{near(name, tagged)}")
    return name


def build(architecture: str, *, pretrained: bool = False, **options: int | tuple[int, int]) -> nn.Module:
    """Return timm's model. Raises UserError for a model without img_size and a size that timm cannot build."""
    try:
        return timm.create_model(architecture, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise UserError(
            f"'{architecture}' is not a plain vision transformer: timm gives it no img_size.{ADVICE}"
        ) from error
    except OSError:  # the hub cannot be reached; in some versions such an error is a ValueError as well
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        if "img_size" not in options:
            raise
        reason = one_line(str(error), 160)
        raise UserError(
            f"timm cannot build '{architecture}' at img_size {options['img_size']} ({reason}): "
            "try another multiple of its patch size."
        ) from error


def from_hub(architecture: str, **options: int | tuple[int, int]) -> nn.Module:
    """Return timm's pretrained model, through timm's downloader and cache."""
    if not timm.models.is_model_pretrained(architecture.partition(".")[0]):
        hint = near(architecture, timm.list_pretrained())
        raise UserError(
            f"timm has no weights for '{architecture}'.{hint} Or pass the path of a checkpoint as pretrained."
        )
    try:
        with quiet_logger("huggingface_hub"):
            return build(architecture, pretrained=True, **options)
    except OSError as error:
        reason = one_line(str(error), 160)
        raise WeightsUnavailable(
            f"the weights of '{architecture}' could not be downloaded by timm ({reason}). Download them on a machine that "
            "reaches the hub and pass the path as pretrained, or use an asset of `vismt assets list` that comes from a wheel."
        ) from error
