"""A hand-made run folder of two sets and two arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helpers.results import HASH, PGD, add, measure
from vismt.storage.files import sealed
from vismt.uncertainty.intervals import CLEAN, Score

FROZEN = [0.2, 0.4, 0.6, 0.8]


def add_arm(
    folder: Path,
    data: str,
    arm: str,
    clean: Sequence[float],
    attacked: Sequence[float],
    *,
    protocol: str = "5-way 1-shot",
    records: bool = True,
) -> None:
    """Append an arm's rows on one set, clean and attacked, and its records."""
    for condition, values in ((CLEAN, clean), (PGD, attacked)):
        score = Score("few-shot", data, protocol, measure(values, chance=0.2), condition, "episodes")
        add(folder, score, arm, records=records)


def make_folder(parent: Path, **facts: object) -> Path:
    """Two sets. digits: adapted is better by exactly 0.1 in each episode. crops: the arms take turns. facts: of run.json."""
    folder = parent / "run-4f2a"
    add_arm(folder, "digits", "frozen", FROZEN, [0.1, 0.1, 0.2, 0.2])
    add_arm(folder, "digits", "adapted", [v + 0.1 for v in FROZEN], [0.2, 0.2, 0.3, 0.3])
    add_arm(folder, "crops", "frozen", FROZEN, [0.0, 0.2, 0.0, 0.2])
    add_arm(folder, "crops", "adapted", [0.3, 0.35, 0.7, 0.75], [0.4, 0.5, 0.4, 0.5])
    (folder / "run.json").write_text(
        sealed(
            {
                "title": "Digits <script>alert(1)</script> & crops",
                "command": "vismt run configs/quickstart.yaml seed=0",
                "git_revision": "0123456789ab",
                "config_hash": HASH,
                "hardware": "a processor, 2 cores",
                "seed": 0,
                "evaluation_seed": 1,
                "started": "2026-01-05T10:00:00+00:00",
                "finished": "2026-01-05T10:07:12+00:00",
                "wall_time_s": 432.4,
                "versions": {"python": "3.11.7", "torch": "2.13.0"},
                "adapt": {"arms": {"adapted": {"method": "lora", "rank": 8, "trainable": 250, "total": 1000}}},
                **facts,
            }
        )
    )
    (folder / "config.resolved.yaml").write_text("title: <img src=x onerror=alert(2)>\nseed: 0\n")
    return folder
