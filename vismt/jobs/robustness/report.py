"""The report sections of a robustness run: normalised corruption errors, the masking check, images that an attack broke."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vismt.base.errors import UserError
from vismt.engine.study import Study
from vismt.jobs.robustness.config import RobustnessConfig
from vismt.jobs.robustness.evaluation import ACCURACY
from vismt.report.panels import read_panel
from vismt.report.plotting import RIGHT, WRONG, axes_at, new_figure, save_figure, short, show_image, write
from vismt.report.results import RESULTS, Result, read_results
from vismt.report.tables import Picture, Section, Table
from vismt.robustness.attacks.attacks import AttackSpec, radius_text
from vismt.robustness.classifier import ROBUSTBENCH, SUFFIXES
from vismt.robustness.corruptions import error_under_corruptions
from vismt.storage.files import atomic_write
from vismt.storage.lines import read_lines

_THREATS = {"linf": "Linf", "l2": "L2"}  # folders of RobustBench
# Keys of a file of RobustBench, in its order.
MODEL_INFO = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps"),
    *("clean_acc", "reported", "autoattack_acc", "unreliable"),
)
MASKING = "masking.jsonl"  # a file of the run folder
BROKEN = "broken"  # a folder of the run folder
CORRUPTION_NOTE = (
    "Error over severities of each corruption divided by the error of the baseline, averaged over the corruptions. Below 100 is "
    "more robust than the baseline. It is not the mCE of ImageNet-C: its images are others (docs/guides/robustness.md), and the "
    "baseline is an arm of this run."
)
_MASKING_TYPES = {
    "arm": str,
    "data": str,
    "epsilons": list[float],
    "accuracies": list[float],
    "chance": float,
    "n": int,
    "verdict": str,
}
_MASKING_NOTE = (
    "The first attack at growing radii. With honest gradients the accuracy does not rise with the radius and ends at chance. "
    "Where it fails, or where the attack's steps cannot cross the ball, the accuracies under attack do not measure "
    "robustness. The verdict ends with the accuracy under this attack minus that under `strong` at the attack's radius."
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
        Section("Gradient masking", _masking(folder)),
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


def _masking(folder: Path) -> list[tuple[Table, str]]:
    lines = read_lines(folder / MASKING, _MASKING_TYPES, {"norm": str}, whole=True)
    if not lines:
        return []
    tables: dict[str, Table] = {}  # by their radii, which in l2 and l1 depend on the size of the images
    for line in lines:
        norm = line.get("norm", "linf")
        radii = [radius_text(norm, radius) if radius else "clean" for radius in line["epsilons"]]
        heads = ["Arm", "Data", *radii, "chance", "n (images)", "Verdict"]
        values = [f"{100 * value:.1f}" for value in (*line["accuracies"], line["chance"])]
        empty = Table(f"By {norm} radius, accuracy in %", heads, [], set())
        row = [line["arm"], line["data"], *values, str(line["n"]), line["verdict"]]
        tables.setdefault(f"{norm} {radii}", empty).rows.append(row)
    return [(table, _MASKING_NOTE) for table in tables.values()]


def broken_figure(panel: Path, path: Path) -> Path:
    """Draw a column for each image: clean with its answer, attacked with its answer, and the change enlarged."""
    arrays = read_panel(panel, "broken")
    clean, attacked = arrays["images"], arrays["attacked"]
    change = attacked.astype(int) - clean.astype(int)
    gain = max(1, 127 // max(1, int(np.abs(change).max())))
    rows = [
        (clean, arrays["clean_answers"], "clean"),
        (attacked, arrays["attacked_answers"], "attacked"),
        (np.clip(128 + gain * change, 0, 255).astype(np.uint8), None, f"change × {gain}"),
    ]
    side, pitch, left = 1.25, 1.4, 1.0
    figure = new_figure(left + pitch * len(clean) + 0.1, 0.35 + 1.6 * len(rows))
    for row, (images, answers, name) in enumerate(rows):
        top = 0.3 + 1.6 * row
        write(figure, 0.1, top + side / 2, name, va="center")
        for column, image in enumerate(images):
            x = left + pitch * column
            show_image(axes_at(figure, x, top, side, side), image)
            if row == 0:
                truth = short(str(arrays["truth"][column]), 16)
                write(figure, x, top - 0.06, truth, va="bottom", weight="bold", fontsize=8.5)
            if answers is not None:
                right = answers[column] == arrays["truth"][column]
                color = RIGHT if right else WRONG
                text = f"{'✓' if right else '✗'} {short(str(answers[column]), 16)}"
                write(figure, x, top + side + 0.05, text, va="top", color=color, fontsize=8.5)
    return save_figure(figure, path)


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
