"""The files of one training under arms/: adapter/, what the job writes besides, and done.json last, which says it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt.engine.arms import Unit
from vismt.errors import UserError
from vismt.files import atomic_write, read_json, read_tensors
from vismt.lowrank.inject import merge
from vismt.lowrank.linear import AdaptedLinear
from vismt.lowrank.store import check_tensors, load_adapter, save_adapter
from vismt.multitask.moe_lora import routes

ADAPTER, DONE, MERGE = "adapter", "done.json", "merge.json"


def finish(net: nn.Module, folder: Path, with_adapter: bool, about: dict[str, Any]) -> None:
    """Write the adapter of the net's stock model and then done.json."""
    if with_adapter:
        save_adapter(net.stock, folder / ADAPTER)
    atomic_write(folder / DONE, json.dumps(about))


def done(unit: Unit) -> dict[str, Any] | None:
    """What `finish` was told of a finished training, None for one that is not."""
    return read_json(unit.folder / DONE, f"run '{unit.folder}'") if (unit.folder / DONE).exists() else None


def adapted(unit: Unit) -> bool:
    """Whether a finished training has an adapter."""
    return (unit.folder / ADAPTER).is_dir()


def restore(net: nn.Module, unit: Unit) -> str:
    """Load the adapter into an untrained net; how messages call the training. UserError when it is not finished."""
    what = f"run '{unit.folder}'"
    if done(unit) is None:
        raise UserError(f"{what}: is not trained yet; `vismt train` goes on with it.")
    if adapted(unit):
        load_adapter(net.stock, unit.folder / ADAPTER)
    return what


def fold(net: nn.Module, unit: Unit) -> nn.Module:
    """The net with its update folded in; as it is where a router still routes."""
    if adapted(unit) and not routes(net):
        merge(net.stock)
    return net


def mergeable(net: nn.Module, unit: Unit) -> bool:
    """Whether merging this training is still to be checked: it has an adapter, nothing routes or is gated, no merge.json."""
    gated = any(isinstance(module, AdaptedLinear) and module.experts for module in net.modules())
    return adapted(unit) and not routes(net) and not gated and not (unit.folder / MERGE).exists()


def state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict that can be written."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def load_state(module: nn.Module, path: Path, what: str) -> None:
    """Load what `state` gave; UserError for a missing or damaged file and tensors that do not fit."""
    tensors = read_tensors(path, f"{what}: {path.name}")[1]
    check_tensors(
        f"{what}: {path.name}", {name: tuple(value.shape) for name, value in module.state_dict().items()}, tensors
    )
    module.load_state_dict(tensors)
