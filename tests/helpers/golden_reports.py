"""Reports of runs that are kept as files and reviewed as differences of text.

`REWRITE_REPORTS=1 pytest -n 0 tests/golden tests/report tests/e2e/test_robustness.py` writes them again after a change of the
report. Machine, times and versions are left out. Texts are compared word by word, and numbers within one unit of the last digit,
because processors round differently.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "reports"
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.]*[a-z])")
ROUNDING = re.compile(r"\b\d\.\de-0[5-9]")  # of merging
# Rows of the provenance that differ by machine.
MACHINE = re.compile(r"^\| (Hardware|Run|Wall time|CPU time|Versions|Git revision|Config hash|Command)\b.*\n", re.M)


def report_text(run: Path) -> str:
    """Return the text of a run's report without machine, times, versions, paths and hashes."""
    text = (run / "report.md").read_text(encoding="utf8")
    for name, value in (("RUN", str(run)), ("HOME", str(run.parents[1])), ("|\n", "| \n")):
        text = text.replace(value, name)
    text = re.sub(r"\b(\w+)-[0-9a-f]{10}\b", r"\1-HASH", text)
    text = MACHINE.sub(lambda row: f"| {row[1]} | ... |\n", text)
    return ROUNDING.sub("...", re.sub(r"vismt config \w+, git revision [0-9a-f]+\+?", "vismt config ...", text))


def check_report(run: Path, name: str) -> None:
    """Raise AssertionError where a run's report is not the kept one."""
    text, path = report_text(run), FOLDER / f"{name}.md"
    if os.environ.get("REWRITE_REPORTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf8")
    lines, kept = text.splitlines(), path.read_text(encoding="utf8").splitlines()
    for number, (line, wanted) in enumerate(zip(lines, kept), 1):
        assert NUMBER.sub("#", line) == NUMBER.sub("#", wanted), f"{path.name} line {number}"
        for found, value in zip(NUMBER.findall(line), NUMBER.findall(wanted), strict=True):
            digits = len(value.partition(".")[2].partition("e")[0])
            unit = 10.0**-digits if "e" not in value else 10.0 ** (int(value.partition("e")[2]) - digits)
            assert abs(float(found) - float(value)) < 1.01 * unit, f"{path.name} line {number}: {line}"
    assert len(lines) == len(kept), f"{path.name} has {len(kept)} lines, the report {len(lines)}"
