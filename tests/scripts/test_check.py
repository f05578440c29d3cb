"""`python -m scripts.check`: a re-run is inside, a tampered recipe is not, and another configuration is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.toy_job import job

import vismt.jobs
from scripts import claim_rules, study_rows
from scripts.check import _committed, _differing, _known_keys
from scripts.check import main as program
from scripts.study_rows import About, StudyRows, read_study, studies, study_of, write_study
from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import config_hash
from vismt.config.typed import build
from vismt.jobs import typed_config
from vismt.jobs.calibration import ImageCalibrationConfig
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.storage.lines import read_lines

CONFIG = {
    "task": "toy",
    "adapt": {"method": "lora", "rank": 2},
    "train": {"steps": 30, "lr": 0.03, "checkpoint_every": 30},
    "arms": {"relu": {}, "gelu": {"activation": "gelu"}},
    "seeds": [0, 1, 2, 3],
}
OTHERS = "seeds=[4, 5, 6, 7]"


def check(words: list[str]) -> int:
    """Run the program, whose output the commands before it may have switched off."""
    console.set_quiet(False)
    return program(words)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the toy's configuration, its rows for seeds 0 to 3 in rows/, and a run of others in others/."""
    folder = tmp_path_factory.mktemp("committed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(vismt.jobs.JOBS, "toy", "helpers.toy_job")
        (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
        write_study(folder / "rows" / "toy.jsonl", study_of(run(folder / "toy.yaml", folder)))
        run(folder / "toy.yaml", folder / "others", OTHERS)
    return folder


def run(config: Path, folder: Path, *overrides: str) -> Path:
    """Run a configuration in a folder; return the run folder."""
    assert main(["run", str(config), *overrides, "--out", str(folder / "runs"), "--quiet"]) == 0
    return next((folder / "runs").iterdir())


@pytest.fixture
def toy(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs the toy study with overrides; the rows are in tmp_path / "rows"."""
    monkeypatch.setitem(vismt.jobs.JOBS, "toy", "helpers.toy_job")
    shutil.copytree(committed / "rows", tmp_path / "rows")
    for module in (study_rows, claim_rules):
        monkeypatch.setattr(module, "shipped", lambda _: tmp_path / "rows")
    return lambda *overrides: run(committed / "toy.yaml", tmp_path, *overrides)


@pytest.fixture
def rerun(committed: Path, toy: Callable[..., Path]) -> Path:
    """Return the run with other seeds."""
    return next((committed / "others" / "runs").iterdir())


def test_rows_have_what_a_training_took(committed: Path) -> None:
    costs = read_study(committed / "rows" / "toy.jsonl").about.costs
    assert list(costs) == ["relu", "gelu"] and {cost["lr"] for cost in costs.values()} == {0.03}
    assert all(cost["trained"] > 0 for cost in costs.values())


def test_other_seeds_are_inside_whose_rows_are_found(rerun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check([str(rerun)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("check   all numbers: ") and "condition clean" in lines[0]
    assert lines[1].split()[-5:] == ["toy", "predicted", "this", "run", "verdict"]
    assert lines[-1].startswith("check   16 of 16 numbers inside; ") and "gelu − relu" in "".join(lines)
    assert check([str(rerun), "toy"]) == 0


def test_swapped_labels_in_the_training_are_outside(toy, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = job.pairs
    monkeypatch.setattr(job, "pairs", lambda seed, count: (pairs(seed, count)[0], 1 - pairs(seed, count)[1]))
    monkeypatch.setattr(job.ToyJob, "score", score_with(pairs))
    folder = toy(OTHERS)
    assert check([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "outside" in printed.splitlines()[2] and "of 16 numbers inside" in printed


def score_with(pairs: Callable) -> Callable:
    """Return the job's evaluation, with the right labels."""
    original = job.ToyJob.score

    def score(self, training, split, attacks):
        tampered, job.pairs = job.pairs, pairs
        try:
            return original(self, training, split, attacks)
        finally:
            job.pairs = tampered

    return score


def test_a_training_that_learns_nothing_is_outside(toy, monkeypatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert check([str(toy(OTHERS))]) == 1


def test_a_number_that_the_run_does_not_have_is_missing(
    toy, committed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows" / "toy.jsonl"
    study = read_study(path)
    other = study_rows.replace(study.rows[0], metric="ECE-15")
    write_study(path, study_rows.StudyRows(study.about, [*study.rows, other]))
    assert check([str(next((committed / "runs").iterdir()))]) == 1
    assert "missing" in capsys.readouterr().out.splitlines()[2]


def test_another_task_is_named_once(toy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'toy': task is fewshot, there toy\.$"):
        _committed(tmp_path, FewShotConfig(), None)


def test_what_is_no_committed_run_is_one_line(
    toy, committed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = toy("train.lr=0.01")
    unfinished = tmp_path / "unfinished"
    assert main(["train", str(committed / "toy.yaml"), "seeds=[0]", "--out", str(unfinished), "--quiet"]) == 0
    capsys.readouterr()
    nearest = "has no committed rows; the nearest are those of another one, 'toy': train.lr is 0.01, there 0.03."
    for words, text in (
        ([other], nearest),
        ([other, "toy"], "'toy' has the rows of another one, 'toy': train.lr is 0.01, there 0.03."),
        ([other, "tow"], "no such file. Near: 'toy'."),
        ([next(unfinished.iterdir())], "its evaluation has not ended"),
        ([tmp_path / "none"], "no such folder"),
    ):
        assert check([str(word) for word in words]) == 2
        assert text in capsys.readouterr().err
    (tmp_path / "rows" / "toy.jsonl").unlink()
    assert check([str(other)]) == 2
    assert "there are no committed rows" in capsys.readouterr().err


def test_keys_that_sections_no_longer_have_are_left_out() -> None:
    study = read_study(studies()["quickstart"])
    study.about.settings.update({"report": None, "calibration": {"memory_mb": 3}})
    config = typed_config(_known_keys(study.about.settings, FewShotConfig), "rows")
    assert config.calibration == ImageCalibrationConfig() and not _differing(config, study, Path("rows"))
    config.evaluate.seed += 1
    assert not _differing(config, study, Path("rows"))
    config.arms = {"b": {}}
    assert "arms.b is {}, there not set" in _differing(config, study, Path("rows"))
    config.arms = {"a": {"train.lr": 0.1}}
    config.evaluate.sampling = "with_replacement"
    assert sorted(_differing(config, study, Path("rows"))) == [
        "arms.a.train.lr is 0.1, there not set",
        "evaluate.sampling is 'with_replacement', there 'parts'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        # Two to three minutes each, in which tests/golden notices a number of a job that changed.
        *(pytest.param(f"{job}/quickstart", marks=pytest.mark.campaign) for job in ("dense", "lm", "multitask")),
    ],
)
def test_quick_starts_reproduce_their_committed_rows_and_verdicts(name: str, tmp_path: Path) -> None:
    assert main(["run", name, "--out", str(tmp_path), "--quiet"]) == 0
    assert check([str(next(tmp_path.iterdir()))]) == 0


@pytest.mark.parametrize("above,code,verdict", [(-1000, 0, "holds"), (1000, 1, "does not hold")])
def test_a_claim_that_the_run_contradicts_fails(
    rerun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], above: int, code: int, verdict: str
) -> None:
    row = read_study(tmp_path / "rows" / "toy.jsonl").rows[0]
    shown = {"study": "toy", "data": row.data, "metric": row.metric, "arm": "gelu", "minus": "relu", "above": above}
    stated = [{"claim": "A smooth activation is better.", "shown": [{**shown, "verdict": "holds"}]}]
    paper = {"toy": {"title": "Toy", "page": "toy.md", "source": "https://example.org", "claims": stated}}
    (tmp_path / "rows" / "claims.yaml").write_text(yaml.safe_dump(paper))
    assert check([str(rerun)]) == code
    printed = capsys.readouterr().out
    assert f"holds  {verdict}\n" in printed
    assert f"{1 - code} of 1 verdicts are not contradicted" in printed


STUDIES = [pytest.param(path, id=name) for name, path in study_rows.studies().items()]


@pytest.mark.parametrize("path", STUDIES)
def test_a_run_of_the_configuration_of_committed_rows_is_checked_against_them(path: Path) -> None:
    about, *_ = read_lines(path, whole=True)
    study = StudyRows(build(About, about, str(path)), [])  # of the rows themselves the pages are made, and checked
    name = study.about.command.split()[-1].removeprefix("configs/").removesuffix(".yaml")
    config = vismt.jobs.load_config(study_rows.shipped("configs") / f"{name}.yaml")
    assert _differing(config, study, path) == []
    recorded = study.about.config_hash
    assert config_hash(config) == recorded or len(recorded) == 8  # of a form that is made no more
