"""The section of the report that only language-model runs have: forgetting of texts that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from vismt.engine.study import Study
from vismt.jobs.lm.config import FROZEN, REFERENCES, LmConfig, trained_task
from vismt.jobs.lm.figures import Point, forgetting_figure
from vismt.report.results import Result
from vismt.report.sections import Picture, Section
from vismt.report.tables import scale_text
from vismt.uncertainty.intervals import SHARE

PERPLEXITY = "perplexity"
CAPTION = (
    "A dot for each training; squares and a line for the means over seeds of arms that differ only in the rate, which is "
    "written beside them. Compare at equal values of the trained task: a method forgets less where its line lies lower. "
    "Dashed: the model before training, where it lies within the axes."
)


def sections(folder: Path, config: LmConfig, study: Study[LmConfig], results: Sequence[Result]) -> list[Section]:
    """Return a picture for each set that has a perplexity and was not trained on."""
    trained = trained_task(config).name
    clean = [row for row in results if row.condition == "clean"]
    score = next((row for row in clean if row.task == trained), None)
    others = dict.fromkeys((row.task, row.data) for row in clean if row.metric == PERPLEXITY and row.task != trained)
    if score is None or not study.arms:
        return []
    factor = 100 if score.scale == SHARE else 1
    pictures = []
    for number, (task, data) in enumerate(others):
        trainings = _by_training(clean, (trained, score.data, score.metric), len(study.seeds))
        texts = _by_training(clean, (task, data, PERPLEXITY), len(study.seeds))
        points = {
            key: Point(_rate(study, key[0]), factor * row.value, texts[key].value)
            for key, row in trainings.items()
            if key in texts
        }
        path = folder / "figures" / f"forgetting-{number}.png"
        across = f"{trained} on {score.data}: {scale_text(score.metric, score.scale, score.better)}"
        families = _families(config, points)
        forgetting_figure(families, points.get((FROZEN, None)), across, f"{data}: {PERPLEXITY} ↓", path)
        pictures.append(Picture(path, f"Forgetting of {data}", CAPTION))
    return [Section("Forgetting", pictures=pictures)]


def _by_training(
    rows: Sequence[Result], score: tuple[str, str, str], seeds: int
) -> dict[tuple[str, int | None], Result]:
    """Return the rows of a score by arm and seed; for references and for a single seed the row of the mean."""
    return {
        (row.arm, row.seed): row
        for row in rows
        if (row.task, row.data, row.metric) == score and (row.seed is None) == (row.arm in REFERENCES or seeds == 1)
    }


def _rate(study: Study[LmConfig], arm: str) -> float:
    """Return an arm's chosen rate, 0 for a reference."""
    return 0.0 if arm in REFERENCES else study.trainings(arm)[0].lr


def _families(config: LmConfig, points: dict[tuple[str, int | None], Point]) -> dict[str, list[Point]]:
    """Return the points of arms that differ only in the rate, by the common start of the arms' names."""
    groups: dict[str, list[str]] = {}
    for arm, changes in config.arms.items():
        groups.setdefault(repr(sorted((key, value) for key, value in changes.items() if key != "train.lr")), []).append(
            arm
        )
    names: dict[str, str] = {}
    for group in groups.values():
        common = "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*group)))
        names |= dict.fromkeys(group, common.rstrip("-_ ") or group[0])
    families: dict[str, list[Point]] = {}
    for (arm, _), point in points.items():
        if arm not in REFERENCES:
            families.setdefault(names.get(arm, arm), []).append(point)
    return families
