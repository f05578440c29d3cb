"""The temperature of an evaluated model: one T for all its episodes, fitted on the clean queries of validation episodes.

    p = softmax(z / T), T > 0 with the smallest NLL                               (vismt/uncertainty/temperature.py)

The episodes are those of select.data, one T for all evaluated sets, or with select.class_share those of the classes of each
evaluated set that its test episodes never draw, one T for each. All their queries weigh the same, whatever their ways. Every
model has a T: z are the logits of `Models.task`, with the weights that the model takes for a task's support (pools,
fine-tuning), or the log-probabilities of a posterior. The settings of merged are chosen on the same episodes as its T. T
belongs to the ways and shots of the validation episodes. It changes no answer, so accuracies have no row.

A file beside the model's records has T; it is fitted again when the weights, the settings or the episodes change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from vismt.base import ranks
from vismt.base.seeds import digest
from vismt.data.pixels import Pixels
from vismt.data.set_entries import shown_name
from vismt.engine.log import record_stem
from vismt.jobs.fewshot.models import Models
from vismt.jobs.variants import kept
from vismt.metatune.protocol.protocol import clean_logits
from vismt.uncertainty.temperature import fit_temperature

ABSENT = -1e30  # logit of the classes that an episode of fewer ways lacks: a probability of 0 at any T


@dataclass(frozen=True)
class Temperature:
    """What was fitted for a model and validation episodes with a fingerprint, on n queries."""

    fingerprint: str
    temperature: float
    n: int


def temperature(folder: Path, models: Models, arm: str, data: str, opened: Callable[[str], Pixels]) -> float:
    """Return the temperature of a model on an evaluated set.

    Args:
        folder: of the run.
        models: of one training seed.
        arm: name of the model.
        data: the evaluated set.
        opened: returns a set by name.
    """
    select = models.config.selection
    names = select.data or [data]
    samplers = {name: models.settings.sampler(name) for name in names}

    def fit() -> Temperature:
        pairs = [
            pair
            for name, sampler in samplers.items()
            for pair in clean_logits(
                models.task(arm, data),
                opened(name),
                sampler,
                select.episodes,
                f"{shown_name(name)} {arm} for a temperature",
            )
        ]
        ways = max(logits.shape[1] for logits, _ in pairs)
        logits = torch.cat([F.pad(part.double(), (0, ways - part.shape[1]), value=ABSENT) for part, _ in pairs])
        labels = torch.cat([part for _, part in pairs])
        # Rounded, as it is part of the records' settings: another machine fits the same.
        return Temperature(fingerprint, float(f"{fit_temperature(logits, labels):.6g}"), len(labels))

    episodes = {name: [select.episodes, sampler.describe()] for name, sampler in samplers.items()}
    text = json.dumps([models.fingerprint(arm, data), episodes], sort_keys=True)
    fingerprint = digest(text.encode())
    path = temperature_file(folder, models.seed, "all" if select.data else shown_name(data), arm)
    return ranks.from_first(lambda: kept(path, Temperature, fingerprint, fit)).temperature


def episodes_file(folder: Path, seed: int, data: str, protocol: str, arm: str) -> Path:
    """Return the file of a model's records, one line for each episode."""
    return folder / "episodes" / f"seed-{seed}" / f"{record_stem(data, protocol, arm)}.jsonl"


def temperature_file(folder: Path, seed: int, validation: str, arm: str) -> Path:
    """Return the file of a model's temperature, fitted on the validation episodes of that name."""
    return folder / "episodes" / f"seed-{seed}" / f"{record_stem('temperature', validation, arm)}.json"
