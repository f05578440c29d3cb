"""Strict loading of weights into a timm model: every key and shape must fit, except the keys of a classifier head."""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vismt.backbones.position import resample
from vismt.backbones.vit import classifier_paths, lacks_of_vit
from vismt.base import console
from vismt.base.errors import UserError
from vismt.storage.wheels import one_line

_WRAPPERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "vit.")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors by name of a .safetensors file or a torch checkpoint (weights_only), on the CPU.

    A dict under 'state_dict', 'model' or 'teacher' is unwrapped. A prefix that all keys have ('module.', 'vit.', ...) is
    removed.

    Raises:
        UserError: The file is missing, damaged or of another format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist.")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint '{path}' is not a torch file or holds more than tensors, which vismt does not execute: "
            "save the state_dict, best as .safetensors."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error) as error:
        reason = one_line(str(error), 160)
        raise UserError(f"checkpoint '{path}' is damaged or not a checkpoint: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"checkpoint '{path}' holds no state dict (names to tensors), alone or under {', '.join(_WRAPPERS)}."
        )
    state = dict(state)
    while shared := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(shared): value for key, value in state.items()}
    return state


def load_weights(
    vit: Any,
    state: Mapping[str, Tensor],
    position: str,
    origin: str,
    *,
    own_head: bool = False,
    new_head: bool = False,
) -> None:
    """Copy `state` into `vit`, with its position table resampled to the model's grid.

    Args:
        vit: Model of timm that gets the values.
        state: Tensors by name.
        position: Method of resampling: "timm", "dino" or "onnx" (vismt.backbones.position).
        origin: Name of the weights in messages.
        own_head: Whether to raise an error if the head in `state` has another size. Otherwise a new head replaces it, with a
            message.
        new_head: Whether to keep the head of `vit`, whatever `state` has.

    Raises:
        UserError: A key is missing or unexpected, or its tensor has another shape. The message names the first such key.
    """
    name = str(getattr(vit, "pretrained_cfg", {}).get("architecture") or type(vit).__name__)
    state = dict(state)
    table, model_table = state.get("pos_embed"), getattr(vit, "pos_embed", None)
    if position != "timm":
        if model_table is None or lacks_of_vit(vit):
            raise UserError(
                f"position '{position}' needs a learned position table of a ViT; {origin} have none: use position 'timm'."
            )
        if isinstance(table, Tensor) and table.ndim == 3:
            grid = tuple(vit.patch_embed.grid_size)
            state["pos_embed"] = resample(table, grid, position, model_table.shape[1] - grid[0] * grid[1])
    # Converts the layouts that a family was released in, and resamples the table if position is "timm".
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, vit)
        except (AttributeError, KeyError, RuntimeError, IndexError, ValueError) as error:
            raise UserError(f"{origin} do not fit {name}: {one_line(str(error), 160)}") from error
    model_state = vit.state_dict()
    state = with_counts(state, model_state, origin)
    paths = classifier_paths(vit)
    heads = [key for key in model_state if key.startswith(tuple(f"{path}." for path in paths))]
    fresh = {key for key in heads if new_head or key not in state}
    if not own_head:
        fresh |= {key for key in heads if key in state and state[key].shape != model_state[key].shape}
    # Parts of a classifier that this model is created without: "head." of a ViT, "head_dist." of a distilled one.
    parts = tuple(f"{path.partition('.')[0]}." for path in ["head", "head_dist", *paths])
    state = {key: value for key, value in state.items() if key in model_state or not key.startswith(parts)}
    _check(model_state, state, fresh, heads, origin, name)
    if fresh and not new_head:
        console.stage("model", f"{name}   fresh head for {vit.num_classes} classes: {origin} have none that fits")
    vit.load_state_dict({**state, **{key: model_state[key] for key in fresh}})


def with_counts(state: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return a state dict with the batch counts that its batch norms lack.

    Checkpoints of old versions of torch and of converters have the statistics without `num_batches_tracked`. The count
    becomes 0, as in torch, and a line is printed.

    Args:
        state: Tensors by name.
        own: Tensors by name of the model.
        origin: Name of the weights in messages.
    """
    ending = "num_batches_tracked"
    norms = [key.removesuffix(ending) for key in own if key.endswith(ending) and key not in state]
    added = {
        f"{norm}{ending}": torch.zeros_like(own[f"{norm}{ending}"]) for norm in norms if f"{norm}running_mean" in state
    }
    if added:
        console.stage("model", f"{origin}: {len(added)} batch norms have no {ending}, which is set to 0")
    return {**state, **added}


def _check(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], fresh: set[str], heads: list[str], origin: str, model: str
) -> None:
    """Raise UserError unless `state` has the keys and shapes of the model's `own` tensors, except for the keys in `fresh`."""
    missing = [key for key in own if key not in state and key not in fresh]
    unexpected = [key for key in state if key not in own and key not in fresh]
    wrong = [key for key in own if key in state and key not in fresh and state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        shape, needed = tuple(state[key].shape), tuple(own[key].shape)
        hint = f" (num_classes {shape[0]})" if key in heads else ""
        raise UserError(
            f"{origin} do not fit {model}: '{key}' is {shape}{hint}, needed {needed} ({len(wrong)} such keys)."
        )
    if missing or unexpected:
        first_missing, first_unexpected = (f" (first '{keys[0]}')" if keys else "" for keys in (missing, unexpected))
        raise UserError(
            f"{origin} do not fit {model}: {len(missing)} keys missing{first_missing}, "
            f"{len(unexpected)} unexpected{first_unexpected}."
        )
