"""`vismt report`: the results of a robustness run as RobustBench's model_info, and the page written again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from helpers.results import result
from helpers.tiny_runs import refused

from vismt import cli
from vismt.config.sections import config_hash
from vismt.jobs.robustness.config import ClassifierConfig, RobustnessConfig
from vismt.report.results import write_results
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import condition_of
from vismt.storage.files import sealed
from vismt.uncertainty.intervals import CLEAN


def condition(name="autoattack", epsilon=8 / 255, norm="linf", **options):
    return condition_of(AttackSpec(name, epsilon, norm=norm, **options))


@pytest.fixture
def run(tmp_path):
    """run(values, seed=0): a run folder with two arms and accuracies by (arm, condition), Brier scores beside clean ones."""
    arms = {"vit": {"classifier.name": "vit_tiny_patch16_224"}, "file": {"classifier.name": "model.pt"}}

    def write(values, seed=0) -> Path:
        config = RobustnessConfig(classifier=ClassifierConfig("unused"), arms=arms, data=["cifar10:test"], seed=seed)
        (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
        (tmp_path / "run.json").write_text(sealed({"config_hash": config_hash(config)}))
        rows = [
            result(
                "cifar10:test",
                arm,
                kind,
                number,
                task="robustness",
                unit="images",
                config_hash=config_hash(config),
                metric=metric,
            )
            for (arm, kind), value in values.items()
            for metric, number in (("accuracy", value), *((("Brier", 0.12),) if kind == CLEAN else ()))
        ]
        write_results(tmp_path, rows)
        return tmp_path

    return write


def test_an_autoattack_result_is_a_file_in_the_format_of_robustbench(run):
    folder = run(
        {
            ("vit", CLEAN): 0.93675,
            ("vit", condition()): 0.7371,
            ("vit", condition("pgd")): 0.8,
            ("file", CLEAN): 0.5,
            ("file", condition(epsilon=0.5, norm="l2")): 0.25,
        }
    )
    assert cli.main(["report", str(folder), "--format", "robustbench"]) == 0
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / "robustbench").rglob("*.json"))
    assert files == ["robustbench/cifar10/L2/file.json", "robustbench/cifar10/Linf/vit.json"]
    info = json.loads((folder / files[1]).read_text())
    known = {
        "dataset": "cifar10",
        "architecture": "vit_tiny_patch16_224",
        "eps": "8/255",
        "clean_acc": "93.67",
        "autoattack_acc": "73.71",
    }
    assert {key: value for key, value in info.items() if value is not None} == known
    unknown = {"link", "name", "authors", "additional_data", "number_forward_passes", "venue", "reported", "unreliable"}
    assert set(info) == unknown | set(known)
    other = json.loads((folder / files[0]).read_text())
    assert (other["eps"], other["architecture"], other["autoattack_acc"]) == ("0.5", None, "25.00")


def test_the_attack_has_the_seed_of_the_run(run):
    folder = run({("vit", CLEAN): 0.9, ("vit", condition(seed=1)): 0.5}, seed=1)
    assert cli.main(["report", str(folder), "--format", "robustbench"]) == 0


def test_several_radii_have_several_files(run):
    rows = {("vit", condition(epsilon=radius)): 0.5 for radius in (4 / 255, 8 / 255)}
    folder = run({("vit", CLEAN): 0.9, **rows})
    assert cli.main(["report", str(folder), "--format", "robustbench"]) == 0
    assert sorted(path.name for path in (folder / "robustbench").rglob("*.json")) == [
        "vit-4-255.json",
        "vit-8-255.json",
    ]


@pytest.mark.parametrize("other", [condition("apgd_ce"), condition(steps=20), condition(restarts=2)])
def test_a_run_without_the_standard_autoattack_is_an_error(run, other, capsys):
    folder = run({("vit", CLEAN): 0.9, ("vit", other): 0.5})
    error = refused(capsys, "report", folder, "--format", "robustbench")
    assert f"no result of AutoAttack at its standard lengths in linf or l2 (attacks: {other.label})" in error
    assert "vismt attack" in error and "--attack autoattack" in error


def test_the_page_is_written_again(run):
    folder = run({("vit", CLEAN): 0.9, ("vit", condition()): 0.5})
    assert cli.main(["report", str(folder)]) == 0
    assert "AutoAttack linf 8/255" in (folder / "report.html").read_text()


def test_another_job_has_no_such_format(tmp_path, capsys):
    (tmp_path / "config.resolved.yaml").write_text("task: fewshot\ntrain: null\nevaluate: {data: [digits]}\n")
    assert "need task robustness" in refused(capsys, "report", tmp_path, "--format", "robustbench")
