"""The section of `report: risk`: coverage, size of the sets and selective risk, clean, under attacks and over the corruptions."""

from __future__ import annotations

from collections.abc import Sequence

from vismt.report.results import Result
from vismt.report.tables import Section, Table, interval_text, number_text

COVERED, SIZE, ACCEPTED, RISK, AURC = "coverage of sets", "classes in a set", "accepted", "selective risk", "AURC"
COLUMNS = (COVERED, SIZE, ACCEPTED, RISK, AURC)
NOTE = (
    "Coverage: share of sets that contain the label, 90 % where examples are exchangeable with the validation examples that "
    "set the threshold. Accepted: answers with a confidence that 80 % of the validation answers have; the selective risk is "
    "the error among them. AURC: error averaged over all thresholds of the confidence. Under an attack an answer is right, and "
    "a label covered, when it is so on the clean image, too. Of several corruptions the least and the largest value."
)


def risk_section(results: Sequence[Result]) -> Section:
    """Return a row for each set and arm, clean, under each attack and over all corruptions; empty without the measures."""
    groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for row in results:
        if row.metric in COLUMNS and row.seed is None:
            condition = "corruptions" if row.kind == "corruption" else row.condition
            groups.setdefault((row.data, row.arm, condition), {}).setdefault(row.metric, []).append(row)
    if not groups:
        return Section("Risk")
    rows = [
        [*key, *(_cell(by_metric.get(metric, [])) for metric in COLUMNS), f"{by_metric[COVERED][0].n:,}"]
        for key, by_metric in groups.items()
    ]
    heads = ["Data", "Arm", "Condition", *(f"{name}, %" if name != SIZE else name for name in COLUMNS), "n"]
    return Section("Risk", [(Table("Thresholds from clean validation examples", heads, rows, set(), texts=3), NOTE)])


def _cell(rows: Sequence[Result]) -> str:
    """Return the number of a row with its interval, or the range of several."""
    if not rows:
        return "–"
    if len(rows) == 1:
        return interval_text(rows[0].value, rows[0].half, rows[0].scale)
    ends = (min(rows, key=lambda row: row.value), max(rows, key=lambda row: row.value))
    return " to ".join(number_text(row.value, row.scale, half=row.half) for row in ends)
