"""How the trainings of a run changed the weights: a table, the picture by depth, and the numbers of each training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from vismt.engine.study import chosen_trainings
from vismt.engine.training_files import CHANGES
from vismt.report.plotting import MUTED, color_of, one_panel, save_figure
from vismt.report.tables import Picture, Section, Table
from vismt.storage.files import JsonObject
from vismt.storage.lines import read_lines

CHANGE, STABLE, SKEW = "relative norm of the update", "stable rank of the update", "skew of the update over depth"
_NOTE = (
    "Means over the changed matrices but those that were zero, then over the trainings. The norm of an update is divided by that "
    "of its weight. The stable rank is |ΔW|²/σ², between 1 and the rank. The skew is the relative norm of the block that changed "
    "most, divided by that of the median block. For weights trained in place, ΔW is the difference of the weights."
)
_CAPTION = "Mean relative norm of the update of the matrices of each block, over the trainings."
CHANGE_TYPES = {"weight": str, "norm": float, "change": float, "stable_rank": float}
Lines = Sequence[JsonObject]


def read_changes(folder: Path, arms: Sequence[str]) -> dict[str, dict[int, Lines]]:
    """Return the changed matrices of every training at the chosen rate, by arm and seed, as far as they were measured.

    Matrices that were zero before the training are left out, because their change is a share of nothing.
    """
    found: dict[str, dict[int, Lines]] = {}
    for arm in arms:
        for seed, training in chosen_trainings(folder, arm).items():
            rows = read_lines(training / CHANGES, CHANGE_TYPES)
            lines = [line for line in rows if line["norm"]]
            if lines:
                found.setdefault(arm, {})[seed] = lines
    return found


def of_blocks(lines: Lines) -> dict[int, Lines]:
    """Return the lines of the matrices of each block by its number. Matrices outside the blocks are left out."""
    found: dict[int, list[JsonObject]] = {}
    for line in lines:
        number = re.search(r"\.(\d+)\.", f".{line['weight']}")
        if number:
            found.setdefault(int(number[1]), []).append(line)
    return dict(sorted(found.items()))


def by_depth(lines: Lines) -> dict[int, float]:
    """Return the mean relative norm of the update by number of the block."""
    return {block: fmean(map(_relative, of)) for block, of in of_blocks(lines).items()}


def measures(lines: Lines) -> dict[str, float]:
    """Return the numbers of one training by name."""
    depth = list(by_depth(lines).values())
    numbers = {CHANGE: fmean(map(_relative, lines)), STABLE: fmean(line["stable_rank"] for line in lines)}
    return numbers | ({SKEW: max(depth) / median(depth)} if len(depth) > 1 and median(depth) else {})


def _relative(line: JsonObject) -> float:
    return line["change"] / line["norm"]


def changes_section(folder: Path, arms: Sequence[str]) -> Section:
    """Return the section about the changed weights, and draw its figure. It is empty if nothing was measured."""
    changes = read_changes(folder, arms)
    title = "Changes of the weights"
    if not changes:
        return Section(title)
    rows = []
    for arm, trainings in changes.items():
        numbers = [measures(lines) for lines in trainings.values()]
        columns = [[of[name] for of in numbers if name in of] for name in (CHANGE, STABLE, SKEW)]
        count = len(next(iter(trainings.values())))
        rows.append([arm, str(len(trainings)), str(count), *(f"{fmean(of):.3g}" if of else "–" for of in columns)])
    heads = ["Arm", "trainings", "matrices", CHANGE, STABLE, SKEW]
    depths = {arm: [by_depth(lines) for lines in trainings.values()] for arm, trainings in changes.items()}
    drawn = {
        arm: {block: fmean(of[block] for of in several if block in of) for block in several[0]}
        for arm, several in depths.items()
        if len(several[0]) > 1
    }
    pictures = [Picture(depth_figure(drawn, folder / "figures" / "depth.svg"), title, _CAPTION)] if drawn else []
    return Section(title, [(Table(title, heads, rows, set(), texts=1), _NOTE)], pictures)


def depth_figure(depths: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """Draw a line for each arm over the blocks of the model.

    depths: Relative norm by arm and block, with more than one block each.
    """
    arms = list(depths)
    figure, axes = one_panel(arms, [color_of(arm, arms) for arm in arms], "Relative norm of the update, %")
    for arm, values in depths.items():
        norms = [100 * value for value in values.values()]
        axes.plot(list(values), norms, color=color_of(arm, arms), marker="o", markersize=3, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("block", color=MUTED, fontsize=9)
    return save_figure(figure, path)
