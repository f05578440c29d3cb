"""timm's models by name, as backbones of images in [0, 1]: a plain ViT as `Backbone`, any other model as `Pyramid`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.backbones.asset_cards import AssetCard
from vismt.backbones.assets import get_asset, list_assets, load_asset_card
from vismt.backbones.position import check_position
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.vit import Backbone, check_size, classifiers, lacks_of_vit, widened
from vismt.backbones.weight_sources import quiet_logger
from vismt.backbones.weights import load_weights, read_checkpoint
from vismt.base import console
from vismt.base.errors import UserError, WeightsUnavailable, near
from vismt.storage.wheels import one_line

STRIDE = 32  # of the deepest stage of most hierarchical models


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
) -> Backbone | Pyramid:
    """Return a backbone on the CPU, in training mode, like a model of timm.

    Args:
        name: Asset of `vismt assets list`, path of an asset card, or any timm model, with or without its tag
            ("vit_small_patch16_224.dino").
        img_size: Height and width of square images in pixels, or (h, w). For a ViT, multiples of the patch size. None for the
            size of the model.
        pretrained: False for random weights drawn from `seed` (the global generator does not change), True for the weights of
            the asset or of timm, or a path of a .safetensors file or torch checkpoint.
        block: Index of the block of a ViT to take features from (-1 the last, None the last).
        position: Method that resamples a pretrained position table to another grid: "timm", "dino" or "onnx"
            (vismt.backbones.position). Random weights are drawn at the right size.
        pool: Pooling of a ViT, as in Backbone.
        num_classes: Number of classes, 0 for no head. If the head of the weights has another number of classes, a new head is
            drawn, and the console reports it.
        new_head: Whether to draw the head from `seed`, whatever the weights have.
        seed: Seed of random weights.
        dtype: "float32", "bfloat16" or "float16", the dtype of the weights. The classifier head and the normalisation of images
            stay float32.

    Raises:
        UserError: The name is unknown (the message has the near names), the model has no features, or the size or the weights
            do not fit the model.
    """
    check_position(position)
    card = load_asset_card(name) if name in list_assets() or name.endswith((".yaml", ".yml")) else None
    architecture = architecture_of(name, card)
    options: dict[str, Any] = {"num_classes": num_classes}
    if img_size is not None:
        options["img_size"] = img_size
    by_timm = pretrained is True and card is None and position == "timm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit: Any = from_hub(architecture, **options) if by_timm else _build(architecture, **options)
        if by_timm and new_head:
            vit.reset_classifier(num_classes)
    backbone = as_backbone(vit, img_size, block=block, pool=pool, name=name)
    if img_size is not None and isinstance(backbone, Pyramid):
        check_stages(backbone.img_size, name, partial(runs_at, architecture))
    if isinstance(pretrained, str | Path):
        origin = f"the weights of '{pretrained}'"
        state = read_checkpoint(pretrained)
        load_weights(vit, state, position, origin, own_head=True, new_head=new_head)
        named = vit.pretrained_cfg.get("classifier") or ()
        head = next(
            (name for name in ([named] if isinstance(named, str) else named) if f"{name}.weight" in state), None
        )
        if head and (new_head or not num_classes):
            classes = len(state[f"{head}.weight"])
            console.stage(
                "model", f"{origin}   the classifier '{head}' of {classes} classes is left out; heads are trained anew"
            )
    elif pretrained and not by_timm:
        state = from_hub(architecture).state_dict() if card is None else read_checkpoint(get_asset(name))
        load_weights(vit, state, position, f"the weights of '{name}'", new_head=new_head)
    if dtype != "float32":
        vit.to(getattr(torch, dtype))
        for layer in classifiers(vit) if num_classes else ():
            layer.float().register_forward_pre_hook(widen_inputs)
    return backbone


def as_backbone(
    model: nn.Module, img_size: int | tuple[int, int] | None, *, block: int | None, pool: str | None, name: str
) -> Backbone | Pyramid:
    """Return a timm model as a backbone.

    Args:
        model: Model of timm.
        img_size: Size of the images, as in `create`.
        block: Block of a ViT, as in `create`.
        pool: Pooling of a ViT, as in `create`.
        name: Name of the model in messages.

    Raises:
        UserError: The size, the block or the pooling does not fit the model.
    """
    if not lacks_of_vit(model):
        embed: Any = model.patch_embed
        check_size(embed.img_size, model, name)
        return Backbone(model, block=block, pool=pool)
    if block is not None or pool is not None:
        raise UserError(
            f"model: block and pool are for plain ViTs; '{name}' pools its last stage itself, leave them out."
        )
    return Pyramid(model, (img_size, img_size) if isinstance(img_size, int) else img_size)


def skeleton(name: str, img_size: int | tuple[int, int] | None = None, *, num_classes: int = 0) -> nn.Module:
    """Return timm's model of a backbone on the meta device. It has modules and shapes but no values, and is made at once."""
    with torch.device("meta"):
        return create(name, img_size, num_classes=num_classes).vit


def widen_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs of a float32 classifier of a half-precision model in float32. It is a hook before the forward pass."""
    return tuple(widened(value) for value in inputs)


def architecture_of(name: str, card: AssetCard | None) -> str:
    """Return the timm name, with its tag, that a backbone's `name` stands for.

    Raises UserError, with near names, for other names.
    """
    if card is not None:
        if card.architecture is None:
            raise UserError(f"asset '{name}' is a language model, not a ViT: use vismt.backbones.lm.create_lm.")
        return card.architecture
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = near(base, [*list_assets(), *timm.list_models()])
        raise UserError(f"backbone '{name}' is neither an asset nor a timm model.{hint}")
    if tag and name not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise UserError(f"backbone '{name}': timm's {base} has no weights tagged '{tag}'.{near(name, tagged)}")
    return name


def timm_model(architecture: str, **options: Any) -> nn.Module:
    """Return timm's model.

    img_size is left out for a model that takes images of any size, because its constructor does not have the argument.
    """
    import timm

    try:
        return timm.create_model(architecture, **options)
    except TypeError as error:
        if "img_size" not in options or "img_size" not in str(error):
            raise
        return timm.create_model(architecture, **{key: options[key] for key in options if key != "img_size"})


def _build(architecture: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Return timm's model. Raises UserError if timm cannot build the size."""
    try:
        return timm_model(architecture, pretrained=pretrained, **options)
    except OSError:  # the hub cannot be reached; in some versions such an error is a ValueError as well
        raise
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        if "img_size" not in options:
            raise
        reason = one_line(str(error), 160)
        raise UserError(
            f"timm cannot build '{architecture}' at img_size {options['img_size']} ({reason}): "
            "try another multiple of its patch size."
        ) from error


def from_hub(architecture: str, **options: Any) -> nn.Module:
    """Return timm's pretrained model, through timm's downloader and cache."""
    import timm

    if not timm.models.is_model_pretrained(architecture.partition(".")[0]):
        hint = near(architecture, timm.list_pretrained())
        raise UserError(
            f"timm has no weights for '{architecture}'.{hint} Or pass the path of a checkpoint as pretrained."
        )
    try:
        with quiet_logger("huggingface_hub"):
            return _build(architecture, pretrained=True, **options)
    except OSError as error:
        reason = one_line(str(error), 160)
        raise WeightsUnavailable(
            f"the weights of '{architecture}' could not be downloaded by timm ({reason}). Download them on a machine that "
            "reaches the hub and pass the path as pretrained, or use an asset of `vismt assets list` that comes from a wheel."
        ) from error


def check_stages(
    size: tuple[int, int], name: str, takes: Callable[[tuple[int, int]], bool], own: tuple[int, int] | None = None
) -> None:
    """Raise UserError, with the next sizes that fit, if the windows or stages of a hierarchical model cannot divide a size.

    Args:
        size: Size (h, w) to check.
        name: Name of the model in the message.
        takes: Whether the model takes images of a size.
        own: Size (h, w) that the model has.
    """
    if takes(size):
        return
    low, high = (((size[0] + up) // STRIDE * STRIDE, (size[1] + up) // STRIDE * STRIDE) for up in (0, STRIDE - 1))
    near_by = [(h, w) for h, w in (low, high) if (h, w) != size and h and w and takes((h, w))]
    fits = [f"{h} x {w}" for h, w in near_by or ([own] if own else [])]
    fix = f"use {' or '.join(fits)}" if fits else "leave it out"
    raise UserError(f"img_size {size[0]} x {size[1]} does not fit the stages of {name}: {fix}.")


@torch.no_grad()
def forward_runs(call: Callable[[], object]) -> bool:
    """Return whether a forward pass, without gradients, ends without an error about shapes."""
    try:
        call()
    except NotImplementedError:  # an operation that needs values, which tensors of shapes alone have not
        return True
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError):
        return False
    return True


@cache
def runs_at(architecture: str, size: tuple[int, int]) -> bool:
    """Return whether a hierarchical model takes images of `size`, by a forward pass of shapes without values."""

    def run() -> None:
        model: Any = timm_model(architecture, num_classes=0, img_size=size).eval()
        channels, *own = model.pretrained_cfg["input_size"]
        if tuple(own) != size:
            model.forward_features(torch.empty(1, channels, *size))

    with torch.device("meta"):
        return forward_runs(run)
