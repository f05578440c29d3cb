"""The gradient-masking check of a few-shot run: its lines in masking.jsonl, on the console and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.report.tables import Table
from vismt.robustness.masking import MaskingCheck
from vismt.storage.lines import read_lines

LINES = "masking.jsonl"
NOTE = (
    "PGD-10 at growing radii on the first episodes of each set. With honest gradients the accuracy does not rise with the "
    "radius and ends at or below chance at 64/255, both within the 95 % interval over the episodes. Where it fails, the "
    "accuracies under attack do not measure robustness. The verdict ends with the accuracy under PGD-10 minus that under "
    "the attack `strong` at the same radius: by so much PGD-10 flatters the model."
)


def line(data: str, protocol: str, model: str, check: MaskingCheck, config_hash: str) -> dict[str, Any]:
    """Return the row of masking.jsonl for one check."""
    fields = {**vars(check), "epsilons": list(check.epsilons), "accuracies": list(check.accuracies)}
    about = {"data": data, "protocol": protocol, "model": model, "config_hash": config_hash}
    return {**about, **fields, "passed": check.passed, "verdict": check.verdict()}


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Return the checks of one model as one text for the console."""
    failed = [f"{row['data']} {row['verdict'].removeprefix('FAIL: ')}" for row in lines if not row["passed"]]
    model = lines[0]["model"]
    if failed:
        return f"{model}   FAIL   {'; '.join(failed)}: accuracies under attack do not measure robustness"
    last = ", ".join(f"{row['data']} {100 * row['accuracies'][-1]:.1f} %" for row in lines)
    return f"{model}   pass   at {255 * lines[0]['epsilons'][-1]:.3g}/255: {last}   (n = {lines[0]['n']} episodes)"


def tables(folder: Path) -> list[tuple[Table, str]]:
    """Return a table with a row for each model and set; [] for a run without the check."""
    needed = ("model", "data", "protocol", "epsilons", "accuracies", "chance", "n", "verdict")
    lines = read_lines(folder / LINES, needed, whole=True)
    if not lines:
        return []
    models = list(dict.fromkeys(row["model"] for row in lines))
    try:
        radii = [float(radius) for radius in lines[0]["epsilons"]]
        rows = [_row(row) for row in sorted(lines, key=lambda row: models.index(row["model"]))]
    except (TypeError, ValueError) as error:
        raise UserError(f"report: '{folder / LINES}' is not what an evaluation writes ({error}); delete it.") from error
    columns = [f"{255 * radius:.3g}/255" if radius else "clean" for radius in radii]
    heads = ["Model", "Data", *columns, "chance", "n (episodes)", "Verdict"]
    if any(len(row) != len(heads) for row in rows):
        raise UserError(
            f"report: '{folder / LINES}' has checks at other radii than the first; delete it and evaluate again."
        )
    return [(Table("By radius, accuracy in %", heads, rows, set()), NOTE)]


def _row(line: dict[str, Any]) -> list[str]:
    accuracies = [f"{100 * value:.1f}" for value in line["accuracies"]]
    where = f"{line['data']}, {line['protocol']}"
    return [str(line["model"]), where, *accuracies, f"{100 * line['chance']:.1f}", str(line["n"]), str(line["verdict"])]
