"""The study of `bench study` runs both ways and its results are compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from scripts.bench import study
from vismt.base.errors import UserError


@pytest.mark.slow
def test_workers_and_one_process_have_equal_results(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**study.TINY, "train": {"steps": 2}}))
    result = study.time_study(path, [], 1, tmp_path)
    assert float(re.search("scores equal to (.*)", str(result))[1]) < 1e-4 and "wall seconds" in str(result)
    assert set(result.timing.seconds) == {study.WORKERS, study.ONE}


@pytest.mark.slow
def test_a_failed_run_and_a_gpu_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("task: multitask\ntypo: 1\n")
    with pytest.raises(UserError, match=r"bench study: .* failed: error: .*typo"):
        study.time_study(path, [], 1, tmp_path)
    with pytest.raises(UserError, match="--device cuda"):
        study.run(1, "cuda")
