"""docs/benchmarks.md is made from the files that `python -m scripts.bench --json` writes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from scripts.bench import fewshot
from scripts.bench.__main__ import main
from scripts.bench.timing import Ratios, Timing

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks.py"


def make(docs: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", "--docs", str(docs)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_a_table_for_each_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing({"vismt": [1.0, 2.0, 3.0], "plain loop": [4.0, 4.0, 4.0]})
    ratios = Ratios("600 episodes", timing, [("vismt", "plain loop", 0.6), ("plain loop", "vismt", 1.0)])
    monkeypatch.setattr(fewshot, "run", lambda rounds, device: [ratios])
    files = tmp_path / "benchmarks"
    files.mkdir()
    assert not main(["fewshot", "--rounds", "3", "--json", str(files / "fewshot.json")])
    content = json.loads((files / "fewshot.json").read_text())
    (files / "core.json").write_text(json.dumps({**content, "bench": "core", "hardware": "another machine"}))
    assert make(tmp_path, monkeypatch) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| 600 episodes | time: vismt / plain loop | 0.500 | 0.250 | 0.750 | at most 0.60 | yes |" in page
    assert "|  | time: plain loop / vismt | 2.000 | 1.333 | 4.000 | at most 1.00 | no |" in page
    assert page.index("## core") < page.index("another machine") < page.index("## fewshot")
    line = page.splitlines()[-1]
    for fact in (content["command"], content["date"], content["hardware"], f"torch {content['versions']['torch']}"):
        assert fact in line


@pytest.mark.parametrize("text", ["[]", "{", '{"bench": "core", "rounds": 9, "results": []}'])
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, text: str) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "core.json").write_text(text)
    assert make(tmp_path, monkeypatch) == 2
    error = capsys.readouterr().err
    assert (
        "core.json' is not what `python -m scripts.bench NAME --json FILE` writes" in error and error.count("\n") == 1
    )
    assert not (tmp_path / "benchmarks.md").exists()


def test_a_folder_without_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert make(tmp_path, monkeypatch) == 2
    assert "has no file; write one with `python -m scripts.bench core --json FILE`" in capsys.readouterr().err
