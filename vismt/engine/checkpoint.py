"""Checkpoints of a training: trainable tensors, buffers, optimiser state, random state and step, in one safetensors file.

A training starts from 1. the newest sound checkpoint of its folder, 2. the adapter's start values. Batches depend on the step
number and rates on the number of updates, so these two numbers are enough to continue both.

checkpoint-STEP-DIGEST.safetensors   tensors model.NAME, optimizer.NAME.KEY, random.cpu, random.cuda.I; the numbers as JSON
                                     in the header. DIGEST is of the whole file, so no changed bit goes unnoticed.

Two checkpoints are kept. A checkpoint is compared as a whole with what this training would have written before any part of it
is used.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import check_tensors
from vismt.storage.files import file_digest, write_tensors

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{12})\.safetensors")
STATE = "state"  # key of the numbers in the file's header


def moving_state(module: nn.Module, trained: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Return what training may change: the state dict without the frozen parameters.

    trained: Parameters that are included even if a schedule has frozen them at the moment.
    """
    moving = set(trained)
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, value in named if not value.requires_grad and value not in moving}
    return {name: value.detach() for name, value in module.state_dict().items() if name not in frozen}


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a training's folder, the newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if is_checkpoint(path)]
    return sorted(paths, key=_step_of, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    updates: int,
    scaler: GradScaler | None,
    config_hash: str,
    every: int = 1,
) -> None:
    """Write the checkpoint after `step` finished steps. Delete all older checkpoints but the last.

    updates: Number of the optimiser's updates, fewer than `step` if fp16 skipped some. scaler: Gradient scaler of fp16, None in
    other precisions. every: Number of steps between two checkpoints. An earlier checkpoint of another step, which was written
    when a signal came, is deleted.
    """
    trained = _names(module, optimizer)
    tensors = {f"model.{name}": value for name, value in moving_state(module, trained).items()}
    for parameter, name in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    numbers = {"step": step, "updates": updates, "config_hash": config_hash, "scaler": _scale(scaler)}
    path = folder / f"checkpoint-{step}-{{digest}}.safetensors"
    digest = write_tensors(path, {**tensors, **_random_state()}, {STATE: json.dumps(numbers)})
    _delete_others(folder / path.name.format(digest=digest[:12]), every)


def load(
    folder: Path, module: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, config_hash: str
) -> tuple[int, int]:
    """Restore the newest sound checkpoint of a folder. Return the finished steps and the optimiser's updates, 0 without one.

    Damaged checkpoints are named on the console. Raise UserError, before anything is changed, if all checkpoints are damaged,
    and for a checkpoint of another training.
    """
    paths = checkpoints(folder)
    if not paths:
        return 0, 0
    odd = next((path for path in paths if not path.is_file()), None)
    if odd is not None:
        raise UserError(f"checkpoint '{odd}' is not a file; remove it.")
    damaged = [path for path in paths if not _is_sound(path)]
    sound = next((path for path in paths if path not in damaged), None)
    if sound is None:
        names = " and ".join(f"'{path}'" for path in damaged)
        raise UserError(f"checkpoint {names}: damaged; delete to train from the start.")
    for path in damaged:
        console.stage("resume", f"checkpoint '{path}' is damaged; an older one is used")
    progress = _restore(sound, module, optimizer, scaler, config_hash)
    _delete_others(sound)
    return progress


def _delete_others(newest: Path, every: int = 1) -> None:
    """Delete all checkpoints of a folder except `newest` and the last earlier one whose step is a multiple of `every`."""
    paths = checkpoints(newest.parent)
    before = [path for path in paths if _step_of(path) < _step_of(newest) and _step_of(path) % every == 0]
    for path in set(paths) - {newest, *before[: KEPT - 1]}:
        path.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _is_sound(path: Path) -> bool:
    """Return whether a checkpoint still has the content that was written."""
    try:
        return file_digest(path).startswith(path.stem.rpartition("-")[2])
    except OSError:
        return False


def _restore(
    path: Path, module: nn.Module, optimizer: Optimizer, scaler: GradScaler | None, config_hash: str
) -> tuple[int, int]:
    """Check everything in a checkpoint, then restore random state, module, optimiser and scaler from it."""
    what = f"checkpoint '{path}'"
    try:
        with safetensors.safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {})[STATE])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{what} is not what a training writes; delete it to train from the start.") from error
    step, updates = _checked(what, numbers, _step_of(path), scaler, config_hash)
    random = _random_state()
    gpus = {name for name in tensors if name.startswith("random.cuda.")}
    if gpus != random.keys() - {"random.cpu"}:  # the machine had another number of GPUs
        tensors = {name: value for name, value in tensors.items() if name not in gpus}
        random = {"random.cpu": random["random.cpu"]}
    state = {f"model.{name}": value for name, value in moving_state(module).items()}
    fields = _fields(optimizer)
    optimised = {}
    for parameter, name in _names(module, optimizer).items():
        keys = {key: f"optimizer.{name}.{key}" for key in fields}
        if not tensors.keys().isdisjoint(keys.values()):  # a parameter that never had a gradient has no state
            optimised[parameter] = keys
    like = {
        keys[key]: field if field.ndim == 0 else parameter
        for parameter, keys in optimised.items()
        for key, field in fields.items()
    }
    _check_tensors(what, tensors, {**random, **state, **like})
    trained = {f"model.{name}" for name, _ in module.named_parameters(remove_duplicate=False)}
    # buffers may be infinite
    _check_finite(what, {name: tensors[name] for name in [*like, *(state.keys() & trained)]})
    counters = [keys[key] for keys in optimised.values() for key, field in fields.items() if field.ndim == 0]
    for name in counters:
        count = float(tensors[name])
        if not 0 <= count <= updates:
            raise UserError(f"{what}: {name} is {count:g} after {updates} updates; delete the checkpoint.")
    _set_random_state(what, {name: tensors[name] for name in random})
    module.load_state_dict({name.removeprefix("model."): tensors[name] for name in state}, strict=False)
    for parameter, keys in optimised.items():
        optimizer.state[parameter] = {key: tensors[name].to(like[name].device) for key, name in keys.items()}
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), **numbers["scaler"]})
    return step, updates


def _checked(what: str, numbers: object, step: int, scaler: GradScaler | None, config_hash: str) -> tuple[int, int]:
    """Return the progress in a checkpoint's numbers. Raise UserError for values that no training writes."""
    refusal = UserError(f"{what} has numbers that no training writes: {numbers}; delete it to train from the start.")
    if not isinstance(numbers, dict) or set(numbers) != {"step", "updates", "config_hash", "scaler"}:
        raise refusal
    other, updates = numbers["config_hash"], numbers["updates"]
    if other != config_hash:
        raise UserError(f"{what} is of configuration {other}, this is {config_hash}; use another run folder.")
    whole = type(updates) is int and type(numbers["step"]) is int
    if not whole or numbers["step"] != step or not 0 <= updates <= step or (scaler is None and updates != step):
        raise refusal
    fresh, scale = _scale(scaler), numbers["scaler"]
    if fresh is not None and isinstance(scale, dict) and scale.keys() == fresh.keys():
        fits = all(type(scale[key]) is type(value) and 0 <= scale[key] < math.inf for key, value in fresh.items())
        fits &= scale.get("scale") != 0
    else:
        fits = scale is None and fresh is None
    if not fits:
        raise refusal
    return step, updates


def _check_tensors(what: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    check_tensors(what, {name: tuple(value.shape) for name, value in like.items()}, dict(tensors))
    for name, value in like.items():
        if tensors[name].dtype != value.dtype:
            raise UserError(f"{what}: {name}: saved {tensors[name].dtype}, needed {value.dtype}.")


def _check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{what}: {name} is not finite; delete the checkpoint to train from the start.")


def _names(module: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, str]:
    optimised = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {parameter: name for name, parameter in module.named_parameters() if parameter in optimised}


def _fields(optimizer: Optimizer) -> Mapping[str, Tensor]:
    """Return the state that an optimiser keeps for one matrix, by key.

    It is found by a step of a copy of the optimiser on a matrix of zeros.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):  # a method's optimiser wraps another optimiser
        inner = inner.optimizer
    twin = copy.copy(inner)
    parameter = inner.param_groups[0]["params"][0]
    probe = nn.Parameter(torch.zeros(2, 2, dtype=parameter.dtype, device=parameter.device))
    probe.grad = torch.zeros_like(probe)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**inner.param_groups[0], "params": [probe]}]
    twin.step()
    return twin.state[probe]


def _scale(scaler: GradScaler | None) -> dict[str, float] | None:
    """Return the moving numbers of a gradient scaler."""
    if scaler is None:
        return None
    state = scaler.state_dict()
    return {key: state[key] for key in ("scale", "_growth_tracker") if key in state}


def _random_state() -> dict[str, Tensor]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"random.cpu": torch.get_rng_state(), **{f"random.cuda.{index}": state for index, state in enumerate(gpus)}}


def _set_random_state(what: str, states: Mapping[str, Tensor]) -> None:
    try:
        torch.set_rng_state(states["random.cpu"])
    except RuntimeError as error:
        raise UserError(f"{what}: random.cpu is not the state of a generator; delete the checkpoint.") from error
    for name, state in states.items():
        if name != "random.cpu":
            torch.cuda.set_rng_state(state, int(name.rpartition(".")[2]))
