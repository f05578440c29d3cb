"""The section `evaluate` of a job follows from what the job provides, and a feature of others runs in several jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_runs import evaluated_configs, written

from scripts.drawings import GROUND
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.typed import build
from vismt.evaluation.certify import Certify
from vismt.evaluation.sections import asked_features
from vismt.jobs import job_config
from vismt.jobs.lm.config import LmEvaluateConfig
from vismt.jobs.reference import find_keys
from vismt.report.results import read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("job", ["fewshot", "multitask", "dense", "robustness"])
def test_a_job_that_provides_what_a_feature_needs_has_its_key(job: str) -> None:
    (key, *_) = find_keys(job, "evaluate.certify")
    assert key.default == "null" and key.meaning.startswith("certified accuracy by randomised smoothing")
    assert asked_features(job_config(job)().evaluate) == []
    evaluate = build(type(job_config(job)().evaluate), {"certify": {"sigma": 0.5}}, "a.yaml", "evaluate")
    (feature,) = asked_features(evaluate)
    assert isinstance(feature, Certify) and feature.section.sigma == 0.5


def test_a_job_without_it_refuses_the_key_with_the_reason() -> None:
    with pytest.raises(UserError) as error:
        build(LmEvaluateConfig, {"certify": {"sigma": 0.5}}, "a.yaml", "evaluate")
    assert str(error.value) == (
        "a.yaml: unknown key 'evaluate.certify'. Leave it out: the answers of this job do not come from pixels."
    )


@pytest.mark.slow
def test_a_feature_of_others_is_one_file(tmp_path: Path) -> None:
    walk = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a feature of evaluation")[2]
    (tmp_path / "own_margin.py").write_text(walk.partition("```python\n")[2].partition("```")[0])
    jobs, configs = ("fewshot", "multitask", "lm"), evaluated_configs(tmp_path)
    for job in jobs:
        configs[job]["evaluate"] |= {"margin": True}
        written(tmp_path / f"{job}.yaml", configs[job])
    code = "import own_margin, sys; from vismt.cli import main\n"
    code += "for job in sys.argv[1:]: assert main(['run', f'{job}.yaml', '--out', job, '--quiet']) == 0"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *jobs]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for job in jobs:
        (folder,) = (tmp_path / job).iterdir()
        rows = [row for row in read_results(folder / "results.jsonl") if row.metric == "margin"]
        assert rows and all(row.condition == "clean" and 0 < row.value < 1 and row.low < row.high for row in rows)
        assert "margin" in (folder / "report.md").read_text()


def test_the_picture_has_the_matrix_that_the_command_prints(capsys: pytest.CaptureFixture) -> None:
    """Features that a test registers are in no picture."""
    assert main(["list", "features"]) == 0
    heads, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    dots = re.findall(r">(\w+)</text>|<circle.*? fill=\"([^\"]+)\"", (ROOT / "docs" / "features.svg").read_text())
    names, full = [name for name, _ in dots if name], [fill != GROUND for _, fill in dots if fill]
    jobs, features = names[: len(heads) - 1], names[len(heads) - 1 :]
    assert jobs == heads[1:] and len(features) >= 5
    answers = {key: cells for key, *cells in rows if key in features and {*cells} <= {"yes", "no"}}
    assert [cell == "yes" for feature in features for cell in answers[feature]] == full
