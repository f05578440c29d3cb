"""The dense job from configuration to report: arms, seeds, delta_m, exact merge, resume, and every user error."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers.checkpoints import saved_tensors
from helpers.tiny_runs import interrupted, refused, run_config, run_on_two, write_config, written
from PIL import Image
from timm.layers import resample_abs_pos_embed

from vismt.cli import main
from vismt.data.maps.dense_transforms import resize
from vismt.jobs import load_config, open_run
from vismt.jobs.multitask import config as dense_config
from vismt.jobs.multitask import models
from vismt.jobs.multitask.job import MapsJob
from vismt.jobs.multitask.maps_predict import VALUES, most_pixels
from vismt.jobs.multitask.pooled_score import PooledScore, Scored
from vismt.methods import schedules
from vismt.multitask.emtal.ffn import MoEfiedMlp
from vismt.multitask.heads import resize_logits
from vismt.multitask.tasks.base import DARK
from vismt.report.panels import read_panel
from vismt.report.results import EXAMPLE, RECORDS, Result, read_results
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import estimate

TASKS = ["depth", "normals", {"name": "edge", "thresholds": 3, "max_dist": 0.03}]
ALONE = {"adapt": None, "fade": None}
SMALL = {
    "task": "dense",
    "model": {"name": "test_vit", "pretrained": False},
    "adapt": {"method": "emtal", "rank": 2, "options": {"n_experts": 4, "cluster": False}},
    "fade": {"start": 0.0, "end": 0.5},
    "data": {"train": ["motorcycle:train"], "test": ["motorcycle:test"]},
    "tasks": TASKS,
    "size": [32, 48],
    "head": {"name": "linear"},
    "augment": {"strength": 0},
    "batch": 3,
    "arms": {
        "emtal": {},
        "full": {"adapt.method": "full", "adapt.options": {}, "fade": None},
        "depth": {**ALONE, "trained_tasks": ["depth"]},
        "others": {**ALONE, "trained_tasks": ["normals", "edge"]},
    },
    "baseline": {"depth": "depth", "normals": "others", "edge": "others"},
    "seeds": [0, 1],
    "train": {"steps": 2, "lr": 3.0e-3, "checkpoint_every": 2},
}
SINGLE = {"arms": {}, "seeds": [], "baseline": None}


def write(folder: Path, **changes: object) -> Path:
    return written(folder / "rooms.yaml", {**SMALL, **changes})


def scores_of(folder: Path) -> list[Result]:
    """Return the scores of the trained arms of a run."""
    rows = read_results(folder / "results.jsonl", open_run(folder).hash)
    return [row for row in rows if not row.further and row.arm != "constant"]


def rows_of_arms(results: list[Result]) -> dict[tuple[str, str], Result]:
    """Return the means over the trainings by arm and task."""
    return {(row.arm, row.task): row for row in results if row.seed is None}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return run_config(write(folder))


def test_rows_of_every_arm_and_task(study: Path) -> None:
    results = scores_of(study)
    rows = rows_of_arms(results)
    metrics = {
        "depth": "RMSE in m",
        "normals": "mean angle in degrees",
        "edge": "odsF",
        "delta_m": "over depth+others in per cent",
    }
    assert set(rows) == {
        *((arm, task) for arm in ("emtal", "full") for task in metrics),
        ("depth", "depth"),
        ("others", "normals"),
        ("others", "edge"),
    }
    value = {(row.arm, row.task, row.seed): row.value for row in results}
    for (arm, task), row in rows.items():
        assert row.metric == metrics[task] and row.scale == ("share" if task == "edge" else "number")
        assert row.data == "motorcycle" and row.protocol == "test images at 32 x 48" and row.n == 6
        assert row.better == ("lower" if task in ("depth", "normals") else "higher")
        by_seed = [value[arm, task, seed] for seed in (0, 1)]
        assert {row.seed for row in results if (row.arm, row.task) == (arm, task)} == {None, 0, 1}
        if task != "delta_m":
            assert row.value == pytest.approx(sum(by_seed) / 2)
        records = read_lines(study / RECORDS / f"{row.stem}.jsonl")
        assert len({line[EXAMPLE] for line in records}) == 6
        assert row.value == pytest.approx(sum(line["clean"] for line in records) / 6)
        if task == "delta_m":
            over_images = estimate([line["clean"] for line in records])
            assert row.half == pytest.approx(over_images.with_seeds(by_seed).half) and row.half > over_images.half
            assert row.interval == "examples+seeds"
    for seed in (None, 0, 1):
        gains = [
            -(value["full", "depth", seed] / value["depth", "depth", seed] - 1),
            -(value["full", "normals", seed] / value["others", "normals", seed] - 1),
            value["full", "edge", seed] / value["others", "edge", seed] - 1,
        ]
        assert value["full", "delta_m", seed] == pytest.approx(100 * sum(gains) / 3)
    text = (study / "report.md").read_text()
    assert "depth RMSE in m ↓" in text and "(unpaired)" not in text


def test_panels_show_the_first_seed_on_images_evenly_over_the_set(study: Path) -> None:
    job = open_run(study).job
    panel, rows = read_panel(study / "dense_panels.npz"), job.data.part("test")
    numbers = [0, 2, 3, 5]
    assert panel["ids"].tolist() == [rows.ids[i] for i in numbers]
    arms, tasks = panel["arms"].tolist(), panel["tasks"].tolist()
    assert arms == ["emtal", "full", "depth", "others"] and tasks == ["depth", "normals", "edge"]
    assert panel["trained"].tolist() == [[True] * 3, [True] * 3, [True, False, False], [False, True, True]]
    assert panel["metrics"].tolist() == ["RMSE in m", "mean angle in degrees", "odsF"]
    assert panel["lower_is_better"].tolist() == [True, True, False]
    assert panel["shares"].tolist() == [False, False, True]
    samples = [rows.fitted(i, (32, 48)) for i in numbers]
    other_colors = 0
    for place, arm in enumerate(arms):
        training = job.study.find(f"{arm}:0")
        net = job.loaded(training)
        scored = job.pooled(training, "test")
        for number, sample in enumerate(samples):
            with torch.no_grad():
                logits = {name: resize_logits(value, (32, 48))[0] for name, value in net(sample["image"][None]).items()}
            for at, task in enumerate(job.evaluation.tasks.values()):
                assert np.array_equal(panel["truth"][at, number], task.picture(sample[task.key]).numpy())
                if task.name not in logits:
                    assert math.isnan(panel["scores"][place, at, number]) and task.name not in scored
                    assert (panel["predictions"][place, at, number] == DARK).all()
                    continue
                drawn = panel["predictions"][place, at, number].astype(int)
                difference = np.abs(drawn - task.picture(logits[task.name], sample[task.key]).numpy())
                assert difference.max() <= 2  # merged and batched, so the last digits of a logit differ
                if task.name == "depth":
                    other_colors += np.abs(drawn - task.picture(logits[task.name]).numpy()).max() > 2
                expected = scored[task.name].alone(rows.ids[numbers[number]])
                assert panel["scores"][place, at, number] == pytest.approx(expected, nan_ok=True)
    assert other_colors  # depth in the colours of its own range would have been another picture
    routers = read_panel(study / "routers" / "emtal.npz")
    assert [path.name for path in (study / "routers").iterdir()] == ["emtal.npz"]
    assert (
        routers["omega"].shape[1:] == (4, 4, 2, 3) and np.ptp(routers["omega"]) > 0
    )  # 16 px patches, before the merge


def test_panels_are_predicted_again_only_for_other_trainings(study: Path, tmp_path: Path, monkeypatch) -> None:
    job, predicted = open_run(study).job, []
    path, final = study / dense_config.PANELS, job.final
    monkeypatch.setattr(job, "final", lambda training: predicted.append(str(training)) or final(training))
    before = path.read_bytes()
    job.write_panels()
    assert path.read_bytes() == before and not predicted
    panel = dict(np.load(path))
    for damaged in (
        before[:500],
        {**panel, "trainings": panel["trainings"][::-1]},
        {**panel, "ids": panel["ids"][::-1]},
    ):
        path.write_bytes(damaged) if isinstance(damaged, bytes) else np.savez(path, **damaged)
        job.write_panels()
        assert predicted == [f"{arm}   lr 0.003   seed 0" for arm in ("emtal", "full", "depth", "others")]
        predicted.clear()
    again = read_panel(path)
    assert all(np.array_equal(again[name], panel[name], equal_nan=name == "scores") for name in panel)


@pytest.mark.slow
def test_the_report_of_a_folder_that_was_trained_before_panels(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / study.name
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("dense_panels.npz", "routers", "figures", "report.*"))
    assert main(["evaluate", str(folder), "--quiet"]) == 0
    text = (folder / "report.md").read_text()
    order = [
        "## Training",
        "## Results",
        "## Differences",
        "## Scores by set",
        "## Models by seed",
        "### By seed, 2 seeds",
        "## Every two models",
        "### Paired differences",
        "## Merging",
        "### Merged and unmerged",
        "## Images",
        "### Predictions",
        "### Routers of emtal",
        "## How to cite these numbers",
    ]
    assert [line for line in text.splitlines() if line in order] == order and "Episodes" not in text
    assert "| emtal | 2 | 12 | – |" in text  # maps of depth, normals and edges have no answer that could differ
    rows = rows_of_arms(read_results(folder / "results.jsonl"))
    value = {arm: row.value for (arm, task), row in rows.items() if task == "depth"}
    line = next(line for line in text.splitlines() if line.startswith("| full − emtal | "))
    cells = line.split(" | ")[1:]
    assert len(cells) == 4
    mean, low, high = map(float, re.findall(r"[+-]?[\d.]+", cells[0].replace("−", "-")))
    assert low < mean < high and abs(mean - (value["full"] - value["emtal"])) < 0.03 * (high - low) + 1e-9


@pytest.mark.slow
def test_a_baseline_of_zero_at_one_seed_leaves_a_report_without_delta_m(
    study: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    folder = tmp_path / study.name
    shutil.copytree(study, folder, ignore=shutil.ignore_patterns("report.*"))
    path, result = next((folder / "arms" / "others").glob("*seed-1/records/test.jsonl")), PooledScore.result

    def zero(pool: PooledScore) -> Scored:
        scored = result(pool)
        forged = pool.task.name == "edge" and pool.path == path
        return replace(scored, value=0.0, images=dict.fromkeys(scored.images, 0.0)) if forged else scored

    monkeypatch.setattr(PooledScore, "result", zero)
    assert main(["evaluate", str(folder)]) == 0
    assert "no delta_m: delta_m: the baseline of 'edge' is 0.0" in capsys.readouterr().out
    assert {row.task for row in read_results(folder / "results.jsonl")} == {"depth", "normals", "edge"}
    text = (folder / "report.md").read_text()
    assert "### By seed, 2 seeds" in text and "| others |" in text and not re.search(r"delta\\?_m", text)


def test_arms_of_a_seed_start_alike_and_see_the_same_crops(study: Path) -> None:
    job = open_run(study).job
    configs = [job.study.config_of(job.study.training(arm, 1e-3, 0)) for arm in ("emtal", "depth")]
    nets = [job.fresh(config) for config in configs]
    assert list(nets[1].heads) == ["depth"] and list(nets[0].heads) == ["depth", "normals", "edge"]
    assert torch.equal(nets[0].heads["depth"].predict.weight, nets[1].heads["depth"].predict.weight)
    assert not torch.equal(nets[0].heads["depth"].predict.weight, nets[0].heads["edge"].predict.weight)
    emtal, depth = (job.batches(config)(3) for config in configs)
    assert set(emtal) == {"image", "depth", "normals", "edge"} and set(depth) == {"image", "depth"}
    assert emtal["image"].shape == (3, 3, 32, 48) and torch.equal(emtal["image"], depth["image"])


def test_merged_is_the_stock_backbone_with_heads_beside(study: Path, capsys) -> None:
    for path in (study / "arms" / "emtal").glob("*/merge.json"):
        check = json.loads(path.read_text())
        assert check["n"] == 6 and check["largest_difference"] < 1e-5 * check["largest_logit"]
        assert set(check["outputs"]) == {"depth", "normals", "edge"}
    assert {path.parts[-3] for path in study.rglob("merge.json")} == {"emtal", "full"}
    assert main(["merge", str(study), "--arm", "emtal:1"]) == 0
    stock = timm.create_model("test_vit", img_size=(32, 48), num_classes=0).eval()
    stock.load_state_dict(safetensors.torch.load_file(study / "merged-emtal-seed-1" / "model.safetensors"))
    heads = safetensors.torch.load_file(study / "merged-emtal-seed-1" / "heads.safetensors")
    with safetensors.safe_open(study / "merged-emtal-seed-1" / "heads.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["heads"])
    assert metadata["head"] == "linear" and metadata["blocks"] == [1, 2, 4, 5]
    assert metadata["tasks"] == {"depth": 1, "normals": 3, "edge": 1}
    about = json.loads((study / "merged-emtal-seed-1" / "config.json").read_text())
    assert about["num_classes"] == 0 and about["img_size"] == [32, 48]
    job = open_run(study).job
    net = job.loaded(job.study.find("emtal:1"))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tap = stock.forward_intermediates(
            net.backbone.normalise(images), indices=[5], norm=True, intermediates_only=True
        )[0]
        depth = torch.nn.functional.conv2d(tap, heads["depth.predict.weight"], heads["depth.predict.bias"])
        assert torch.allclose(depth, net(images)["depth"], atol=1e-5)
    capsys.readouterr()
    for command, words in (
        (["merge", str(study)], "no validation score tells its arms apart; name one with --arm"),
        (
            ["export", str(study), "--format", "peft", "--arm", "full"],
            "'full' has no low-rank factors; merge the model",
        ),
        (
            ["export", str(study), "--format", "peft", "--arm", "depth"],
            "arm 'depth' has no adapter: it trains only the heads",
        ),
        (["attack", str(study), "--attack", "fgsm", "--epsilon", "8/255"], "dense runs have pgd"),
    ):
        assert words in refused(capsys, *command)


def test_exports_have_their_heads_beside_them(study: Path, tmp_path: Path) -> None:
    job = open_run(study).job
    net = job.loaded(job.study.find("emtal:1"))
    for form, name in (("timm", "model.safetensors"), ("peft", "adapter_model.safetensors")):
        command = ["export", str(study), "--format", form, "--arm", "emtal:1", "--to", str(tmp_path / form), "--quiet"]
        assert main(command) == 0
        assert (tmp_path / form / name).exists()
        heads = safetensors.torch.load_file(tmp_path / form / "heads.safetensors")
        assert torch.equal(heads["edge.predict.bias"], net.heads["edge"].predict.bias)


def test_the_merged_folder_of_a_dense_run_names_the_run(study: Path, tmp_path: Path, capsys) -> None:
    assert main(["merge", str(study), "--arm", "depth", "--quiet"]) == 0
    merged = study / "merged-depth-seed-0"
    for folder, run in ((merged, f"name '{study}'"), (tmp_path / "away", f"name the folder of the run '{study.name}'")):
        if folder != merged:
            shutil.copytree(merged, folder)
        for words in ([], ["--support", tmp_path]):
            error = refused(capsys, "predict", folder, tmp_path, *words)
            assert (
                "has the merged backbone of a run, and the heads of its tasks predict in the run" in error
                and run in error
            )


@pytest.mark.parametrize("head", ["linear", "conv", "dpt"])
def test_a_depth_head_starts_at_the_mean_depth_of_training(head: str, tmp_path: Path) -> None:
    """At 0 m a short training ends farther from the truth than a constant."""
    config = load_config(write_config("dense", tmp_path), [f"head.name={head}"])
    job = MapsJob(config, tmp_path / "run", "hash")
    net = job.fresh(config)
    job.prepare(net, config)
    task = job.data.tasks["depth"]
    depths = [images.read(i)["depth"] for images, i in job.data.part("train").entries]
    mean = float(torch.cat([depth[task.valid(depth)] for depth in depths]).mean())
    *_, bias = net.heads["depth"].predict.parameters()
    assert bias.tolist() == pytest.approx([mean], rel=1e-5)
    assert not any(parameter.tolist() == [mean] for parameter in net.heads["normals"].parameters())


def test_predict_draws_images_of_any_size(study: Path, tmp_path: Path, capsys, painted) -> None:
    from torchvision.io import ImageReadMode, decode_image, write_png

    generator = torch.Generator().manual_seed(0)
    for name, size in (("wide", (20, 90)), ("tall", (70, 40))):
        write_png(
            torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8), str(tmp_path / f"{name}.png")
        )
    paths = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    assert main(["predict", str(study), *paths, "--arm", "emtal:1", "--maps"]) == 0
    output = capsys.readouterr().out
    for name, fitted in (("wide", (11, 48)), ("tall", (32, 18))):  # into 32 x 48: times 48 / 90, and 32 / 70
        assert str(study / "predictions" / f"{name}.png") in output
        assert decode_image(str(study / "predictions" / f"{name}.png"), ImageReadMode.RGB).float().std() > 10
        with np.load(study / "predictions" / f"{name}.npz") as maps:
            assert {key: maps[key].shape for key in maps.files} == {
                "depth": fitted,
                "normals": (3, *fitted),
                "edge": fitted,
            }
            assert maps["edge"].min() >= 0 and maps["edge"].max() <= 1
            assert np.allclose(np.linalg.norm(maps["normals"], axis=0), 1, atol=1e-5)
    # The maps are the merged net's outputs for the fitted image.
    job = open_run(study).job
    net, picture = job.loaded(job.study.find("emtal:1")), decode_image(paths[1], ImageReadMode.RGB).float() / 255
    fitted = resize({"image": picture}, (32, 48))["image"]
    with torch.no_grad():
        depth = resize_logits(net(fitted[None])["depth"], (32, 48))[0, 0, :, :18]
    with np.load(study / "predictions" / "tall.npz") as maps:
        assert np.allclose(maps["depth"], depth.clamp_min(1e-9).numpy(), atol=1e-4)
    assert most_pixels(job.config) == VALUES // 5  # numbers a pixel: depth, normals and edges
    options = ["--arm", "depth", "--own-size", "--flip", "--maps", "--to", str(tmp_path / "own")]
    assert main(["predict", str(study), paths[1], *options]) == 0
    with np.load(tmp_path / "own" / "tall.npz") as maps:
        assert maps.files == ["depth"] and maps["depth"].shape == (70, 40)
    capsys.readouterr()
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (1, 300)).save(tmp_path / "thin.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "wide.jpg").write_bytes((tmp_path / "wide.png").read_bytes())
    for arguments, words in (
        ([paths[0]], "no validation score tells its arms apart; name one with --arm"),
        ([str(tmp_path / "none.png"), "--arm", "full"], "none.png: cannot be read"),
        ([str(tmp_path / "text.png"), "--arm", "full"], "text.png: cannot be decoded"),
        ([str(tmp_path / "thin.png"), "--arm", "full", "--own-size"], "1 x 300 pixels; one side may be 16 times"),
        ([str(tmp_path / "thin.png"), "--arm", "full"], "1 x 300 pixels; one side may be 16 times"),
        ([paths[0], str(tmp_path / "b" / "wide.jpg"), "--arm", "full"], "would both become wide.png"),
    ):
        assert words in refused(capsys, "predict", study, *arguments, "--to", tmp_path / "bad")
    assert {path.name for path in (tmp_path / "bad").iterdir()} == {"predictions.csv", "vismt.json"}


@pytest.mark.slow
def test_a_canvas_larger_than_the_trained_size(tmp_path: Path) -> None:
    """Crops of the size in training; windows or the whole canvas in evaluation, which have different protocols."""
    arms = {"emtal": {}}
    path = write(tmp_path, **{**SINGLE, "arms": arms}, canvas=[64, 80], tasks=["depth", "normals"])
    job = MapsJob(load_config(path, []), tmp_path, "hash")
    assert job.batches(job.config)(0)["image"].shape == (3, 3, 32, 48) and job.data.size == (64, 80)
    values_of: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    views = (
        ("slide", False, "[1.0]"),
        ("whole", False, "[1.0]"),
        ("whole", True, "[1.0]"),
        ("whole", False, "[0.5, 1.5]"),
    )
    for mode, flip, scales in views:
        words = [f"evaluate.mode={mode}", f"evaluate.flip={str(flip).lower()}", f"evaluate.scales={scales}"]
        assert main(["run", str(path), "--out", str(tmp_path / "runs"), "--quiet", *words]) == 0
        folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        for row in read_results(folder / "results.jsonl"):
            if row.arm in arms:  # and not the constant prediction
                values_of[row.arm].setdefault(row.protocol, row.value)
        assert [json.loads(merged.read_text())["n"] for merged in folder.rglob("merge.json")] == [6]
    for arm, values in values_of.items():
        assert list(values) == [
            "test images at 64 x 80, windows of 32 x 48 that share 0.5",
            "test images at 64 x 80",
            "test images at 64 x 80, mean with the mirrored image",
            "test images at 64 x 80, mean over scales 0.5, 1.5",
        ]
        assert len(set(values.values())) == 4
        heads = [path.read_bytes() for path in (tmp_path / "runs").glob(f"*/arms/{arm}/**/heads.safetensors")]
        assert len(heads) == 4 and len(set(heads)) == 1  # evaluation has no part in training


@pytest.mark.parametrize("also_train", [[], ["pos_embed"]])
def test_the_whole_canvas_has_the_table_that_was_trained(also_train: list[str], tmp_path: Path) -> None:
    """A frozen table is that of the pretrained weights at the size of the canvas; exports are of that size, too."""
    weights, adapt = tmp_path / "weights.pt", {"method": "lora", "rank": 2, "options": {"also_train": also_train}}
    pretrained = timm.create_model("test_vit", num_classes=0, img_size=160)
    torch.save(pretrained.state_dict(), weights)
    changes = {
        "model": {"name": "test_vit", "pretrained": str(weights)},
        "adapt": adapt,
        "fade": None,
        "canvas": [64, 80],
    }
    path = write(tmp_path, **{**SINGLE, **changes}, tasks=["depth"], evaluate={"mode": "whole"})
    assert main(["train", str(path), "--out", str(tmp_path / "runs"), "--quiet"]) == 0
    job = open_run(next((tmp_path / "runs").iterdir())).job
    (training,) = job.study.trainings("adapted")
    trained = models.loaded_maps(job.config, training, (32, 48)).stock.pos_embed
    stock = resample_abs_pos_embed(pretrained.pos_embed, [2, 3])
    assert torch.equal(trained, stock) != bool(also_train)
    table, grid = (trained, [2, 3]) if also_train else (pretrained.pos_embed, [10, 10])
    expected = resample_abs_pos_embed(table, [4, 5], grid)
    assert torch.equal(job.final(training).stock.pos_embed, expected)
    graph = job.graph(None, "torch")
    assert (
        graph.about["input"]["shape"][2:] == graph.outputs["depth"]["shape"][2:] == job.about()["img_size"] == [64, 80]
    )
    assert graph.net(torch.rand(1, 3, 64, 80))[0].shape == (1, 1, 64, 80)


@pytest.mark.slow
def test_every_adapter_trains_dense_tasks_and_merges(tmp_path: Path, capsys) -> None:
    """pissa and polar in factors, s2ft and lisa in the weights themselves; one study, merged as exactly as LoRA."""
    settings = {"pissa": {}, "polar": {}, "s2ft": {"ratio": 0.25}, "lisa": {"active": 1, "interval": 1}}
    arms = {
        name: {"adapt": {"method": name, **({} if options else {"rank": 2}), "options": options}, "fade": None}
        for name, options in settings.items()
    }
    path = write(tmp_path, **{**SINGLE, "arms": arms}, tasks=["depth", "normals"], train={**SMALL["train"], "steps": 3})
    folder = run_config(path)
    rows = [row for row in read_results(folder / "results.jsonl") if not row.further and row.arm != "constant"]
    assert {row.arm for row in rows} == set(settings) and len({row.value for row in rows}) == len(rows)
    for name in settings:
        check = json.loads(next((folder / "arms" / name).rglob("merge.json")).read_text())
        assert check["n"] == 6 and check["largest_difference"] <= 1e-5 * check["largest_logit"], name
        done = json.loads(next((folder / "arms" / name).rglob("done.json")).read_text())
        assert done["rank"] == (0 if name in ("s2ft", "lisa") else 2), name  # nothing of low rank there
        assert main(["merge", str(folder), "--arm", name, "--quiet"]) == 0
        stock = timm.create_model("test_vit", img_size=(32, 48), num_classes=0)
        stock.load_state_dict(safetensors.torch.load_file(next(folder.glob(f"merged-{name}-*")) / "model.safetensors"))
        fresh = open_run(folder).job.fresh(open_run(folder).config).stock.state_dict()
        assert any(not torch.equal(value, fresh[key]) for key, value in stock.state_dict().items()), name
    logged = read_lines(next((folder / "arms" / "polar").rglob("metrics.jsonl")))
    assert all(row["infeasibility"] >= 0 for row in logged)


def test_a_head_reads_features_of_its_task_from_training_to_report(tmp_path: Path, capsys) -> None:
    settings = {"adapt": {"method": "mtlora", "rank": 2}, "fade": None, "blocks": [2, 5], "tasks": ["depth", "normals"]}
    folder = run_config(write(tmp_path, **{**SINGLE, **settings}))
    run = open_run(folder)
    assert {row.task for row in read_results(folder / "results.jsonl")} == {"depth", "normals"}
    trained = run.job.loaded(run.job.study.find(None))
    layer = trained.stock.blocks[5].mlp.fc2
    assert layer.tasks == ("depth", "normals") and all(bool(B.any()) for B in layer.task_B)
    assert [hasattr(block.mlp.fc2, "task_B") for block in trained.stock.blocks] == [False, False, True] * 2
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    before = trained(images)
    layer.task_B[1].zero_()
    assert [task for task, logits in trained(images).items() if not torch.equal(logits, before[task])] == ["normals"]
    assert "has a pair for each task" in refused(capsys, "merge", folder, "--quiet")


def test_the_same_command_again_trains_and_evaluates_nothing(study: Path, monkeypatch) -> None:
    from vismt.engine import loop

    monkeypatch.setattr(loop, "train", None)
    monkeypatch.setattr(PooledScore, "columns", None)
    monkeypatch.setattr(MapsJob, "loaded", None)  # no net, as merge.json is there
    before = (study / "results.jsonl").read_text()
    assert main(["run", str(study.parent.parent / "rooms.yaml"), "--out", str(study.parent), "--quiet"]) == 0
    assert (study / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("adapter/adapter-*.safetensors", "adapter"),
        ("heads.safetensors", "was changed after the training"),
        ("done.json", "the training is not finished"),
    ],
)
def test_a_changed_training_is_refused_although_its_scores_are_on_record(
    study: Path, tmp_path: Path, capsys, pattern: str, words: str
) -> None:
    folder = shutil.copytree(study, tmp_path / study.name)
    path = next(folder.glob(f"arms/emtal/*/{pattern}"))
    content = bytearray(path.read_bytes())
    path.unlink()
    if path.suffix != ".json":
        content[-1] ^= 1
        path.write_bytes(content)
    assert words in refused(capsys, "evaluate", folder, "--quiet")


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch, capsys) -> None:
    path = write(tmp_path, **SINGLE, train={**SMALL["train"], "steps": 4}, balancing={"method": "dwa"}, tasks=TASKS[:2])
    assert main(["train", str(path), "--out", str(tmp_path / "whole"), "--quiet"]) == 0
    interrupted(monkeypatch, 2, "train", path, "--out", tmp_path / "cut")
    assert main(["train", str(path), "--out", str(tmp_path / "cut")]) == 0
    assert "at step 2 of 4" in capsys.readouterr().out
    heads = [next((tmp_path / name).rglob("heads.safetensors")) for name in ("whole", "cut")]
    whole, cut = (saved_tensors(path.parent) for path in heads)
    fades = [float(value) for name, value in whole.items() if name.endswith("mlp._extra_state")]
    assert "balancer.calls" in whole and fades and set(fades) == {1.0} and set(whole) == set(cut)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert heads[0].read_bytes() == heads[1].read_bytes()


def test_a_rate_is_chosen_on_validation_images(tmp_path: Path) -> None:
    """A rate of next to nothing leaves the normals at their random start, far from the truth."""
    data = {**SMALL["data"], "validation_share": 0.1}
    path = write(tmp_path, **{**SINGLE, **ALONE}, tasks=["normals"], data=data, tune={"rates": [1e-6, 3e-2]})
    folder = run_config(path)
    chosen = json.loads(next(folder.rglob("chosen.json")).read_text())
    assert chosen["lr"] == 3e-2 and set(chosen["validation"]) == {"1e-06", "0.03"}
    data = open_run(folder).job.data
    assert {part: len(rows) for part, rows in data.parts.items()} == {"train": 43, "validation": 5, "test": 6}
    assert not set(data.part("validation").ids) & set(data.parts["train"].ids)


def test_retaining_and_fading_come_from_the_configuration(tmp_path: Path) -> None:
    tasks = [{"name": "semseg", "classes": 4}, "depth"]
    config = load_config(write(tmp_path, **SINGLE, tasks=tasks, retain={"temperature": 3.0}), [])
    job = MapsJob(config, tmp_path, "hash")
    vars(job)["data"] = SimpleNamespace(counted=list, mean_depth=2.0)  # the set has no classes; the batch below has
    net = job.fresh(config).requires_grad_(False)
    assert job.prepare(net, config) == "emtal"
    job.heads(net).requires_grad_(True)
    objective = job.objective(config, net, [])
    assert objective.retain["semseg"].temperature == 3.0 and objective.retain["semseg"].bank.shape == (4, 2, 4)
    labels = torch.arange(4).repeat_interleave(12).expand(2, 32, 48)
    losses = objective({"image": torch.rand(2, 3, 32, 48), "semseg": labels})
    losses["loss"].backward()
    objective.step()
    routers = [wrapper for wrapper in net.modules() if isinstance(wrapper, MoEfiedMlp)]
    assert (
        bool(objective.retain["semseg"].bank.any()) and routers and all(wrapper.fade_value == 0 for wrapper in routers)
    )
    (fade,) = schedules(objective, torch.optim.SGD(net.parameters()), config.train.steps, config)
    fade.on_step(config.train.steps)
    assert float(fade.alpha) == 1 and all(wrapper.fade_value == 1 for wrapper in routers)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert all(net.get_parameter(name).grad is not None for name in trained)
    assert not any(name.endswith("norm.weight") for name in trained)


def test_full_training_reaches_every_parameter_that_is_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, **{**SINGLE, "adapt": {"method": "full"}, "fade": None}), [])
    job = MapsJob(config, tmp_path, "hash")
    net = job.fresh(config).requires_grad_(False)
    assert job.prepare(net, config) == "full"
    job.heads(net).requires_grad_(True)
    sum(value.sum() for value in net(torch.rand(1, 3, 32, 48)).values()).backward()
    lacking = [name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not lacking and net.stock.blocks[0].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"adapt.method": "lorra", "fade": None}, "adapt.method: 'lorra' is not known"),
        ({"adapt.options.n_experts": 7}, "n_experts 7 does not divide the 192 hidden units"),
        ({"adapt": {"method": "lora", "targets": ["qqkv"]}, "fade": None}, "qqkv"),
        ({"adapt": {"method": "lora", "options": {"dropuot": 0.1}}, "fade": None}, "dropuot"),
        ({"head": {"name": "conv", "options": {"norm": "bach"}}}, "norm 'bach'"),
        ({"blocks": [0, 1]}, "blocks: [0, 1]"),
    ],
)
def test_a_later_arm_is_built_before_the_first_one_is_trained(tmp_path: Path, capsys, later: dict, words: str) -> None:
    path = write(tmp_path, **{**SINGLE, "arms": {"first": {}, "later": later}})
    message = refused(capsys, "run", path, "--out", tmp_path / "runs", "--quiet")
    assert words in message and message.startswith("error: arms.later: ")
    assert not list((tmp_path / "runs").glob("*/arms"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"balancing": {"method": "fairgrad"}}, {"adapt": {"method": "mtlora", "rank": 2}, "fade": None}],
    ids=["sum", "fairgrad", "mtlora"],
)
def test_two_processes_train_one_model(tmp_path: Path, changes: dict) -> None:
    """torchrun on two CPU processes: one model, evaluated once."""
    path = write(tmp_path, **SINGLE, **changes)
    folder, printed = run_on_two(path)
    rows = [row for row in read_results(folder / "results.jsonl") if not row.further and row.arm != "constant"]
    assert len(rows) == 3 and printed.count("report  ") == 1
    checks = [json.loads(path.read_text()) for path in folder.rglob("merge.json")]
    assert len(checks) == ("adapt" not in changes)  # mtlora does not merge
    assert all(check["largest_difference"] < 1e-5 * check["largest_logit"] for check in checks)
