"""A few-shot run trains on no set that chooses or tests, and says which before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.results import QUALITY, rows_of
from helpers.tiny_runs import FEWSHOT, refused, run_config, written

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.jobs import load_config, make_job, open_run, started
from vismt.metatune.protocol.episodes import DisjointSampler, EpisodeSampler, VariableSampler

CORDA = {"method": "corda", "rank": 2, "targets": ["qkv"]}
CASES = {
    "source": ({"source.data": ["digits"]}, "evaluate.data 'digits' shares examples with source.data 'digits'"),
    "path": ({"source.data": ["datasets/digits"]}, "shares examples with source.data 'datasets/digits'"),
    "arm": (
        {"arms": {"mine": {}, "other": {"source.data": ["photo_crops:train", "digits"]}}},
        "evaluate.data 'digits' shares examples with source.data of 'other' 'digits'",
    ),
    "calibration": (
        {"adapt": CORDA, "calibration": {"data": ["digits"]}},
        "evaluate.data 'digits' shares examples with calibration.data 'digits'",
    ),
    "choice": (
        {"tune": {"rates": [1e-3, 1e-2]}, "select": {"data": ["photo_crops"]}},
        "select.data 'photo_crops' shares examples with source.data 'photo_crops:train'",
    ),
    "ood": (
        {"evaluate.probabilities": True, "evaluate.ood": ["photo_crops:train"]},
        "evaluate.ood 'photo_crops:train' shares examples with source.data 'photo_crops:train'",
    ),
}


def write(folder: Path, changes: dict) -> Path:
    config = yaml.safe_load(yaml.safe_dump({**FEWSHOT, "select": None}))
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            config[section][name] = value
        else:
            config[key] = value
    return written(folder / "sets.yaml", config)


@pytest.mark.parametrize("case", CASES)
def test_a_set_that_is_tested_on_is_not_trained_on(case: str, tmp_path: Path, capsys, monkeypatch) -> None:
    changes, words = CASES[case]
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert words in refused(capsys, "run", write(tmp_path, changes), "--out", tmp_path / "runs", "--quiet")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"mine": {}, "other": {"source.queries": 200}}}, "1 shots + 200 queries take 201 images of a class"),
        (
            {"tune": {"rates": [1e-3, 1e-2]}, "select": {"data": ["photo_crops:test"], "shots": 90}},
            "90 shots + 5 queries take 95 images of a class",
        ),
    ],
)
def test_episodes_that_sets_cannot_give_are_named_before_the_first_step(
    changes: dict, words: str, tmp_path: Path, capsys
) -> None:
    assert main(["run", str(write(tmp_path, changes)), "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/arms/*"))


def test_a_run_that_trains_nothing_has_no_source_and_a_finished_one_is_opened(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": None, "source.data": ["digits"], "evaluate.models": ["frozen"]})
    with pytest.raises(UserError, match="none"), started(path, [], tmp_path / "new" / "runs"):
        raise UserError("none")
    assert not (tmp_path / "new").exists()  # nothing was done in it
    with started(path, [], tmp_path / "runs") as run:
        folder = run.folder
    resolved = folder / "config.resolved.yaml"
    config = yaml.safe_load(resolved.read_text())
    resolved.write_text(yaml.safe_dump({**config, "train": {"steps": 1}}))
    assert open_run(folder).job.trains


def test_the_sampling_of_the_configuration_draws_the_episodes(tmp_path: Path) -> None:
    def sampler_of(changes: dict) -> EpisodeSampler | VariableSampler:
        config = load_config(write(tmp_path, {"evaluate.episodes": 10, **changes}))
        return make_job(config, tmp_path / "run").data.samplers("digits")[0]

    found = {}
    for sampling in ("parts", "with_replacement", "without_replacement"):
        sampler = sampler_of({"evaluate.sampling": sampling})
        found[sampling] = type(sampler), sampler.parts
    assert found == {
        "parts": (EpisodeSampler, 5),
        "with_replacement": (EpisodeSampler, 0),
        "without_replacement": (DisjointSampler, 0),
    }
    variable = sampler_of(
        {"evaluate.rule": "variable", "evaluate.sampling": "with_replacement", "evaluate.max_ways": 7}
    )
    assert isinstance(variable, VariableSampler) and (variable.min_ways, variable.max_ways) == (5, 7)


def test_the_smallest_class_limits_episodes_without_replacement(tmp_path: Path) -> None:
    """The scores are of the episodes that ran, also the quality of probabilities."""
    evaluate = {**FEWSHOT["evaluate"], "data": ["photo_crops:test"], "sampling": "without_replacement", "episodes": 500}
    folder = run_config(write(tmp_path, {"train": None, "adapt": None, "source": {}, "evaluate": evaluate}))
    rows = rows_of(folder)
    assert {row["metric"] for row in rows} == {"accuracy", *QUALITY} and len({row["n"] for row in rows}) == 1
    assert rows[0]["n"] < 500
