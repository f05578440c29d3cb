"""`scripts.bench study`: two arms and two seeds by `--workers 2` against one process with two threads, by the wall clock.

Both are `vismt run` in processes of their own, start of Python, decoding and report included, into empty run folders; decoded
images come from the cache. The study is configs/multitask/emtal_small.yaml cut to 40 steps where VISMT_DATA has its sets, else
a tiny one on images that come with scikit-learn and scikit-image. Scores of both are compared: a thread more may round a
sum differently, which their largest difference shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from scripts.bench.timing import Ratios, interleave
from vismt.base.errors import UserError
from vismt.report.results import RESULTS, read_results
from vismt.storage.paths import data_roots, shipped

WORKERS, ONE = "--workers 2", "one process"
TARGET = 0.85
SETS = ("grocery", "flowers102", "dtd10", "gtsrb")
SMALL: dict[str, Any] = {
    "arms": {
        "lora": {"adapt.method": "lora", "adapt.options": {}, "fade": None, "retain": None},
        "emtal": {},
    },
    "seeds": [0, 1],
    "tune": None,
}
CUT = {"train.steps": 40, "train.warmup": 4}
TINY = {
    "task": "multitask",
    "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
    "adapt": {"method": "lora", "rank": 2},
    "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.1, "limit": 64}],
    "batch": 16,
    "arms": {"lora": {}, "wide": {"adapt.rank": 4}},
    "seeds": [0, 1],
    "train": {"steps": 8},
}


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time the study, in at most 3 rounds."""
    if device != "cpu":
        raise UserError(f"bench study: --device {device}; workers share the cores of a CPU here, leave it out.")
    root = next(iter(data_roots()), None)
    with tempfile.TemporaryDirectory() as folder:
        if root is not None and all((root / name).is_dir() for name in SETS):
            path = shipped("configs") / "multitask" / "emtal_small.yaml"
            changes = {**SMALL, **CUT}
        else:
            path, changes = Path(folder) / "tiny.yaml", {}
            path.write_text(yaml.safe_dump(TINY))
        overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
        return [time_study(path, overrides, min(rounds, 3), Path(folder))]


def time_study(config: Path, overrides: list[str], rounds: int, folder: Path) -> Ratios:
    """Time `vismt run` of a configuration both ways. folder: for run folders, empty."""
    scores: dict[str, dict[tuple[Any, ...], float]] = {}

    def study(name: str, *options: str) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = [sys.executable, "-m", "vismt.cli", "run", str(config), "--out", out, "--quiet", *options]
            environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
            ended = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise UserError(f"bench study: {' '.join(command[1:])} failed: {ended.stderr.strip()}")
            results = read_results(next(Path(out).glob(f"*/{RESULTS}")))
            scores[name] = {(*row.key, row.seed): row.value for row in results}

    calls = {WORKERS: lambda: study(WORKERS, "--workers", "2"), ONE: lambda: study(ONE)}
    timing = interleave(calls, rounds, label=f"{config.stem}, 2 arms x 2 seeds", wall=True)
    if scores[WORKERS].keys() != scores[ONE].keys() or not scores[ONE]:
        raise UserError("bench study: both ways did not write the same results.")
    apart = max(abs(value - scores[ONE][key]) for key, value in scores[WORKERS].items())
    title = f"{config.stem}, 2 arms x 2 seeds, scores equal to {apart:.1g}"
    return Ratios(title, timing, [(WORKERS, ONE, TARGET)], "wall seconds")
