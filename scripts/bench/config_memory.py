"""`scripts.bench memory --config FILE`: the memory of a training step of a dense configuration, predicted from two small batches.

    peak(b) = weights + optimiser state + fixed + b x (bytes of an image)

The two terms on the right are those of the largest allocation in a forward and backward pass (scripts/bench/accounting.py) of one
and of two images, at the configuration's size and precision; gradients are in them. Weights and images are random, so neither
is fetched, but EMTAL's clustering runs. One row each for the configuration's last arm as it is, with `train.recompute: cheap`
and with `train.checkpointing: true`. Left out: workspaces of kernels, unused memory of the allocator, temporaries of the
optimiser, and its step counters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from scripts.bench.accounting import optimizer_bytes_formula, peak_bytes, weight_bytes
from scripts.bench.timing import Comparison
from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import Sample
from vismt.engine.blocks import running_blocks
from vismt.jobs import load_config, make_job
from vismt.jobs.multitask.config import MultitaskConfig, trained_tasks
from vismt.jobs.multitask.job import MapsJob
from vismt.jobs.multitask.maps_data import DenseData
from vismt.lowrank.recompute import recompute
from vismt.multitask.tasks import MapTask, Task

DATA = SimpleNamespace(class_counts=lambda task: [1] * task.channels, mean_depth=1.0)  # a label of each class
DATA.counted = partial(DenseData.counted, cast(DenseData, DATA))

WAYS = {
    "as it is": {"recompute": "none", "checkpointing": False},
    "recompute: cheap": {"recompute": "cheap", "checkpointing": False},
    "checkpointing: true": {"recompute": "none", "checkpointing": True},
}
KINDS = {"adamw": "adamw", "sgd": "sgd_momentum"}  # optimiser -> kind of optimizer_bytes_formula
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ConfigMemory:
    """Predicted bytes of a training step. passes: largest allocation of a pass of one and of two images, by way."""

    title: str
    batch: int
    weights: int
    optimizer: int
    passes: dict[str, tuple[int, int]]

    def peak(self, way: str, batch: int) -> int:
        """Return the predicted peak of a step with `batch` images, bytes."""
        one, two = self.passes[way]
        return self.weights + self.optimizer + one + (batch - 1) * (two - one)

    def __str__(self) -> str:
        head = f"{'GiB':<22}{'weights':>9}{'optimiser':>11}{'an image':>10}{f'peak of {self.batch}':>12}"
        rows = [
            f"{way:<22}{_gib(self.weights):>9}{_gib(self.optimizer):>11}{_gib(two - one):>10}"
            f"{_gib(self.peak(way, self.batch)):>12}"
            for way, (one, two) in self.passes.items()
        ]
        return "\n".join([self.title, head, *rows])

    def comparisons(self) -> list[Comparison]:
        """Return none: a prediction has no target."""
        return []


def run(path: Path, device: str = "cpu") -> list[ConfigMemory]:
    """Predict the memory of the last arm of a dense configuration.

    Raises:
        UserError: for a configuration of another job.
    """
    config = load_config(path, [])
    if not isinstance(config, MultitaskConfig) or not config.size:
        raise UserError(
            f"bench memory: --config '{path}' has no task of maps; give a multitask configuration with size."
        )
    config = replace(config, model=replace(config.model, pretrained=False))
    with tempfile.TemporaryDirectory() as folder:
        job = cast(MapsJob, make_job(config, Path(folder)))
    arm, settings = list(job.study.arms.items())[-1]
    job.__dict__["data"] = DATA
    net, method, balanced = job.prepared(settings)
    objective = job.objective(settings, net, balanced).to(device).train()
    batches = [made_batch(trained_tasks(settings), count, settings.size, device) for count in (1, 2)]
    passes = {way: tuple(_pass(objective, settings, batch, way) for batch in batches) for way in WAYS}
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    precision = settings.training.precision
    title = f"{path.stem}, arm {arm}: {config.model.name}, {method}, {settings.size[0]} x {settings.size[1]} px, {precision}"
    state = optimizer_bytes_formula(trained, KINDS[settings.training.optimizer])
    return [ConfigMemory(title, settings.batch, weight_bytes(objective), state, cast(Any, passes))]


def _pass(objective: nn.Module, settings: MultitaskConfig, batch: Sample, way: str) -> int:
    """Return the largest allocation of a forward and backward pass, bytes."""
    training = replace(settings.training, compile=False, **cast(Any, WAYS[way]))
    dtype = DTYPES.get(training.precision)

    def call() -> None:
        cheap = recompute(objective) if training.recompute == "cheap" else nullcontext()
        with cheap, torch.autocast(batch["image"].device.type, dtype, enabled=dtype is not None):
            loss = objective(batch)["loss"]
        loss.backward()

    with running_blocks(objective, training):
        peak = peak_bytes(call, steps=1)
    objective.zero_grad(set_to_none=True)
    return peak


def made_batch(tasks: Sequence[Task], count: int, size: Sequence[int], device: str = "cpu") -> Sample:
    """Return `count` random images in which every pixel has a value of every task."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *size)
    batch = {"image": torch.rand(count, 3, *size, generator=generator)}
    for task in tasks:
        batch[task.key] = _target(task, shape, generator)
    return {name: values.to(device) for name, values in batch.items()}


def _target(task: Task, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if task.vector:
        return nn.functional.normalize(torch.randn(shape[0], 3, *shape[1:], generator=generator), dim=1)
    classes = getattr(task, "classes", None)
    if classes is None:
        return 1 + torch.rand(shape, generator=generator)
    return torch.randint(classes, shape if isinstance(task, MapTask) else shape[:1], generator=generator)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
