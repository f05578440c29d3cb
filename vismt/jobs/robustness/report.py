"""The report sections of a robustness run: normalised corruption errors, images that an attack broke."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vismt.base.errors import UserError
from vismt.engine.study import Study
from vismt.jobs.robustness.config import RobustnessConfig
from vismt.jobs.robustness.evaluation import ACCURACY
from vismt.report.panels import read_panel
from vismt.report.results import RESULTS, Result, read_results
from vismt.report.tables import Picture, Section, Table
from vismt.report.tiles import Tile, TileRow, draw_tiles, enlarged_change
from vismt.robustness.attacks.attacks import AttackSpec, radius_text
from vismt.robustness.classifier import ROBUSTBENCH, SUFFIXES
from vismt.robustness.corruptions import error_under_corruptions
from vismt.storage.files import atomic_write

_THREATS = {"linf": "Linf", "l2": "L2"}  # folders of RobustBench
# Keys of a file of RobustBench, in its order.
MODEL_INFO = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps"),
    *("clean_acc", "reported", "autoattack_acc", "unreliable"),
)
BROKEN = "broken"  # a folder of the run folder
CORRUPTION_NOTE = (
    "Error over severities of each corruption divided by the error of the baseline, averaged over the corruptions. Below 100 is "
    "more robust than the baseline. It is not the mCE of ImageNet-C: its images are others (docs/guides/robustness.md), and the "
    "baseline is an arm of this run."
)
BROKEN_CAPTION = (
    "The first images that are right when clean and wrong under the first attack: clean, attacked, and the change enlarged. "
    "The answer stands below each image."
)


def sections(folder: Path, config: RobustnessConfig, results: Sequence[Result]) -> list[Section]:
    """Return the sections of a robustness run, as far as the run folder has the files."""
    pictures = []
    for path in sorted((folder / BROKEN).glob("*.npz")):
        drawn = broken_figure(path, folder / "figures" / f"broken-{path.stem}.svg")
        pictures.append(Picture(drawn, path.stem, BROKEN_CAPTION))
    return [
        Section("Error under corruptions", _normalised(config, results)),
        Section("Images that broke", pictures=pictures, folded=True),
    ]


def _normalised(config: RobustnessConfig, results: Sequence[Result]) -> list[tuple[Table, str]]:
    baseline = config.evaluate.baseline
    errors: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in results:
        if row.kind == "corruption" and row.level is not None and row.metric == ACCURACY:
            by_severity = errors.setdefault((row.data, row.arm), {}).setdefault(row.family, {})
            by_severity[int(row.level)] = 1 - row.value
    if baseline is None or not errors:
        return []
    rows = [
        [data, arm, f"{100 * error_under_corruptions(arm_errors, errors[data, baseline]):.1f}", str(len(arm_errors))]
        for (data, arm), arm_errors in errors.items()
        if (data, baseline) in errors
    ]
    return [
        (
            Table(f"Over {baseline}, in %", ["Data", "Arm", "relative error", "corruptions"], rows, set()),
            CORRUPTION_NOTE,
        )
    ]


def broken_figure(panel: Path, path: Path) -> Path:
    """Draw a column for each image: clean with its answer, attacked with its answer, and the change enlarged."""
    arrays = read_panel(panel)
    gain, change = enlarged_change(arrays["images"], arrays["attacked"])
    truth = arrays["truth"].tolist()

    def tiles(images: np.ndarray, answers: str) -> list[Tile]:
        given = arrays[answers].tolist()
        return [Tile(image, "", [(answer, answer == name)]) for image, answer, name in zip(images, given, truth)]

    clean = [replace(tile, head=name) for tile, name in zip(tiles(arrays["images"], "clean_answers"), truth)]
    attacked = tiles(arrays["attacked"], "attacked_answers")
    rows = [TileRow(clean, name="clean"), TileRow(attacked, name="attacked")]
    return draw_tiles([*rows, TileRow([Tile(image) for image in change], name=f"change × {gain}")], path)


def write_model_info(folder: Path, config: RobustnessConfig, run_hash: str) -> list[Path]:
    """Write the results of a run in the format of RobustBench's `model_info` (github.com/RobustBench/robustbench).

    There is one file for each arm, set and radius under the standard AutoAttack, robustbench/<set>/<Linf or L2>/<arm>.json, in
    the folders that RobustBench has. Accuracies are texts in per cent. Unknown entries, such as title and authors, are null.
    Returns the paths.

    Raises UserError if the run has no result of AutoAttack with its standard lengths in linf or l2.
    """
    results = read_results(folder / RESULTS, run_hash)
    arms = Study(config, folder).arms
    clean = {(row.data, row.arm): row for row in results if row.kind == "clean" and row.metric == ACCURACY}
    found: list[tuple[Result, str]] = []
    for row in results:
        norm = row.family.removeprefix("AutoAttack ")
        if row.kind == "attack" and norm in _THREATS and row.level is not None and row.seed is None:
            standard = AttackSpec(
                "autoattack", row.level, norm=norm, seed=config.seed
            ).label  # with the default settings
            if row.condition == standard and row.metric == ACCURACY:
                found.append((row, norm))
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
        path = folder / "robustbench" / dataset.replace("/", "-") / _THREATS[norm] / f"{name}.json"
        classifier = arms[row.arm].classifier
        timm = classifier.name or ""
        known = classifier.architecture is not None or timm.startswith(ROBUSTBENCH) or Path(timm).suffix in SUFFIXES
        architecture = classifier.architecture if known else classifier.name
        accuracies = {"clean_acc": clean[row.data, row.arm].value, "autoattack_acc": row.value}
        info = dict.fromkeys(MODEL_INFO) | {"dataset": dataset, "architecture": architecture, "eps": radius}
        info |= {key: f"{100 * value:.2f}" for key, value in accuracies.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(info, indent=2) + "\n")
        paths.append(path)
    return paths
