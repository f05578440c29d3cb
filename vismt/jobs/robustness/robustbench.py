"""The results of a robustness run in the format of RobustBench's `model_info` (github.com/RobustBench/robustbench).

One file for each arm, set and radius under the standard AutoAttack: robustbench/<set>/<Linf or L2>/<arm>.json, as its folders
are. Accuracies are texts in per cent. What a run does not know, such as title and authors, is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.engine.study import Study
from vismt.jobs.robustness.config import ClassifierConfig, RobustnessConfig
from vismt.report.results import RESULTS, Result, read_results
from vismt.robustness.attacks.attacks import AttackSpec, radius_text
from vismt.robustness.classifier import SUFFIXES
from vismt.robustness.conditions import condition_of
from vismt.robustness.robustbench import PREFIX
from vismt.storage.files import atomic_write

FOLDER = "robustbench"  # of the run folder
THREATS = {"linf": "Linf", "l2": "L2"}


def write_model_info(folder: Path, config: RobustnessConfig, run_hash: str) -> list[Path]:
    """Write the files of a run folder; return their paths.

    Raises UserError where it has no result of AutoAttack with its standard lengths in linf or l2.
    """
    results = read_results(folder / RESULTS, run_hash)
    arms = Study(config, folder).arms
    clean = {(row.data, row.arm): row for row in results if row.kind == "clean"}
    found = [(row, norm) for row in results for norm in THREATS if _is_standard(row, norm)]
    if not found:
        seen = sorted({row.condition for row in results if row.kind == "attack"})
        raise UserError(
            f"report --format robustbench: '{folder}' has no result of AutoAttack at its standard lengths in linf or l2 "
            f"(attacks: {', '.join(seen) or 'none'}); add one with `vismt attack {folder} --attack autoattack --epsilon 8/255`."
        )
    paths = []
    for row, norm in found:
        several = sum(other.data == row.data and other.arm == row.arm and kind == norm for other, kind in found) > 1
        radius = radius_text(norm, row.level or 0.0)
        name = f"{row.arm}-{radius.replace('/', '-')}" if several else row.arm
        dataset = row.data.partition(":")[0]
        path = folder / FOLDER / dataset.replace("/", "-") / THREATS[norm] / f"{name}.json"
        info = model_info(row, clean[row.data, row.arm], radius, dataset, _architecture(arms[row.arm].classifier))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(info, indent=2) + "\n")
        paths.append(path)
    return paths


def model_info(row: Result, clean: Result, radius: str, dataset: str, architecture: str | None) -> dict[str, Any]:
    """Return the entries of one file, in the order of RobustBench's files."""
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": None,
        "dataset": dataset,
        "venue": None,
        "architecture": architecture,
        "eps": radius,
        "clean_acc": f"{100 * clean.value:.2f}",
        "reported": None,
        "autoattack_acc": f"{100 * row.value:.2f}",
        "unreliable": None,
    }


def _architecture(classifier: ClassifierConfig) -> str | None:
    """Return the timm name of a classifier, None where the configuration has none."""
    name = classifier.name or ""
    if classifier.architecture is None and not name.startswith(PREFIX) and Path(name).suffix not in SUFFIXES:
        return classifier.name
    return classifier.architecture


def _is_standard(row: Result, norm: str) -> bool:
    """Whether a row is that of AutoAttack with its default settings in a norm."""
    if row.kind != "attack" or row.level is None or row.seed is not None or row.metric != "accuracy":
        return False
    standard = condition_of(AttackSpec("autoattack", row.level, norm=norm))
    return (row.condition, row.family) == (standard.label, standard.family)
