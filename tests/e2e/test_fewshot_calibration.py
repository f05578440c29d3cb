"""Temperature, out-of-distribution detection and the Laplace head of few-shot runs, on a tiny ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_runs import FEWSHOT, run_config, written

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import config_hash
from vismt.config.typed import build
from vismt.jobs import open_run
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.fewshot.config_checks import check
from vismt.metatune.protocol.protocol import clean_logits
from vismt.report.results import read_results
from vismt.storage.files import read_sealed
from vismt.storage.lines import read_lines

QUALITY = {"ECE-15", "NLL in nats", "Brier"}
TEMPERED, OUTSIDE = "temperature of validation", "against photo_crops:train"
EVALUATE = {**FEWSHOT["evaluate"], "models": ["frozen", "frozen+vbll"], "episodes": 4, "probabilities": True}
SELECT = {"data": ["photo_crops:test"], "episodes": 3, "shots": 1, "queries": 2}
CONFIG = {
    **FEWSHOT,
    "adapt": None,
    "train": None,
    "head": {"name": "laplace"},
    "select": SELECT,
    "evaluate": {**EVALUATE, "ood": ["photo_crops:train"]},
}


def temperatures(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((folder / "episodes" / "seed-0").glob("temperature-*.json"))
    return {path.stem: read_sealed(path, path.name) for path in paths}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_config(written(tmp_path_factory.mktemp("calibration") / "calibration.yaml", CONFIG))


def test_every_model_has_a_temperature_and_a_detection(folder: Path) -> None:
    rows = read_results(folder / "results.jsonl")
    by_condition = {(row.arm, row.condition, row.metric): row for row in rows}
    kinds = [("clean", "accuracy"), ("clean", "accuracy (interval over episodes)"), (OUTSIDE, "AUROC")]
    kinds += [(condition, metric) for condition in ("clean", TEMPERED) for metric in QUALITY]
    models = ("frozen+laplace", "frozen+vbll")
    assert set(by_condition) == {(model, *kind) for model in models for kind in kinds}
    for model in models:
        row = by_condition[model, OUTSIDE, "AUROC"]
        assert (row.chance, row.kind, row.unit, row.n) == (0.5, "variant", "episodes", 4)
        assert row.low <= row.value <= row.high
        assert by_condition[model, TEMPERED, "NLL in nats"].value != by_condition[model, "clean", "NLL in nats"].value
        assert by_condition[model, TEMPERED, "NLL in nats"].better == "lower"
    report = (folder / "report.md").read_text()
    assert TEMPERED in report and "AUROC" in report


def test_the_temperature_is_the_best_of_the_validation_episodes(folder: Path) -> None:
    found = temperatures(folder)
    assert list(found) == ["temperature-all-frozen-laplace", "temperature-all-frozen-vbll"]
    kept = found["temperature-all-frozen-laplace"]
    assert kept["n"] == 3 * 3 * 2
    job = open_run(folder).job
    models = job.models(0)
    sampler = models.data.validation_sampler("photo_crops:test")
    pairs = list(clean_logits(models.task("frozen+laplace"), job.data.open("photo_crops:test"), sampler, 3, "test"))
    logits, labels = (torch.cat(parts) for parts in zip(*pairs))
    nll = {
        factor: float(F.cross_entropy(logits.double() / (kept["temperature"] * factor), labels))
        for factor in (0.9, 1, 1.1)
    }
    assert nll[1] < min(nll[0.9], nll[1.1]) or kept["temperature"] > 999
    # The records are those of this temperature.
    header = read_lines(folder / "episodes" / "seed-0" / "digits-3-way-1-shot-frozen-laplace.jsonl")[0]["settings"]
    assert header["temperature"] == kept["temperature"] and header["outside"] == [OUTSIDE.removeprefix("against ")]


def test_an_interrupted_evaluation_is_continued_with_the_same_temperature(tmp_path: Path) -> None:
    folder = run_config(
        written(tmp_path / "calibration.yaml", {**CONFIG, "evaluate": {**CONFIG["evaluate"], "models": ["frozen"]}})
    )
    before, fitted = (folder / "results.jsonl").read_bytes(), temperatures(folder)
    (folder / "results.jsonl").unlink()
    (records,) = (folder / "episodes").rglob("*.jsonl")
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:3]))
    assert main(["evaluate", str(folder), "--quiet"]) == 0
    assert (folder / "results.jsonl").read_bytes() == before and temperatures(folder) == fitted


@pytest.mark.slow
def test_pools_have_temperatures(tmp_path: Path) -> None:
    pool = {
        **FEWSHOT,
        "adapt": {"method": "amt", "rank": 2},
        "pool": {"levels": [0.5, 4], "warmup": 1},
        "select": {"data": ["photo_crops:test"], "episodes": 2, "shots": 1, "queries": 2},
        "evaluate": {**EVALUATE, "models": ["merged", "merged+laplace", "expert:4+finetune", "logits"]},
        "finetune": {"steps": 1},
    }
    folder = run_config(written(tmp_path / "calibration.yaml", pool))
    rows = read_results(folder / "results.jsonl")
    arms = {row.arm for row in rows if (row.condition, row.metric) == (TEMPERED, "Brier")}
    assert arms == {*pool["evaluate"]["models"]}
    assert {name.split("-")[1] for name in temperatures(folder)} == {"all"} and len(temperatures(folder)) == 4


def test_an_attack_follows_the_laplace_head(tmp_path: Path) -> None:
    evaluate = {**FEWSHOT["evaluate"], "models": ["frozen"]}
    config = {**CONFIG, "select": None, "evaluate": evaluate}
    folder = run_config(written(tmp_path / "calibration.yaml", config))
    assert main(["attack", str(folder), "--attack", "pgd", "--epsilon", "16/255", "--quiet"]) == 0
    rows = {row.condition: row.value for row in read_results(folder / "results.jsonl") if row.metric == "accuracy"}
    (attacked,) = (value for condition, value in rows.items() if condition.startswith("PGD"))
    assert attacked < rows["clean"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"evaluate": {**EVALUATE, "ood": ["digits"]}},
            "evaluate.ood 'digits' shares examples with evaluate.data 'digits'",
        ),
        ({"evaluate": {**EVALUATE, "ood": ["a/x", "b/x"]}}, "both called 'x' in results"),
        ({"evaluate": {**EVALUATE, "probabilities": False}}, "set evaluate.probabilities, or leave it out"),
        ({"head": {"name": "laplase"}}, "'laplase' is not known. Near: 'laplace'"),
        ({"head": {"name": "laplace", "options": {"prior": 1.0}}}, "'laplace' has no options"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(build(FewShotConfig, {**CONFIG, **changes}, "calibration.yaml"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_keys_that_are_not_set_leave_the_hash_of_a_configuration() -> None:
    plain = {**CONFIG, "head": {"name": "prototypes"}, "evaluate": FEWSHOT["evaluate"]}
    same = {**plain, "evaluate": {**FEWSHOT["evaluate"], "ood": [], "probabilities": False}}
    other = {**plain, "evaluate": {**FEWSHOT["evaluate"], "ood": ["mnist"]}}
    hashes = [config_hash(build(FewShotConfig, config, "x")) for config in (plain, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
