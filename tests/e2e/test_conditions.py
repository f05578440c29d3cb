"""Attacks, transfer and corruptions of the few-shot job, from configuration to report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.results import scores_of
from helpers.tiny_runs import refused, written

from vismt.cli import main
from vismt.robustness.attacks import attacks
from vismt.storage.lines import read_lines

BASE = {
    "model": {"name": "test_vit", "img_size": 32, "pretrained": False, "block": 3},
    "adapt": {"method": "lora", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False},
    "train": {"steps": 2, "lr": 1e-3},
}
EVERY = [
    {"name": "pgd"},
    {"name": "pgd", "norm": "l2", "epsilon": 0.5},
    {"name": "apgd_ce"},
    {"name": "apgd_t"},
    {"name": "fab"},
    {"name": "square", "steps": 5},
    {"name": "square", "steps": 5, "norm": "l2", "epsilon": 0.5},
    {"name": "autoattack"},
]
THREE_WAYS = [EVERY[at] for at in (1, 4, 6, 7)]  # what autoattack is made of there, and two in l2


def run(folder: Path, *overrides: str, **evaluate: object) -> Path:
    evaluate = {"data": ["digits"], "shots": [1], "queries": 1, **evaluate}
    path = written(folder / "small.yaml", {**BASE, "evaluate": evaluate})
    assert main(["run", str(path), "--out", str(folder / "runs"), *overrides]) == 0
    return next((folder / "runs").iterdir())


@pytest.mark.parametrize(
    ("ways", "text"), [(5, "AutoAttack-2 linf 4/255"), (3, "AutoAttack-2 (APGD-CE x5+FAB-T+Square) linf 4/255")]
)
def test_every_attack_by_name(tmp_path: Path, monkeypatch, ways: int, text: str) -> None:
    monkeypatch.setattr(attacks, "QUERIES", {"autoattack": 5})
    chosen = [{"epsilon": "4/255", "steps": 2, **attack} for attack in (EVERY if ways > 3 else THREE_WAYS)]
    folder = run(tmp_path, "--quiet", ways=ways, episodes=2, attacks=chosen, models=["frozen"])
    rows = scores_of(folder)
    conditions = [row["condition"] for row in rows]
    assert len(conditions) == len(chosen) + 3 and text in conditions
    assert {"FAB-T-2 linf 4/255", "Square-5 l2 0.5", "PGD-2 l2 0.5"} <= set(conditions)
    assert all(row["n"] == 2 and 0 <= row["value"] <= 1 for row in rows)


def test_a_targeted_attack_on_three_ways_says_what_to_take(tmp_path: Path, capsys) -> None:
    path = tmp_path / "small.yaml"
    evaluate = {
        "data": ["digits"],
        "shots": [1],
        "ways": 3,
        "queries": 1,
        "episodes": 2,
        "attacks": [{"name": "apgd_t"}],
    }
    path.write_text(yaml.safe_dump({**BASE, "evaluate": evaluate}))
    error = refused(capsys, "run", path, "--out", tmp_path / "runs", "--quiet")
    assert not list((tmp_path / "runs").glob("*/adapter"))  # refused before the training
    assert "needs 4 classes" in error and "take apgd_ce" in error


@pytest.mark.slow
def test_transfer_and_corruptions_reach_the_report(tmp_path: Path, capsys) -> None:
    pgd = {"name": "pgd", "epsilon": "8/255", "steps": 2}
    folder = run(
        tmp_path,
        data=["digits", "photo_crops:test"],
        ways=3,
        episodes=3,
        attacks=[pgd, {**pgd, "source": "frozen"}, {**pgd, "source": "adapted"}],
        corruptions=[{"name": "fog", "severities": [1, 5]}, {"name": "contrast"}],
    )
    out = capsys.readouterr().out
    rows = scores_of(folder)
    white, frozen, adapted = "PGD-2 linf 8/255", "PGD-2 linf 8/255 from frozen", "PGD-2 linf 8/255 from adapted"
    corrupted = [f"contrast {s}" for s in (1, 2, 3, 4, 5)] + ["fog 1", "fog 5"]
    assert {row["condition"] for row in rows} == {"clean", white, frozen, adapted, *corrupted}
    value = {(row["arm"], row["data"], row["condition"]): row["value"] for row in rows}
    for data in ("digits", "photo_crops-test"):
        # transfer from the model itself is white-box: the same images
        assert value["frozen", data, white] == value["frozen", data, frozen]
        assert value["adapted", data, white] == value["adapted", data, adapted]
    header = read_lines(folder / "episodes" / "seed-0" / "digits-3-way-1-shot-adapted.jsonl")[0]
    attacks = header["settings"]["attacks"]
    by_source = {spec["source"]: spec["source_fingerprint"] for spec in attacks if "source" in spec}
    assert len(set(by_source.values())) == 2 and by_source["adapted"] == header["weights"]
    text = (folder / "report.md").read_text()
    assert "corruptions, accuracy in %" in text and "mean of 7 corruptions" in out
    averages = {line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| average |")}
    assert {"clean", white, "mean of 7 corruptions", *corrupted} <= averages
    assert len(list((folder / "figures").glob("corruption-levels-average-*.svg"))) == 1
    # a second evaluation and a later attack leave the records unchanged
    kept = {path: path.read_text() for path in (folder / "episodes" / "seed-0").glob("*.jsonl")}
    assert main(["evaluate", str(folder), "--quiet"]) == 0
    assert main(["attack", str(folder), "--attack", "fgsm", "--quiet"]) == 0
    assert all(path.read_text() == content for path, content in kept.items())
