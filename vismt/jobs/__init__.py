"""Jobs by the `task` key of a configuration, loaded when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from vismt.config import RunConfig, config_hash, override, read_yaml, typed
from vismt.errors import UserError, near

# task -> module with a dataclass CONFIG (a RunConfig) and a class JOB.
JOBS = {
    "dense": "vismt.jobs.dense.job", "fewshot": "vismt.jobs.fewshot.job", "lm": "vismt.jobs.lm.job",
    "multitask": "vismt.jobs.classification.job",
}  # fmt: skip


class Job(Protocol):
    """What a task has to offer to the commands. `folder` is its run folder."""

    config: RunConfig

    @property
    def trains(self) -> bool: ...  # whether the configuration asks for a training

    def train(self) -> dict[str, Any]: ...  # writes adapter/, returns what run.json says of the adaptation

    def evaluate(self, attacks: list[Any] | None = None) -> list[dict[str, Any]]: ...  # rows of results.jsonl

    def adapted(
        self, expert: str | None = None
    ) -> nn.Module: ...  # the stock model with the adapter (of one expert) in it

    def merged(self, expert: str | None = None) -> nn.Module: ...  # the same with the update folded in

    def about(self) -> dict[str, Any]: ...  # what config.json beside merged weights says besides

    def beside(
        self, expert: str | None = None
    ) -> dict[str, bytes]: ...  # files that go with what is merged or exported, by name


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """The typed configuration of a YAML file."""
    raw = override(read_yaml(path), overrides)
    return typed(raw, config_type(raw, str(path)), str(path))


def config_type(raw: Mapping[str, Any], source: str) -> type[RunConfig]:
    """The dataclass of the task that a configuration names."""
    return _module(str(raw.get("task", "fewshot")), source).CONFIG


def make_job(config: RunConfig, folder: Path) -> Job:
    """The job of a configuration."""
    return _module(config.task, str(folder)).JOB(config, folder, config_hash(config))


def _module(task: str, source: str) -> Any:
    if task not in JOBS:
        raise UserError(f"{source}: task '{task}' is not known.{near(task, JOBS)}")
    return importlib.import_module(JOBS[task])
