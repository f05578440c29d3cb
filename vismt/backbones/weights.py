"""Weights into a timm ViT, strictly: every key and shape must fit, but for a classifier head that is not asked for."""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vismt import console
from vismt.backbones.position import resample
from vismt.errors import UserError

WRAPPERS = ("state_dict", "model", "teacher")
HEADS = ("head.", "head_dist.")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "vit.")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a torch checkpoint (weights_only), on the CPU.

    A dict under 'state_dict', 'model' or 'teacher' is unwrapped, and prefixes that every key shares ('module.', 'vit.', ...) go.
    Raises UserError for a missing, damaged or foreign file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist.")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint '{path}' is no torch file or holds more than tensors, which vismt does not execute: "
            "save the state_dict, best as .safetensors."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error) as error:
        told = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint '{path}' is damaged or no checkpoint: {told}") from error
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"checkpoint '{path}' holds no state dict (names to tensors), alone or under {', '.join(WRAPPERS)}."
        )
    return _without_shared_prefixes(state)


def load_weights(
    vit: nn.Module,
    state: Mapping[str, Tensor],
    position: str,
    origin: str,
    *,
    own_head: bool = False,
    new_head: bool = False,
) -> None:
    """Copy `state` into `vit`, its position table resampled to the model's grid.

    position: "timm" | "dino" | "onnx", see vismt.backbones.position.
    origin: what the messages call the weights. own_head: the head must fit too unless `state` has none; otherwise a head
    of another size is replaced by a fresh one, and a line says so. new_head: it stays as `vit` has it, whatever `state` has.
    Raises UserError naming the first missing, unexpected or wrongly shaped key.
    """
    state = dict(state)
    table, needed = state.get("pos_embed"), getattr(vit, "pos_embed", None)
    grid = tuple(vit.patch_embed.grid_size)
    prefix = 0 if needed is None else needed.shape[1] - grid[0] * grid[1]
    if position != "timm" and needed is None:
        raise UserError(
            f"position '{position}' needs a learned position table; {origin} has none: use position 'timm'."
        )
    if isinstance(table, Tensor) and table.ndim == 3 and needed is not None and position != "timm":
        state["pos_embed"] = resample(table, grid, position, prefix)
    try:
        # Converts the layouts a family was released in, and resamples the table where position is "timm".
        state = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", lambda found, model: found)(
            state, vit
        )
    except (AttributeError, KeyError, RuntimeError, IndexError, ValueError) as error:
        raise UserError(f"{origin} do not fit {_called(vit)}: {' '.join(str(error).split())[:160]}") from error
    own = vit.state_dict()
    fresh = {
        key
        for key in own
        if key.startswith(HEADS)
        and (new_head or key not in state or (state[key].shape != own[key].shape and not own_head))
    }
    state = {key: value for key, value in state.items() if key in own or not key.startswith(HEADS)}
    _check(own, state, fresh, origin, _called(vit))
    if fresh and not new_head:
        console.stage(
            "model", f"{_called(vit)}   fresh head for {vit.num_classes} classes: {origin} have none that fits"
        )
    vit.load_state_dict({**state, **{key: own[key] for key in fresh}})


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], free: set[str], origin: str, model: str) -> None:
    missing = [key for key in own if key not in state and key not in free]
    unexpected = [key for key in state if key not in own and key not in free]
    wrong = [key for key in own if key in state and key not in free and state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        seen, needed = tuple(state[key].shape), tuple(own[key].shape)
        hint = f" (num_classes {seen[0]})" if key.startswith("head.") else ""
        raise UserError(
            f"{origin} do not fit {model}: '{key}' is {seen}{hint}, needed {needed} ({len(wrong)} such keys)."
        )
    if missing or unexpected:
        raise UserError(
            f"{origin} do not fit {model}: {len(missing)} keys missing{_first(missing)}, "
            f"{len(unexpected)} unexpected{_first(unexpected)}."
        )


def _first(keys: list[str]) -> str:
    return f" (first '{keys[0]}')" if keys else ""


def _called(vit: nn.Module) -> str:
    return str(getattr(vit, "pretrained_cfg", {}).get("architecture") or type(vit).__name__)


def _without_shared_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while shared := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(shared): value for key, value in state.items()}
    return state
