"""Accuracy of each class and its confusions, from counts that a job writes into `classes/` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vismt.report.panels import read_panel, write_arrays
from vismt.report.plotting import INK, MUTED, SMALL, axes_at, dress, new_figure, save_figure, short
from vismt.report.tables import Picture, Section, Table, interval_text
from vismt.storage.paths import file_name
from vismt.uncertainty.intervals import SHARE, wilson

CLASSES_FOLDER = "classes"  # folder in the run folder
MOST_IN_MATRIX = (
    16  # largest number of classes of a matrix (with more classes, the most frequent confusions are listed)
)
MOST_CONFUSIONS = 12
_NOTE = (
    "Share of the examples of a class that are answered right, in %, over all training seeds. [ ] and ±: Wilson's 95 % interval "
    "for independent examples of the class."
)
MATRIX_CAPTION = (
    "Rows: true class. Columns: answer. Each number is the share of the class in %, over all training seeds."
)
CONFUSIONS_NOTE = "The most frequent wrong answers: share of the true class in %, over all training seeds."


def write_confusion(
    folder: Path, name: str, classes: Sequence[str], answers: Sequence[str], counts: Mapping[str, np.ndarray]
) -> Path:
    """Write how often each class got each answer, for the report of a run. Return the file.

    Args:
        folder: Run folder.
        name: Name of the set, the heading in the report.
        classes: Names of the k true classes.
        answers: Names of the c answers, the classes first.
        counts: Counts int64 (k, c) by model, summed over the training seeds.
    """
    arrays = {
        "classes": np.array(list(classes), dtype=str),
        "answers": np.array(list(answers), dtype=str),
        "arms": np.array(list(counts), dtype=str),
        "counts": np.stack(list(counts.values())).astype(np.int64),
        "name": np.array([name], dtype=str),
    }
    path = folder / CLASSES_FOLDER / f"{file_name(name)}.npz"
    path.parent.mkdir(exist_ok=True)
    return write_arrays(path, arrays)


def class_section(folder: Path, first: str) -> Section:
    """Return the section about the classes of every set, as far as the job left counts.

    first: Model that is drawn first.
    """
    section = Section("Classes", folded=True)
    for path in sorted((folder / CLASSES_FOLDER).glob("*.npz")):
        panel = read_panel(path)
        arms = panel["arms"].tolist()
        order = sorted(range(len(arms)), key=lambda at: arms[at] != first)
        name, classes, answers = str(panel["name"][0]), panel["classes"].tolist(), panel["answers"].tolist()
        counts = {arms[at]: panel["counts"][at] for at in order}
        section.tables.append((_accuracies(name, classes, counts), _NOTE))
        if len(classes) > MOST_IN_MATRIX:
            section.tables.append((_confusions(name, classes, answers, counts), CONFUSIONS_NOTE))
            continue
        for number, (arm, matrix) in enumerate(counts.items()):
            target = folder / "figures" / f"confusion-{path.stem}-{number}.svg"
            drawn = confusion_figure(matrix, classes, answers, target)
            section.pictures.append(Picture(drawn, f"{name}, answers of {arm}", MATRIX_CAPTION))
    return section


def _accuracies(name: str, classes: Sequence[str], counts: Mapping[str, np.ndarray]) -> Table:
    """Return a row for each class with its accuracy by model, the rarest right answers of the first model first."""
    arms = list(counts)
    totals = {arm: matrix.sum(1) for arm, matrix in counts.items()}
    seeds = {arm: max(1, round(float(total.sum()) / max(1, totals[arms[0]].sum()))) for arm, total in totals.items()}
    shares = {arm: matrix.diagonal() / np.maximum(totals[arm], 1) for arm, matrix in counts.items()}
    rows = []
    for at in np.argsort(shares[arms[0]], kind="stable").tolist():
        texts = []
        for arm in arms:
            n = int(totals[arm][at]) // seeds[arm]
            share = float(shares[arm][at])
            texts.append(interval_text(share, *wilson(round(share * n), n), SHARE) if n else "–")
        rows.append([classes[at], *texts, f"{int(totals[arms[0]][at]):,}"])
    title = f"Accuracy by class, {name}"
    return Table(title, ["Class", *arms, "answers"], rows, set(), texts=1, folded=len(rows) > 2 * MOST_IN_MATRIX)


def _confusions(name: str, classes: Sequence[str], answers: Sequence[str], counts: Mapping[str, np.ndarray]) -> Table:
    """Return the most frequent confusions of the first model, and how often the others make them."""
    first = next(iter(counts.values())).copy()
    np.fill_diagonal(first, 0)
    places = np.argsort(-first, axis=None, kind="stable")[:MOST_CONFUSIONS]
    rows = []
    for truth, answer in (divmod(int(place), first.shape[1]) for place in places):
        if first[truth, answer]:
            texts = [f"{100 * matrix[truth, answer] / max(1, matrix[truth].sum()):.1f}" for matrix in counts.values()]
            rows.append([classes[truth], answers[answer], *texts])
    return Table(f"Confusions, {name}", ["True class", "Answer", *counts], rows, set())


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], answers: Sequence[str], path: Path) -> Path:
    """Draw the share of each answer in the rows of the true classes.

    matrix: Counts (k, c).
    """
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows, columns = [short(name, 16) for name in classes], [short(name, 16) for name in answers]
    cell, left, top = 0.38, 0.085 * max(map(len, rows)) + 0.2, 0.085 * max(map(len, columns)) + 0.2
    size = (cell * len(columns), cell * len(rows))
    figure = new_figure(left + size[0] + 0.1, top + size[1] + 0.1)
    axes = axes_at(figure, left, top, *size)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(matrix)):
        color = "white" if shares[row, column] > 55 else INK
        axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=SMALL)
    dress(axes, "")
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), columns, rotation=90, color=INK)
    axes.set_yticks(range(len(rows)), rows, color=INK)
    axes.tick_params(length=0, colors=MUTED)
    return save_figure(figure, path)
