"""`head: {name: vbll}` in the classification job: training, evaluation, attack, exports and user errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.tiny_runs import SHORT, run_config, written

from vismt.cli import main
from vismt.jobs import open_run
from vismt.report.results import read_results
from vismt.uncertainty.vbll import VBLLClassifier

CONFIG = {
    "task": "multitask",
    "model": SHORT,
    "adapt": {"method": "lora", "rank": 2},
    "head": {"name": "vbll", "options": {"start_noise": 0.2}},
    "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.05, "limit": 60}],
    "batch": 20,
    "augment": {"crop": 1.0, "flip": False},
    "label_smoothing": 0.0,
    "train": {"steps": 40, "lr": 1.0e-2, "rates": {"spread|log_noise": 3.0}, "checkpoint_every": 20},
    "evaluate": {"batch": 64, "temperature": True, "attacks": [{"name": "pgd", "epsilon": "4/255", "steps": 2}]},
}


def write(folder: Path, **changes: object) -> Path:
    return written(folder / "vbll.yaml", {**CONFIG, **changes})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vbll")
    return run_config(write(folder))


def test_the_head_is_trained_and_evaluated_by_its_predictive(run_folder: Path) -> None:
    job = open_run(run_folder).job
    training = job.study.trainings("adapted")[0]
    net = job.final(training)
    assert isinstance(net.head, VBLLClassifier)
    assert float(net.head.spread.log_std.detach().mean()) > -3.4  # log 0.03 = -3.51 at the start
    part = job.data.part(0, "test")
    images = part[torch.arange(8)]
    log_p = net(images)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(8), atol=1e-4)
    # An image has the same probabilities alone and in a batch, and they are less certain than those of the means.
    assert torch.allclose(net(images[3:4]), log_p[3:4], atol=1e-4)
    certain = net.head(net.features(images)).softmax(1).amax(1)
    assert float(log_p.exp().amax(1).mean()) < float(certain.mean())
    rows = {(row.condition, row.metric): row for row in read_results(run_folder / "results.jsonl")}
    assert rows["clean", "accuracy"].value > 0.15  # chance is 0.1
    assert rows["PGD-2 linf 4/255", "accuracy"].value <= rows["clean", "accuracy"].value
    assert {"ECE-15", "NLL in nats", "Brier"} <= {metric for condition, metric in rows if condition == "clean"}


def test_merged_weights_are_those_of_a_stock_model_with_the_means(run_folder: Path) -> None:
    assert main(["merge", str(run_folder)]) == 0
    model = timm.create_model("short_vit", img_size=32, num_classes=10)
    (folder,) = run_folder.glob("merged*")
    assert not (folder / "temperature.json").exists()  # what is fitted is for the probabilities of the Bayesian head
    state = safetensors.torch.load_file(folder / "model.safetensors")
    model.load_state_dict(state)
    net = open_run(run_folder).job.final(open_run(run_folder).job.study.trainings("adapted")[0])
    images = torch.rand(4, 3, 32, 32)
    normalised = net.backbone.normalise(images)
    assert torch.allclose(model.eval()(normalised), net.head(net.features(images)), atol=1e-4)


def test_a_section_with_a_linear_head_is_the_plain_head(tmp_path: Path) -> None:
    from vismt.jobs import load_config

    plain = load_config(write(tmp_path, head="separate"), [])
    section = load_config(write(tmp_path, head={"labels": "separate"}), [])
    assert plain.head_section == section.head_section


@pytest.mark.parametrize(("head", "condition"), [("union", "Laplace"), ({"name": "vbll"}, "Laplace")])
def test_laplace_around_the_head_is_a_variant_of_its_own(head, condition, tmp_path: Path) -> None:
    evaluate = {"batch": 64, "laplace": True}
    path = write(tmp_path, head=head, evaluate=evaluate, adapt=None, train={"steps": 20, "lr": 1.0e-2})
    folder = run_config(path)
    rows = {(row.condition, row.metric): row.value for row in read_results(folder / "results.jsonl")}
    for metric in ("accuracy", "ECE-15", "NLL in nats", "Brier"):
        assert (condition, metric) in rows
    assert rows[condition, "NLL in nats"] != rows["clean", "NLL in nats"]
    assert abs(rows[condition, "accuracy"] - rows["clean", "accuracy"]) < 0.1
