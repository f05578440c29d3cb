"""Every image job on a Swin, a ConvNeXt and a ResNet: trained, merged, exported for timm, attacked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers import pyramids  # noqa: F401  registers tiny_swin
from helpers.pages import ROOT
from helpers.results import scores_of
from helpers.tiny_runs import CONFIGS, run_config, written

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import ModelConfig
from vismt.evaluation.risk import Risk
from vismt.jobs import open_run
from vismt.jobs.multitask import models
from vismt.jobs.run import Run
from vismt.multitask.inference import predict
from vismt.report.results import read_results
from vismt.report.routers import ROUTERS

MOST = 1e-4  # difference of outputs, as a share of the largest


def config(job: str, name: str, **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in CONFIGS[job].items() if key not in ("fade", "select", "tune")}
    adapt = {"method": "lora", "rank": 2, "targets": "all-conv" if name == "test_resnet" else None}
    return {**kept, "model": {"name": name, "img_size": 32, "pretrained": False}, "adapt": adapt, **changes}


def check_export(run: Run, folder: Path) -> None:
    """Export the merged model; timm builds it from the folder, and it gives the features of the run's adapted one."""
    run.export("timm", folder, None)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapted = run.job.adapted().eval()
    with torch.no_grad():
        wanted = adapted(x)
        assert (model(x) - wanted).abs().max() <= MOST * wanted.abs().max()


@pytest.fixture(scope="module")
def multitask(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("multitask")
    tasks = CONFIGS["multitask"]["tasks"][:1]
    return open_run(run_config(written(folder / "run.yaml", config("multitask", "tiny_swin", tasks=tasks))))


@pytest.mark.slow
def test_a_classifier_is_merged_exported_and_attacked(multitask: Run, tmp_path: Path) -> None:
    merged = json.loads(next(multitask.folder.rglob("merge.json")).read_text())
    assert merged["n"] == 64 and merged["largest_difference"] <= MOST * merged["largest_logit"]
    check_export(multitask, tmp_path / "timm")
    arms = {"folder": {"classifier.name": str(tmp_path / "timm")}, "run": {"classifier.run": str(multitask.folder)}}
    attacked = {"images": 6, "attacks": [{"name": "pgd", "epsilon": 0.01, "steps": 1}]}
    robustness = {"task": "robustness", "arms": arms, "data": ["digits"], "evaluate": attacked}
    rows = scores_of(run_config(written(tmp_path / "robust.yaml", robustness)))
    value = {(row["arm"], row["condition"]): row["value"] for row in rows}
    assert len(value) == 4
    assert all(value["folder", condition] == value["run", condition] for _, condition in value)


def test_risk_and_certified_radii(tmp_path: Path) -> None:
    tasks = [{"name": "digits", "train": ["digits"], "test_share": 0.01, "validation_share": 0.03, "limit": 20}]
    evaluate = {"risk": True, "certify": {"sigma": 0.5, "samples": 20, "alpha": 0.05}}
    settings = config("multitask", "test_convnext", adapt=None, tasks=tasks, evaluate=evaluate)
    rows = read_results(run_config(written(tmp_path / "run.yaml", settings)) / "results.jsonl")
    assert {row.level for row in rows if (row.kind, row.metric) == ("certified", "accuracy")} == {0.0, 0.25, 0.5}
    assert {"abstentions", *Risk.summary.metrics} <= {row.metric for row in rows}


def test_few_shot(tmp_path: Path) -> None:
    run = open_run(run_config(written(tmp_path / "run.yaml", config("fewshot", "test_convnext"))))
    rows = scores_of(run.folder)
    assert {row["arm"] for row in rows} == {"frozen", "adapted"} and all(row["n"] == 3 for row in rows)
    check_export(run, tmp_path / "timm")


def test_dense(tmp_path: Path) -> None:
    model = {"name": "test_resnet", "pretrained": False}
    head = {"name": "segformer", "options": {"hidden": 8}}
    settings = config("dense", "test_resnet", model=model, size=[32, 64], head=head, tasks=["depth"])
    run = open_run(run_config(written(tmp_path / "run.yaml", settings)))
    merged = json.loads(next(run.folder.rglob("merge.json")).read_text())
    assert merged["n"] == 6 and merged["largest_difference"] <= MOST * merged["largest_logit"]
    net = run.job.merged_net(run.job.study.find(None))
    with torch.no_grad():
        logits = net(torch.rand(1, 3, 32, 64))["depth"]
    assert logits.shape[-2:] == (8, 16)  # the grid of the finest stage, of stride 4


@pytest.mark.slow
def test_a_whole_canvas_keeps_the_windows(tmp_path: Path) -> None:
    """A net that was trained on 64 x 64 pixels predicts 64 x 96 at once as one that was created for them."""
    model = {"name": "tiny_swin", "pretrained": False}
    settings = config("dense", "tiny_swin", model=model, size=[64, 64], tasks=["depth"], evaluate={"mode": "whole"})
    run = open_run(run_config(written(tmp_path / "run.yaml", {**settings, "canvas": [64, 96]})))
    training = run.job.study.find(None)
    net = run.job.loaded(training)
    large = models.loaded_maps(replace(run.config, size=[64, 96]), training, (64, 96))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(images)["depth"], large(images)["depth"], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_the_stages_do_not_depend_on_stays_frozen(tmp_path: Path) -> None:
    """Several processes wait for the gradient of every trained parameter: here a head and the final norm have none."""
    model = {"name": "tiny_swin", "pretrained": False}
    settings = config("dense", "tiny_swin", model=model, size=[64, 64], adapt={"method": "full"})
    run = open_run(run_config(written(tmp_path / "run.yaml", settings), "train.steps=1"))
    net = models.maps_net(run.config)
    run.job.prepare(net, run.config)
    frozen = {name for name, parameter in net.stock.named_parameters() if not parameter.requires_grad}
    assert frozen == {"norm.weight", "norm.bias"}


@pytest.mark.slow
def test_one_frozen_dinov3_serves_all_tasks_in_one_pass(tmp_path: Path) -> None:
    """The shipped configuration on a tiny random DINOv3: heads leave the backbone as it came, and each batch runs it once."""
    settings = yaml.safe_load((ROOT / "configs/dense/dinov3.yaml").read_text())
    settings |= {key: CONFIGS["dense"][key] for key in ("data", "size", "batch", "train", "augment")}
    settings |= {"model": {"name": "tiny_dinov3", "pretrained": False}, "tasks": ["depth", "normals"], "tune": None}
    pairs = {"adapt": {"method": "mtlora", "rank": 2, "options": {"task_rank": 1}}}
    settings |= {"arms": {"depth": {"trained_tasks": ["depth"]}, "heads": {"adapt": None}, "pairs": pairs}}
    settings |= {"baseline": None, "seeds": [0]}
    run = open_run(run_config(written(tmp_path / "run.yaml", settings)))
    assert {(row["arm"], row["task"]) for row in scores_of(run.folder)} == {
        ("depth", "depth"),
        ("heads", "depth"),
        ("heads", "normals"),
        ("pairs", "depth"),
        ("pairs", "normals"),
    }
    net = run.job.final(run.job.study.find("heads"))
    passes = []
    net.stock.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        assert set(net(torch.rand(2, 3, 32, 48))) == {"depth", "normals"}
    pairs = run.job.final(run.job.study.find("pairs"))
    graph, images = run.job.graph("pairs", "torch"), torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        answers = dict(zip(graph.outputs, graph.net(images), strict=True))
        for task, wanted in predict(pairs, run.job.data.tasks, images).items():
            assert torch.allclose(answers[task], wanted, atol=1e-5)
    untrained = models.maps_net(run.config).stock.state_dict()
    assert passes == [1] and all(torch.equal(value, untrained[name]) for name, value in net.stock.state_dict().items())


def test_routers_of_stages_have_no_common_map(tmp_path: Path) -> None:
    adapt = {"method": "emtal", "rank": 2, "options": {"n_experts": 2, "cluster": False}}
    tasks = CONFIGS["multitask"]["tasks"][:1]
    folder = run_config(written(tmp_path / "run.yaml", config("multitask", "tiny_swin", adapt=adapt, tasks=tasks)))
    assert scores_of(folder) and not (folder / ROUTERS).exists()


def test_a_model_without_maps_has_no_dense_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.SwinTransformer, "forward_intermediates")
    settings = SimpleNamespace(model=ModelConfig("tiny_swin", pretrained=False), seed=0)
    with pytest.raises(UserError, match="timm's tiny_swin gives no maps of its stages"):
        models.make_backbone(settings, (64, 64))


def test_one_line_for_each_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = [
        (
            config("multitask", "test_resnet", adapt={"method": "lora", "rank": 2, "targets": "all-linear"}),
            "ResNet has no linear layers outside of its head; give adapt.targets=all-conv",
        ),
        (
            config("fewshot", "tiny_swin", model={"name": "tiny_swin", "block": 1, "pretrained": False}),
            "for plain ViTs",
        ),
        (
            config(
                "dense",
                "tiny_hiera",
                model={"name": "tiny_hiera", "pretrained": False},
                size=[32, 32],
                canvas=[32, 64],
                evaluate={"mode": "whole"},
            ),
            "leave evaluate.mode at slide",
        ),
        (
            config(
                "dense",
                "tiny_swin",
                model={"name": "tiny_swin", "pretrained": False},
                size=[64, 64],
                adapt={"method": "mtlora", "options": {"task_blocks": ["layers.0.blocks.0", "layers.3.blocks.0"]}},
            ),
            "task_blocks: no head reads 'layers.0.blocks.0'; name blocks of layers.0.blocks.1",
        ),
        (config("multitask", "tiny_hiera", model={"name": "tiny_hiera", "img_size": 48}), "use 32 x 32 or 64 x 64"),
    ]
    for number, (settings, message) in enumerate(mistakes):
        assert main(["run", str(written(tmp_path / f"{number}.yaml", settings)), "--out", str(tmp_path / "runs")]) != 0
        assert message in capsys.readouterr().err
