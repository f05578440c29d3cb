"""The report of the gradient-masking check (vismt/robustness/masking.py): accuracies of each model by the radius of an attack."""

from __future__ import annotations

from pathlib import Path

from vismt.base.errors import UserError
from vismt.report.comparison import arm_title
from vismt.report.tables import Section, Table
from vismt.robustness.attacks.attacks import radius_text
from vismt.storage.lines import read_lines

MASKING = "masking.jsonl"  # a file of the run folder
_TYPES = {
    "arm": str,
    "data": str,
    "norm": str,
    "epsilons": list[float],
    "accuracies": list[float],
    "chance": float,
    "n": int,
    "verdict": str,
}


def masking_section(folder: Path, model: str, unit: str, note: str) -> Section:
    """Return a table for each norm and list of radii, with a row for each model and set.

    model: Head of the column of models. unit: Name of the examples. note: Text below the tables.
    """
    tables: dict[str, Table] = {}  # by their radii, which in l2 and l1 depend on the size of the images
    for line in read_lines(folder / MASKING, _TYPES, {"protocol": str}, whole=True):
        radii = [radius_text(line["norm"], radius) if radius else "clean" for radius in line["epsilons"]]
        values = [f"{100 * value:.1f}" for value in (*line["accuracies"], line["chance"])]
        where = ", ".join(filter(None, (line["data"], line.get("protocol"))))
        row = [arm_title(line["arm"], ["clean"]), where, *values, str(line["n"]), line["verdict"]]
        heads = [model, "Data", *radii, "chance", f"n ({unit})", "Verdict"]
        if len(row) != len(heads):
            raise UserError(
                f"report: '{folder / MASKING}' has a check with other numbers of radii and accuracies; delete it and evaluate "
                "again."
            )
        empty = Table(f"By {line['norm']} radius, accuracy in %", heads, [], set())
        tables.setdefault(f"{line['norm']} {radii}", empty).rows.append(row)
    return Section("Gradient masking", [(table, note) for table in tables.values()])
