"""Names of the files of an evaluated model: a line for each episode, and its temperature."""

from __future__ import annotations

from pathlib import Path

from vismt.engine.log import record_stem


def episodes_file(folder: Path, seed: int, data: str, protocol: str, arm: str) -> Path:
    """Return the file of a model's records, one line for each episode."""
    return folder / "episodes" / f"seed-{seed}" / f"{record_stem(data, protocol, arm)}.jsonl"


def temperature_file(folder: Path, seed: int, validation: str, arm: str) -> Path:
    """Return the file of a model's temperature, fitted on the validation episodes of that name."""
    return folder / "episodes" / f"seed-{seed}" / f"{record_stem('temperature', validation, arm)}.json"
