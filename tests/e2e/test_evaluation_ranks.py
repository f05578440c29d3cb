"""Evaluation by two processes: every job writes the files of one process, and each process runs half of the batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.evaluation_ranks import evaluate
from helpers.ranks import of_two
from helpers.tiny_runs import evaluated_configs

from vismt.cli import main
from vismt.report.results import RECORDS, RESULTS


def files(folder: Path) -> dict[str, bytes]:
    """Return all files of a run by name but those with times."""
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one_and_each_runs_half(tmp_path: Path) -> None:
    counts = {}
    for name, config in evaluated_configs(tmp_path).items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        assert main(["train", str(path), "--out", str(tmp_path / name), "--quiet"]) == 0
        one, two = next((tmp_path / name).iterdir()), tmp_path / "two"
        shutil.copytree(one, two / name)
        counts[name] = evaluate(one)
        shutil.copytree(one, two / f"{name}-cut")
        cut_records(two / f"{name}-cut")
    of_two("evaluation_ranks.py", tmp_path)
    both = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(2)]
    for name, count in counts.items():
        one, two = next((tmp_path / name).iterdir()), tmp_path / "two"
        expected = files(one)
        assert RESULTS in expected and len(expected) > 3
        for copy in two.glob(f"{name}*"):
            found = files(copy)
            assert set(found) == set(expected)
            assert [path for path in expected if found[path] != expected[path]] == [], copy.name
        first, second = both[0][name], both[1][name]
        assert first + second == count and count / 3 <= second <= first


def cut_records(folder: Path) -> None:
    """Leave of an evaluation half of the lines of the records, and no other results."""
    for path in [folder / RESULTS, *folder.rglob("merge.json"), *(folder / RECORDS).glob("*.jsonl")]:
        path.unlink()
    for path in [*folder.glob("arms/*/*/records/*.jsonl"), *folder.glob("references/*/records/*.jsonl")]:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: len(lines) // 2]))
