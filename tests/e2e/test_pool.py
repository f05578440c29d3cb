"""A pool of AMT experts, MAML and the choice of merging settings through the command line, on a tiny ViT and digits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.own_images import write_folder
from helpers.results import scores_of
from helpers.tiny_runs import SHORT, refused, run_config, written

import vismt
from scripts.expert_choice import GAIN, add_gains
from scripts.merge_settings import SearchGrid, choose
from vismt.backbones.timm_models import create
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.images import open_images
from vismt.jobs import open_run
from vismt.jobs.fewshot.models import find_experts
from vismt.storage.files import sealed
from vismt.storage.lines import read_lines

TRAINING = "lr-0.01-seed-0"
POOL = {
    "model": {**SHORT, "block": 0},
    "adapt": {"method": "amt", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False},
    "train": {"steps": 3, "lr": 1e-2, "checkpoint_every": 2},
    "pool": {"levels": [0.5, 4], "clean": True, "warmup": 2, "gamma": 1e-2},
    "evaluate": {
        "data": ["digits"],
        "ways": 3,
        "shots": [1],
        "queries": 2,
        "episodes": 3,
        "models": ["frozen", "clean", "merged", "average", "logits", "min_ce", "expert:4", "merged+finetune"],
    },
    "finetune": {"steps": 2},
}


def write(folder: Path, name: str = "pool", **changes: object) -> Path:
    return written(folder / f"{name}.yaml", {**POOL, **changes})


def section(name: str, **changes: object) -> dict:
    return {**POOL[name], **changes}


@pytest.fixture(scope="module")
def pool_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    return run_config(write(folder))


def test_a_pool_run_trains_every_expert_and_evaluates_every_model(pool_run: Path) -> None:
    assert {path.name for path in (pool_run / "arms").iterdir() if path.is_dir()} == {"clean", "0.5", "4"}
    index = json.loads((pool_run / "pool" / "seed-0" / "pool.json").read_text())
    assert [expert["label"] for expert in index["experts"]] == ["0.5", "4"]
    rows = scores_of(pool_run)
    assert [row["arm"] for row in rows] == POOL["evaluate"]["models"] and all(row["n"] == 3 for row in rows)
    logged = read_lines(pool_run / "arms" / "4" / TRAINING / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2, 3] and {"loss", "accuracy", "robust", "kl"} <= set(logged[0])
    assert "kl" not in read_lines(pool_run / "arms" / "clean" / TRAINING / "metrics.jsonl")[0]
    text = (pool_run / "report.md").read_text().replace("\\", "")
    assert all(model in text for model in POOL["evaluate"]["models"])


def test_experts_differ_and_the_same_command_trains_nothing_again(pool_run: Path, capsys) -> None:
    first, second = (
        safetensors.torch.load_file(next((pool_run / "pool" / "seed-0" / f"expert-{i}").glob("*.safetensors")))
        for i in (0, 1)
    )
    name = next(key for key in first if key.endswith("lora_A"))
    assert torch.equal(first[f"{name}0"], second[f"{name}0"]) and not torch.equal(first[name], second[name])
    assert main(["run", str(write(pool_run.parent.parent)), "--out", str(pool_run.parent)]) == 0
    assert "done before" in capsys.readouterr().out


def test_one_expert_or_the_average_can_be_merged_and_exported(pool_run: Path, tmp_path: Path, capsys) -> None:
    assert "name one expert (clean, 0.5, 4), or average" in refused(capsys, "merge", pool_run)
    assert "no single adapter '5'" in refused(capsys, "merge", pool_run, "--arm", "5")
    assert "'average' has no seed '7'; take one of 0." in refused(capsys, "merge", pool_run, "--arm", "average:7")
    assert main(["merge", str(pool_run), "--arm", "expert:4", "--quiet"]) == 0  # as the report names it, no seed 4
    states = {}
    for expert in ("0.5", "4", "average"):
        assert main(["export", str(pool_run), "--arm", expert, "--to", str(tmp_path / expert), "--quiet"]) == 0
        states[expert] = safetensors.torch.load_file(tmp_path / expert / "model.safetensors")
    job = open_run(pool_run).job
    for model in ("clean", "expert:4"):  # clean meta-tuning has a scale of its own
        evaluated = job.models(0).task(model)
        scale = evaluated.scale if model == "clean" else evaluated.pool.scale
        assert job.about(model)["features"]["scale"] == float(scale)
    assert job.about("clean") != job.about("average")
    key = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(states["average"][key], (states["0.5"][key] + states["4"][key]) / 2)
    for expert, name in (("4", "peft"), ("average", "mixed")):
        where = ["--arm", expert, "--to", str(tmp_path / name)]
        assert main(["export", str(pool_run), "--format", "peft", *where, "--quiet"]) == 0
    assert (tmp_path / "peft" / "adapter_config.json").exists()
    model = vismt.merge(vismt.import_peft(create("short_vit", 32, False).vit, tmp_path / "mixed"))
    assert all(torch.allclose(value, states["average"][name], atol=1e-6) for name, value in model.state_dict().items())


def test_experts_of_separate_runs_make_the_same_pool(pool_run: Path, tmp_path: Path, capsys) -> None:
    """Experts of separate runs, assembled into a pool, give the numbers of the run that trained them together."""
    runs = tmp_path / "runs"
    for level in (0.5, 4):
        path = write(tmp_path, f"only{level}", pool=section("pool", levels=[level], clean=False))
        assert main(["train", str(path), "--out", str(runs), "evaluate.models=[frozen]", "--quiet"]) == 0
    parts = [str(path) for path in sorted(runs.iterdir())]
    assert main(["pool", "assemble", *parts, "--to", str(tmp_path / "both")]) == 0
    assert "0.5, 4" in capsys.readouterr().out
    evaluated = section("evaluate", models=["merged", "expert:4"])
    path = write(tmp_path, "joined", pool={"folder": str(tmp_path / "both")}, train=None, evaluate=evaluated)
    joined = scores_of(run_config(path))
    before = {row["arm"]: row["value"] for row in scores_of(pool_run)}
    assert [row["value"] for row in joined] == [before["merged"], before["expert:4"]]
    assert "holds no trained expert" in refused(capsys, "pool", "assemble", tmp_path, "--to", tmp_path / "none")
    (tmp_path / "mine" / "expert-0").mkdir(parents=True)
    error = refused(capsys, "pool", "assemble", *parts, "--to", tmp_path / "mine")
    assert "mine/expert-0' exists and would be overwritten" in error


def test_arms_beside_a_pool_are_trained_and_evaluated_and_are_no_experts(tmp_path: Path) -> None:
    arms = {"plain": {"pool": None}, "long": {"pool.levels": [4], "train.steps": 4}}
    models = ["merged", "expert:4", "plain", "long", "long+ridge"]
    pool, evaluated = section("pool", clean=False), section("evaluate", models=models)
    run = run_config(write(tmp_path, arms=arms, pool=pool, evaluate=evaluated))
    steps = {
        path.name: read_lines(path / TRAINING / "metrics.jsonl") for path in (run / "arms").iterdir() if path.is_dir()
    }
    assert {name: len(lines) for name, lines in steps.items()} == {"0.5": 3, "4": 3, "plain": 3, "long": 4}
    assert "kl" in steps["long"][0] and "kl" not in steps["plain"][0]
    assert [expert.label for expert in find_experts(run)] == ["0.5", "4"]
    assert [row["arm"] for row in scores_of(run)] == models
    job = open_run(run).job
    assert list(job.models(0).pool().labels) == ["0.5", "4"]
    assert job.about("long")["features"]["scale"] == float(job.models(0).task("long").scale)


def test_settings_are_chosen_on_sets_that_are_not_tested(pool_run: Path, tmp_path: Path) -> None:
    select = {"data": ["photo_crops:test"], "episodes": 3, "shots": 1, "queries": 2}
    evaluated = section("evaluate", models=["merged", "merged:default", "merged+finetune"])
    pool = {"folder": str(pool_run / "pool" / "seed-0")}
    path = write(tmp_path, "select", pool=pool, train=None, select=select, evaluate=evaluated)
    assert main(["train", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    choose(run, SearchGrid(trim=[{"blocks.0.mlp.fc1": 0.5}], lr=[1e-4]))
    file = run / "pool" / "seed-0" / "selection.json"
    chosen = json.loads(file.read_text())["all"]
    stages = [candidate["stage"] for candidate in chosen["tried"]]
    assert stages.count("merging") == 12 and stages.count("trim") == 2 and stages.count("finetune") == 2
    assert all(sum(candidate[mark] for candidate in chosen["tried"]) == 3 for mark in ("chosen", "default"))
    others = {"beta": 12.0, "balance": 0.9, "trim": {"blocks.0.mlp.fc1": 0.5}}  # whatever was chosen
    saved = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    file.write_text(sealed({"all": {**saved["all"], "merging": others, "lr": 1e-4}}))
    merging, tuning = open_run(run).job.models(0).chosen_settings()
    assert (merging.beta, merging.balance, dict(merging.trim), tuning.lr) == (12.0, 0.9, others["trim"], 1e-4)
    assert main(["evaluate", str(run), "--quiet"]) == 0
    rows = {row["arm"]: row["value"] for row in read_lines(run / "results.jsonl") if row["seed"] is None}
    assert set(rows) == set(evaluated["models"])
    file.write_text(sealed({"all": {**saved["all"], ":pool": "others"}}))
    with pytest.raises(UserError, match="was chosen for other experts; delete it"):
        open_run(run).job.models(0).chosen_settings()


def test_a_collapsed_expert_is_said(tmp_path: Path, capsys) -> None:
    strong = section("pool", levels=[8], clean=False, weight=1e4, warmup=0)
    path = write(
        tmp_path,
        pool=strong,
        train={"steps": 200, "lr": 1.0, "optimizer": "sgd", "clip": None},
        evaluate=section("evaluate", models=["merged"]),
    )
    error = refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")
    assert "collapsed to one answer for every image" in error or "not finite" in error


def test_an_arm_on_class_labels_starts_at_the_means_of_its_classes(tmp_path: Path) -> None:
    source = section("source", labels="set", scale=20)
    evaluated = section("evaluate", models=["classes"])
    attack = {"levels": [0.5], "weight_attack": "none", "weight": 0}
    run = run_config(write(tmp_path, pool=None, source=source, arms={"classes": {"pool": attack}}, evaluate=evaluated))
    first = read_lines(run / "arms" / "classes" / TRAINING / "metrics.jsonl")[0]
    classes = len(open_images("photo_crops", "train").classes)
    assert 0 < first["loss"] < math.log(classes)  # what vectors without a start would have
    assert "photo\\_crops:train by class labels under linf 0.5/255" in (run / "report.md").read_text()


@pytest.mark.parametrize("algorithm", ["maml", "metasgd"])
def test_maml_runs_through_the_same_job(tmp_path: Path, algorithm: str) -> None:
    evaluated = section("evaluate", models=["frozen", "adapted"])
    meta = {"algorithm": algorithm, "inner_steps": 2}
    path = write(tmp_path, pool=None, adapt={"method": "lora", "rank": 2}, meta=meta, evaluate=evaluated)
    run = run_config(path)
    assert [row["arm"] for row in scores_of(run)] == ["frozen", "adapted"]
    tensors = safetensors.torch.load_file(run / "arms" / "adapted" / TRAINING / "classifier.safetensors")
    assert "head.weight" in tensors and any(name.startswith("rates.") for name in tensors) == (algorithm == "metasgd")


def test_an_inner_loop_can_be_one_arm_of_several(tmp_path: Path) -> None:
    arms = {"inner": {"meta": {"algorithm": "maml", "inner_steps": 1}}, "outer": {}}
    evaluated = section("evaluate", models=["adapted"])
    run = run_config(write(tmp_path, pool=None, adapt={"method": "lora", "rank": 2}, arms=arms, evaluate=evaluated))
    assert [row["arm"] for row in scores_of(run)] == ["inner", "outer"]
    job = open_run(run).job
    # The inner loop has its factors, which a merge would have taken away; the other arm is merged.
    assert any("lora_A" in name for name in job.models(0).task("inner").adapted)
    assert not any("lora_A" in name for name, _ in job.models(0).task("outer").named_parameters())
    assert "scale" in job.about("outer")["features"] and "scale" not in job.about("inner")["features"]


# ---- a pool over sources and threats

LABELS = [
    "photo_crops-train-linf8",
    "photo_crops-test-linf8",
    "photo_crops-train-l2-128",
    "photo_crops-train-corruption",
]
RULES = ["merged", "merged:paper", "merged:core_ties", "merged:average", "merged:tsv"]


@pytest.fixture(scope="module")
def sources_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    experts = [{"level": 8}, {"source": "photo_crops:test", "level": 8}, {"norm": "l2", "level": 128}]
    pool = {"experts": [*experts, {"norm": "corruption"}, {"norm": "clean"}], "select": "min_ce", "gamma": 1e-2}
    models = [
        "clean",
        *(f"expert:{label}" for label in [*LABELS, "clean"]),
        *RULES,
        "average",
        "merged:min_ce+finetune",
    ]
    path = write(
        folder,
        pool={**pool, "pyramid": [[None, 1.0]]},
        select={
            "data": [str(write_folder(folder / "colours"))],
            "episodes": 2,
            "shots": 2,
            "queries": 1,
        },
        evaluate=section("evaluate", models=models, attacks=[{"name": "pgd", "epsilon": "4.5/255", "steps": 1}]),
    )
    return run_config(path)


def test_experts_of_two_sources_and_four_threats_are_trained_and_compared(sources_run: Path) -> None:
    assert {path.name for path in (sources_run / "arms").iterdir() if path.is_dir()} == {*LABELS, "clean"}
    index = json.loads((sources_run / "pool" / "seed-0" / "pool.json").read_text())
    assert [expert["label"] for expert in index["experts"]] == [*LABELS, "clean"]
    # The same start and seed: sources and threats alone make the experts differ, all of them.
    folders = [sources_run / "pool" / "seed-0" / expert["folder"] for expert in index["experts"]]
    states = [safetensors.torch.load_file(next(folder.glob("*.safetensors"))) for folder in folders]
    name = next(key for key in states[0] if key.endswith("lora_A"))
    assert not any(torch.equal(states[i][name], states[j][name]) for i in range(5) for j in range(i))
    logged = [read_lines(sources_run / "arms" / label / TRAINING / "metrics.jsonl") for label in [*LABELS, "clean"]]
    assert all("kl" in rows[0] for rows in logged[:4]) and "kl" not in logged[4][0]
    assert logged[0][0]["loss"] != logged[1][0]["loss"]  # other episodes
    rows = {(row["arm"], row["condition"]): row["value"] for row in scores_of(sources_run)}
    conditions = {condition for _, condition in rows}
    assert len(conditions) == 2
    for condition in conditions:
        assert rows["average", condition] == rows["merged:average", condition]
    assert rows["clean", "clean"] == rows["expert:clean", "clean"]


def test_the_gain_of_a_choice_joins_the_results(sources_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sources_run, tmp_path / "run"))
    before = read_lines(run / "results.jsonl")
    for _ in range(2):  # the second time in the place of the first
        (rules, _), (worth, _) = add_gains(run)
        shown = {row[2] for row in rules.rows}
        assert {"best expert of the other tasks", "best expert of each task", *RULES} <= shown and worth.rows
        gains = [row for row in read_lines(run / "results.jsonl") if row["metric"] == GAIN]
        assert {(row["arm"], row["condition"]) for row in gains} == {
            ("merged", row["condition"]) for row in before
        } and len(read_lines(run / "results.jsonl")) == len(before) + len(gains)
    assert main(["report", str(run), "--quiet"]) == 0 and GAIN in (run / "report.md").read_text()


def test_a_clean_expert_of_the_pool_is_assembled_with_the_others(sources_run: Path, tmp_path: Path, capsys) -> None:
    assert main(["pool", "assemble", str(sources_run), "--to", str(tmp_path / "pool")]) == 0
    assert ", ".join(sorted([*LABELS, "clean"])) in capsys.readouterr().out


def test_an_unknown_source_is_named_before_any_training(tmp_path: Path, capsys) -> None:
    pool = {"experts": [{"level": 8}, {"source": "foto_crops", "level": 8}]}
    path = write(tmp_path, pool=pool, evaluate=section("evaluate", models=["merged"]))
    error = refused(capsys, "run", path, "--out", tmp_path / "runs", "--quiet")
    assert "foto_crops" in error and "photo_crops" in error
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))
