"""Checkpoints of a training's folder."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from vismt.engine.checkpoint import checkpoints


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The module's tensors in the newest checkpoint of a folder."""
    tensors = safetensors.torch.load_file(checkpoints(folder)[0])
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
