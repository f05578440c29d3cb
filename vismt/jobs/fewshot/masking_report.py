"""The gradient-masking check of a few-shot run: its lines in masking.jsonl, on the console and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vismt.engine.log import read_lines
from vismt.errors import UserError
from vismt.robustness.evaluate import MaskingCheck

LINES = "masking.jsonl"
NOTE = (
    "PGD-10 at growing radii on the first episodes of each set. With honest gradients the accuracy does not rise with the "
    "radius and ends at or below chance at 64/255, both within the 95 % interval over the episodes. Where it fails, the "
    "accuracies under attack are no evidence of robustness."
)


def line(data: str, protocol: str, model: str, check: MaskingCheck, config_hash: str) -> dict[str, Any]:
    """What is kept of one check."""
    told = {**vars(check), "epsilons": list(check.epsilons), "accuracies": list(check.accuracies)}
    about = {"data": data, "protocol": protocol, "model": model, "config_hash": config_hash}
    return {**about, **told, "passed": check.passed, "verdict": check.verdict()}


def told(lines: Sequence[dict[str, Any]]) -> str:
    """One model's lines as one text for the console."""
    failed = [f"{one['data']} {one['verdict'].removeprefix('FAIL: ')}" for one in lines if not one["passed"]]
    model, last = lines[0]["model"], ", ".join(f"{one['data']} {100 * one['accuracies'][-1]:.1f} %" for one in lines)
    if failed:
        return f"{model}   FAIL   {'; '.join(failed)}: accuracies under attack are no evidence of robustness"
    return f"{model}   pass   at {255 * lines[0]['epsilons'][-1]:.3g}/255: {last}   (n = {lines[0]['n']} episodes)"


def read_masking(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of texts, one row a model and set; both empty for a run without the check."""
    needed = ("model", "data", "protocol", "epsilons", "accuracies", "chance", "n", "verdict")
    lines = read_lines(folder / LINES, needed)
    if not lines:
        return [], []
    try:
        radii = [float(radius) for radius in lines[0]["epsilons"]]
        rows = [
            [
                str(one["model"]),
                f"{one['data']}, {one['protocol']}",
                *(f"{100 * value:.1f}" for value in one["accuracies"]),
                f"{100 * one['chance']:.1f}",
                str(one["n"]),
                str(one["verdict"]),
            ]
            for one in sorted(lines, key=lambda one: [other["model"] for other in lines].index(one["model"]))
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"report: '{folder / LINES}' is not what an evaluation writes ({error}); delete it.") from error
    heads = ["clean" if not radius else f"{255 * radius:.3g}/255" for radius in radii]
    heads = ["Model", "Data", *heads, "chance", "n (episodes)", "Verdict"]
    if any(len(row) != len(heads) for row in rows):
        raise UserError(
            f"report: '{folder / LINES}' has checks at other radii than the first; delete it and evaluate again."
        )
    return heads, rows
