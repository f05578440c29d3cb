"""Any timm classifier as a function of pixels in [0, 1]: resizing and normalisation are part of the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError, near

SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".tar"}


class PixelClassifier(nn.Module):
    """images float (b, 3, h, w) in [0, 1] -> logits (b, c): resized to `size` (h, w), normalised by `mean`, `std`."""

    def __init__(self, net: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.size = net, tuple(size)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        return self.net((images - self.mean.to(images.dtype)) / self.std.to(images.dtype))


def load_classifier(
    name_or_checkpoint: str | Path,
    num_classes: int | None = None,
    *,
    architecture: str | None = None,
    pretrained: bool = True,
) -> PixelClassifier:
    """A timm classifier in eval mode, on the CPU, taking pixels in [0, 1] of any size.

    name_or_checkpoint: a timm name, whose weights timm fetches unless pretrained is False; or a .safetensors / .pt / .pth
    file of timm's keys (at the top, or under state_dict or model), or a folder with model.safetensors. The architecture of
    a file is `architecture`, else what config.json beside it says, and so is img_size. num_classes: None = the weights'
    own; another number than theirs is refused, as a fresh head classifies nothing.
    Raises UserError for an unknown name, a missing or unreadable file and weights that do not fit.
    """
    path = Path(name_or_checkpoint)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in SUFFIXES:
        net = _from_file(path, architecture, num_classes)
    else:
        net = _create(str(name_or_checkpoint), num_classes, pretrained)
    config = net.pretrained_cfg
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    return PixelClassifier(net, size, config["mean"], config["std"]).eval()


def _create(name: str, num_classes: int | None, pretrained: bool, **options: int) -> nn.Module:
    import timm

    base = name.split(".")[0].removeprefix("hf_hub:").removeprefix("hf-hub:")
    if ":" not in name and base not in timm.list_models():
        raise UserError(f"model '{name}' is neither a timm name nor a checkpoint file.{near(base, timm.list_models())}")
    fresh = {"num_classes": num_classes} if num_classes and not pretrained else {}
    try:
        net = timm.create_model(name, pretrained=pretrained, **fresh, **options)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
    ) as error:  # TypeError: an img_size that the model does not take
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': timm cannot build it or get its weights ({reason}).") from error
    if num_classes is not None and net.num_classes != num_classes:
        raise UserError(f"model '{name}': its weights know {net.num_classes} classes, {num_classes} are asked for.")
    return net


def _beside(path: Path) -> dict:
    """config.json next to a checkpoint, as `vismt merge` writes it; empty without one."""
    config = path.parent / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf8")) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"checkpoint '{path}': the config.json beside it is no JSON ({error}).") from error


def _from_file(path: Path, architecture: str | None, num_classes: int | None) -> nn.Module:
    about = _beside(path)
    architecture = architecture or about.get("architecture")
    if not architecture:
        raise UserError(f"checkpoint '{path}': which timm model is it? Give architecture, or a config.json beside it.")
    size = about.get("img_size")
    state = _read_state(path)
    net = _create(architecture, None, pretrained=False)
    head = next((state[f"{name}.weight"] for name in _heads(net) if f"{name}.weight" in state), None)
    if head is not None and num_classes not in (None, len(head)):
        raise UserError(f"checkpoint '{path}': its head has {len(head)} classes, {num_classes} are asked for.")
    classes = len(head) if head is not None else num_classes
    net = _create(architecture, classes, pretrained=False, **({"img_size": size} if size else {}))
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint '{path}' does not fit {architecture}: {reason}") from error
    return net


def _heads(net: nn.Module) -> list[str]:
    named = net.pretrained_cfg.get("classifier") or ()
    return [named] if isinstance(named, str) else list(named)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' is not there: give an existing file or a timm name.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own error for a broken file; all mean the same to the user
        raise UserError(
            f"checkpoint '{path}' cannot be read ({type(error).__name__}): broken, or not plain weights."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint '{path}' holds no state dict of tensors (at the top, in state_dict or in model).")
    return {name.removeprefix("module."): value for name, value in state.items()}
