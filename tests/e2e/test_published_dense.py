"""The configurations of published dense benchmarks, rehearsed: whole runs on made copies in the layouts of the publishers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.dense_copies import write_copy

from vismt.cli import main
from vismt.data.check import check
from vismt.jobs import open_run
from vismt.report.results import read_results
from vismt.storage.lines import read_lines

SIZE = (64, 96)
SMALL = [
    "model={name: test_vit, pretrained: false}",
    "adapt.rank=2",
    "adapt.options={n_experts: 4, temperature: 5.0}",
    "data.validation_share=0.34",
    "size=[64, 96]",
    "batch=2",
    "seeds=[0]",
    "train.steps=3",
    "train.warmup=1",
    "train.precision=no",
    "train.workers=0",
    "train.log_every=1",
]


def run(config: str, folder: Path, *words: str) -> Path:
    assert main(["run", config, "--out", str(folder), "--quiet", *SMALL, *words]) == 0
    return next(folder.iterdir())


@pytest.mark.slow
def test_a_published_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm of the shipped file, with each block computed again in the backward pass."""
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    write_copy(tmp_path, "pascal_context", (12, 3), SIZE)
    assert check("pascal_context").ok and check("pascal_context").images == 15
    words = ["tune=null", "train.checkpointing=true", "evaluate.batch=2"]
    folder = run("dense/pascal_context", tmp_path / "runs", *words)
    job = open_run(folder).job
    tasks = [task["name"] for task in job.config.tasks]
    results = read_results(folder / "results.jsonl")
    rows = {
        (row.arm, row.task): row for row in results if row.seed is None and not row.further and row.arm != "constant"
    }
    several = {"full", "lora", "emtal", "emtal+qr"}
    alone = {f"single-{task}" for task in tasks}
    assert {arm for arm, _ in rows} == several | alone == set(job.study.arms) and len(tasks) == 5
    for arm in several:
        assert {task for name, task in rows if name == arm} == {*tasks, "delta_m"}
        assert rows[arm, "semseg"].n == 3 and rows[arm, "delta_m"].n == 3
    assert {(arm, arm.removeprefix("single-")) for arm in alone} <= rows.keys()
    assert rows["lora", "parts"].n == 2  # people are on two of three images
    for arm, retains in (("emtal", False), ("emtal+qr", True)):
        lines = read_lines(job.study.trainings(arm)[0].folder / "metrics.jsonl")
        assert ("retain" in lines[-1]) == retains and lines[-1]["fade"] == 1
    assert len(list(folder.glob("arms/*/*/merge.json"))) == len(job.study.arms)


@pytest.mark.slow
def test_less_memory_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At half of the published side."""
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    write_copy(tmp_path, "nyud_mt", (6, 2), (212, 280))
    arm = "arms={emtal+qr: {retain: {temperature: 2.0, mode: fifo2}}}"
    losses = []
    for name, words in (("plain", []), ("blocks", ["train.checkpointing=true"]), ("cheap", ["train.recompute=cheap"])):
        folder = tmp_path / name
        command = ["train", "dense/nyuv2", "--out", str(folder), "--quiet", *SMALL, arm, "tune=null", "baseline=null"]
        assert main([*command, "size=[224, 288]", "train.steps=2", *words]) == 0
        (log,) = folder.rglob("metrics.jsonl")
        losses.append([{k: line[k] for k in ("loss", "semseg", "depth", "retain")} for line in read_lines(log)])
    for other in losses[1:]:
        assert other == [pytest.approx(line, rel=1e-5) for line in losses[0]]


LIBMTL = [
    "data={train: [nyuv2:train], validation_share: 0.34, test: [nyuv2:val]}",
    "tasks=[{name: semseg, classes: 13, absent: skip}, {name: depth, convention: libmtl, measure: abs_err}, "
    "{name: normals, convention: libmtl}]",
    "arms={emtal: {}}",
    "baseline=null",
    "tune=null",
]


def test_the_arrays_of_libmtl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    write_copy(tmp_path, "nyuv2", (5, 2), SIZE)
    folder = run("dense/nyuv2", tmp_path / "runs", *LIBMTL)
    metrics = {row.task: row.metric for row in read_results(folder / "results.jsonl") if not row.further}
    assert metrics == {"semseg": "mIoU", "depth": "mean absolute error in m", "normals": "mean angle in degrees"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "tasks", "unit"),
    [
        ("cityscapes19", [{"name": "semseg", "classes": 19}, "depth"], ""),
        (
            "taskonomy",
            [{"name": "semseg", "classes": 17}, "depth", "normals", {"name": "edge", "thresholds": 3}],
            " in m",
        ),
    ],
)
def test_other_public_layouts(
    card: str, tasks: list, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    write_copy(tmp_path, card, (5, 2), SIZE)
    path = tmp_path / "layout.yaml"
    text = {"task": "dense", "data": {"train": [f"{card}:train"], "test": [f"{card}:val"]}, "tasks": tasks}
    path.write_text(yaml.safe_dump({**text, "adapt": {"method": "emtal"}, "fade": {}, "head": {"name": "linear"}}))
    folder = run(str(path), tmp_path / "runs")
    rows = {row.task: row for row in read_results(folder / "results.jsonl") if not row.further}
    assert {row.n for row in rows.values()} == {2} and rows["depth"].metric == f"RMSE{unit}"
    assert len(rows) == len(tasks)
