"""Runs of every job that are stopped anywhere and started again, and two runs of one folder at the same time."""

from __future__ import annotations

from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import pytest
from helpers.faults import SOUND, tried
from helpers.kills import killed, run, timed
from helpers.tiny_runs import CONFIGS, outcome, write_config

from vismt.storage.lines import read_lines


@cache
def undisturbed(job: str) -> tuple[Path, float, Any]:
    """Return the configuration of a job, the seconds of a run, and what it computes."""
    root = Path(mkdtemp(prefix=f"vismt-{job}-"))
    config = write_config(job, root)
    seconds = timed(config, root / "whole")
    return config, seconds, outcome(next((root / "whole").iterdir()))


def kill_trial(job: str, out: Path, random: Random) -> tuple[str, bool]:
    """Stop a run in `out` and start it again until it ends; return the outcome and whether it was stopped."""
    config, seconds, expected = undisturbed(job)
    was_killed = killed(config, out, random, seconds)
    return tried(lambda: run(config, out) == 0 and outcome(next(out.iterdir())) == expected), was_killed


def _exit(config: Path, out: Path) -> None:
    raise SystemExit(run(config, out))


def two_at_once(out: Path) -> str:
    """Start two runs of one pool in the same folder; return the outcome."""
    config, _, expected = undisturbed("pool")
    processes = [get_context("fork").Process(target=_exit, args=(config, out)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = sorted(process.exitcode if process.exitcode is not None else -1 for process in processes)
    if codes not in ([0, 0], [0, 2]):
        return "hang" if -1 in codes else "traceback"
    for log in out.glob("*/arms/*/*/metrics.jsonl"):
        if [row["step"] for row in read_lines(log)] != [1, 2, 3]:
            return "silent"
    return "harmless" if outcome(next(out.iterdir())) == expected else "silent"


@pytest.mark.campaign
@pytest.mark.parametrize("job", CONFIGS)
def test_killed_runs_go_on(tmp_path: Path, job: str) -> None:
    trials = [kill_trial(job, tmp_path / str(number), Random(number)) for number in range(4)]
    assert all(result in SOUND for result, _ in trials) and any(was_killed for _, was_killed in trials)


@pytest.mark.campaign
def test_two_runs_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    assert [two_at_once(tmp_path / str(number)) for number in range(2)] == ["harmless"] * 2
