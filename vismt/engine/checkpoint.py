"""The checkpoint of a training: trainable tensors, buffers, optimiser, schedule, random state and step, written atomically.

A training starts from 1. the checkpoint.pt of its folder, if there is one, 2. the adapter's start values. Batches are a
function of the step number, so the step is enough to continue with the data.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vismt.errors import UserError
from vismt.files import atomic_write
from vismt.lowrank.store import check_tensors

NAME = "checkpoint.pt"


def moving_state(module: nn.Module, trained: Iterable[torch.Tensor] = ()) -> dict[str, torch.Tensor]:
    """Return what training may change, the state dict without the frozen parameters, on the CPU.

    trained: parameters that are included even if a schedule has frozen them at the moment.
    """
    moving = set(trained)
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, value in named if not value.requires_grad and value not in moving}
    return {name: value.detach().cpu() for name, value in module.state_dict().items() if name not in frozen}


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    scaler: Any,
    config_hash: str,
    trained: Iterable[torch.Tensor] = (),
) -> None:
    """Write the checkpoint after `step` finished steps; the previous one stays until the new one is complete.

    scaler: fp16's gradient scaler, None in other precisions. trained: as for `moving_state`.
    """
    state = {
        "step": step,
        "config_hash": config_hash,
        "tensors": moving_state(module, trained),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / NAME, buffer.getvalue())


def load(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, scaler: Any, config_hash: str
) -> int:
    """Restore the checkpoint of a folder and return its number of finished steps; 0 without a checkpoint."""
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved_hash = state["config_hash"]
        tensors = dict(state["tensors"])
    except Exception as error:  # a torn file can raise any error in the reader
        raise UserError(
            f"checkpoint '{path}' is damaged ({type(error).__name__}); delete it to train from the start."
        ) from error
    if saved_hash != config_hash:
        raise UserError(
            f"checkpoint '{path}' is of configuration {saved_hash}, this is {config_hash}; use another run folder."
        )
    wanted = {name: tuple(value.shape) for name, value in moving_state(module).items()}
    check_tensors(f"checkpoint '{path}'", wanted, tensors)
    try:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        step = int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint '{path}' does not fit this training ({error}); delete it to start again."
        ) from error
    module.load_state_dict(tensors, strict=False)  # it has no frozen parameters
    if state["cuda_random"] and len(state["cuda_random"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    return step
