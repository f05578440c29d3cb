"""The check at growing radii: its line for a net and a set, and its tables in a report."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vismt.base.errors import UserError
from vismt.evaluation.masking import Masking
from vismt.report.score_sections import line_sections
from vismt.robustness.masking import MaskingCheck
from vismt.storage.lines import write_lines


def line(arm: str, end: float, norm: str = "linf", last: float = 0.1) -> dict:
    """Return the line of a model whose accuracy ends at `last`."""
    check = MaskingCheck((0.0, end), (0.6, last), 0.2, 10, monotone=True, reaches_chance=last <= 0.2, norm=norm)
    view = SimpleNamespace(unit="episodes", by_radius=lambda: check)
    return {"arm": arm, "data": "digits, 5-way 1-shot", **Masking.lines.line(view)}


def test_lines_of_equal_norm_and_radii_share_a_table(tmp_path: Path) -> None:
    ends = [("a", 13.9107, "l2"), ("b", 97.3742, "l2"), ("c", 13.9107, "l2"), ("d", 64 / 255, "linf")]
    lines = [line(*end) for end in ends]
    write_lines(tmp_path / "masking.jsonl", [*lines, line("frozen", 64 / 255, last=0.5)])
    (section,) = line_sections(tmp_path)
    tables = [table for table, _ in section.tables]
    assert [table.heads[2:4] for table in tables] == [
        ["clean", "l2 13.9107"],
        ["clean", "l2 97.3742"],
        ["clean", "64/255"],
    ]
    assert [[row[0] for row in table.rows] for table in tables] == [["a", "c"], ["b"], ["d", "frozen"]]
    assert tables[2].heads == ["Arm", "Data", "clean", "64/255", "chance", "n (episodes)", "Verdict"]
    failed = "FAIL: still 50.0 % at 64/255, chance is 20.0 %"
    assert tables[2].rows[1] == ["frozen", "digits, 5-way 1-shot", "60.0", "50.0", "20.0", "10", failed]
    assert [of.tables for of in line_sections(tmp_path / "none")] == [[]]


@pytest.mark.parametrize("change", [{"accuracies": ["a", "b"]}, {"epsilons": 3}])
def test_other_lines_are_refused(tmp_path: Path, change: dict) -> None:
    write_lines(tmp_path / "masking.jsonl", [{**line("a", 64 / 255), **change}])
    with pytest.raises(UserError, match="does not have the content that a run writes"):
        line_sections(tmp_path)
