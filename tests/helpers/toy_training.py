"""A training of a second: its run, its interruption, and checkpoints with other content and the right digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from vismt.config.sections import TrainConfig
from vismt.engine import checkpoint, loop, runtime
from vismt.storage.lines import read_lines

Objective = TypeVar("Objective", bound=nn.Module)


class Toy(nn.Module):
    """A regression with dropout; the bias of `unused` never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(4, 1), nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))  # whose moments are scalars too, of either sign
        self.unused = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.full((2,), float("-inf")))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = self.scale * nn.functional.dropout(self.frozen(batch), 0.3, self.training)
        return {"loss": (self.layer(hidden) - batch.sum(1, keepdim=True)).square().mean()}


def batches(number: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def train(
    objective: Objective,
    batch: Callable[[int], Any],
    folder: Path,
    stop_after: int | None = None,
    *,
    seed: int = 1,
    sections: Any = None,
    **settings: Any,
) -> Objective:
    """Train an objective, which is returned, or interrupt it after a step; settings: of `train`."""

    def after(_: nn.Module, step: int) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    config, accelerator = TrainConfig(**settings), runtime.accelerator()
    loop.train(objective, batch, config, folder, "hash", accelerator, seed=seed, after_step=after, sections=sections)
    return objective


def run(folder: Path, stop_after: int | None = None, **settings: Any) -> Toy:
    settings = {"steps": 8, "lr": 0.05, "warmup": 2, "checkpoint_every": 3, **settings}
    return train(Toy(), batches, folder, stop_after, **settings)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a training's log without their times."""
    return [
        {name: row[name] for name in row if name not in ("elapsed_s", "memory_mb")}
        for row in read_lines(folder / "metrics.jsonl")
    ]


def stopped(folder: Path, **settings: Any) -> list[Path]:
    """Return the checkpoints of steps 6 and 3."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop_after=7, **settings)
    return checkpoint.checkpoints(folder)


def rewritten(path: Path, tensors: dict[str, Tensor], numbers: object) -> None:
    """Replace a checkpoint by one with other content and the right digest."""
    step = path.name.split("-")[1]
    path.unlink()
    payload = safetensors.torch.save(
        tensors, {"state": json.dumps(numbers)}
    )  # which has dtypes that vismt does not write
    path.with_name(f"checkpoint-{step}-{sha256(payload).hexdigest()[:12]}.safetensors").write_bytes(payload)
