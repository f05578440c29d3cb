"""Damaged files of finished runs: the run is refused, or started again ends with the numbers that it had."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import pytest
import safetensors.torch
from helpers.blank import empty_figures
from helpers.damage import copied, damage_bytes, damage_json, damage_tensors
from helpers.faults import SOUND, cases, many, tried
from helpers.tiny_runs import CONFIGS, files, write_config
from hypothesis import given
from hypothesis import strategies as st

from vismt.cli import main
from vismt.storage.lines import read_lines

# What an evaluation writes. Without it the next one reads the adapters, heads and choices.
EVALUATED = ("results.jsonl", "records/*", "arms/*/*/records/*", "arms/*/*/merge.json", "episodes/*/*", "*/records/*")


def start(config: Path, out: Path) -> int:
    """Run without catching errors."""
    return main(["run", str(config), "--out", str(out), "--quiet", "--debug"])


@cache
def finished(job: str) -> tuple[Path, Path, Any]:
    """Return the configuration, the parent of the run folder and the numbers of a finished run."""
    root = Path(mkdtemp(prefix=f"vismt-{job}-"))
    config = write_config(job, root)
    assert start(config, root / "whole") == 0
    return config, root / "whole", numbers(root / "whole")


def numbers(out: Path) -> Any:
    """Return the results, the values by example and the tables of the report, among them the chosen rates."""
    folder = next(out.iterdir())
    values = {path.name: read_lines(path) for path in [folder / "results.jsonl", *folder.glob("records/*.jsonl")]}
    tables = [row for row in (folder / "report.md").read_text().splitlines() if re.match(r"\|.*\d", row)]
    return values, [row for row in tables if not row.startswith(("| Wall time", "| Run |"))]


def damage_rows(path: Path, random: Random) -> None:
    """Change, move, repeat or leave out lines of a line file, or a value in one."""
    lines = path.read_bytes().splitlines(keepends=True)
    place, other = random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.choice(["value", "value", "cut", "delete", "swap", "repeat"])
    if kind == "value":
        lines[place] = json.dumps(damage_json(json.loads(lines[place]), random)).encode() + b"\n"
    elif kind == "cut":
        del lines[place:]
    elif kind == "delete":
        del lines[place]
    elif kind == "swap":
        lines[place], lines[other] = lines[other], lines[place]
    else:
        lines.insert(place, lines[other])
    path.write_bytes(b"".join(lines))


def damage(folder: Path, random: Random) -> str:
    """Damage one file of a run; return its name."""
    path = random.choice(
        [path for path in files(folder) if not path.name.startswith("report.") and path.suffix != ".png"]
    )
    form = path.suffix if random.random() < 0.6 else ""
    if form == ".json":
        path.write_text(json.dumps(damage_json(json.loads(path.read_text()), random)))
    elif form == ".jsonl":
        damage_rows(path, random)
    elif form == ".safetensors":
        tensors = safetensors.torch.load_file(path)
        damage_tensors(tensors, random)
        path.write_bytes(safetensors.torch.save(tensors))
    else:
        damage_bytes(path, random)
    return path.relative_to(folder).as_posix()


def trial(place: Path, random: Random, jobs: Sequence[str] = tuple(CONFIGS)) -> tuple[str, str]:
    """Damage a copy of a run in `place`, start the run again; return the outcome and the file."""
    job = random.choice(jobs)
    config, whole, expected = finished(job)
    out = copied(whole, place)
    folder = next(out.iterdir())
    name = damage(folder, random)
    if random.random() < 0.5:
        for path in (path for pattern in EVALUATED for path in folder.glob(pattern)):
            if path.is_file():
                path.unlink()
        if random.random() < 0.5 and (folder / "run.json").is_file():
            (folder / "run.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        empty_figures(patch)
        return tried(lambda: start(config, out) == 0 and numbers(out) == expected), f"{job}: {name}"


@cases(quick=4, campaign=200)
def test_damaged_run_folders(tmp_path: Path, cases: int) -> None:
    jobs = ("lm", "pool") if cases < 100 else tuple(CONFIGS)

    @many(cases)
    @given(st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        outcome, name = trial(tmp_path / "run", random, jobs)
        assert outcome in SOUND, f"{outcome} {name}"

    check()
