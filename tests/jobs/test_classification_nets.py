"""Nets of multi-task runs: what is trained and saved of their heads, and on how many images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.engine.study import Training
from vismt.engine.training_files import finish, write_state
from vismt.jobs.multitask.classifier_job import ClassifierJob
from vismt.jobs.multitask.config import MultitaskConfig
from vismt.jobs.multitask.models import HEAD_FILE, classifier_net, with_linear_head


def config(name: str = "test_vit", **changes: Any) -> MultitaskConfig:
    values = {
        "task": "multitask",
        "model": {"name": name, "img_size": 32, "pretrained": False, **changes.pop("model", {})},
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [
            {"name": "digits", "train": ["digits"], "test_share": 0.1, "validation_share": 0.02, "limit": 30},
            {"name": "photos", "train": ["photo_crops:train"], "test_share": 0.1, "validation_share": 0.1, "limit": 36},
        ],
        "arms": {"digits": {"trained_tasks": ["digits"]}, "both": {}},
        "train": {"steps": 1, "lr": 1.0e-3},
        **changes,
    }
    return build(MultitaskConfig, values, "made")


def test_both_classifiers_of_a_distilled_vit_are_trained_and_saved(tmp_path: Path) -> None:
    distilled = config("deit_tiny_distilled_patch16_224", adapt=None)
    job, net = ClassifierJob(distilled, tmp_path, "hash"), classifier_net(distilled, 4, 9)
    parameters = list(job.heads(net).parameters())
    assert [tuple(p.shape) for p in parameters] == [(4, 192), (4,), (4, 192), (4,)]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()
    training = Training("both", 1e-3, 0, tmp_path / "both")
    write_state(net.heads, training.folder / HEAD_FILE)
    finish(net.stock, training.folder, False, {})
    job.fresh = lambda config: classifier_net(distilled, 4, 9)  # type: ignore[method-assign]
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(job.loaded(training)(images), net.eval()(images))
    for changes in ({"evaluate": {"laplace": True}}, {"head": {"name": "vbll"}}):
        with pytest.raises(UserError, match="averages two classifiers"):
            classifier_net(config("deit_tiny_distilled_patch16_224", **changes), 4, 9)


def test_the_means_of_a_bayesian_head_on_half_precision_weights() -> None:
    net = classifier_net(config(head={"name": "vbll"}, model={"dtype": "bfloat16"}), 4, 9).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = net.head(net.features(images))
    logits = with_linear_head(net.stock)(net.backbone.normalise(images))
    assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=1e-5)


def test_a_posterior_counts_the_images_that_its_arm_is_trained_on(tmp_path: Path) -> None:
    job = ClassifierJob(config(head={"name": "vbll"}), tmp_path, "hash")
    nets = {arm: job.fresh(of) for arm, of in job.study.arms.items()}
    assert {arm: net.head.num_train for arm, net in nets.items()} == {"digits": 30, "both": 66}
    counted = []

    def head_of(head: Any, features: list[torch.Tensor], validation: Any) -> Any:
        counted.append(sum(map(len, features)))
        return head

    for arm, net in nets.items():
        job.evaluation.with_head(net.eval(), Training(arm, 1e-3, 0, tmp_path), partial(head_of))
    assert counted == [30, 66]


def test_an_arm_is_calibrated_on_the_images_that_it_is_trained_on(tmp_path: Path, monkeypatch) -> None:
    job = ClassifierJob(config(calibration={"examples": 4}), tmp_path, "hash")
    counted = []

    def on_images(backbone: Any, adapt: Any, section: Any, images: Any) -> Any:
        counted.append(len(images))
        return adapt

    monkeypatch.setattr(job.calibrations, "on_images", on_images)
    for arm in job.study.arms.values():
        job.prepare(job.fresh(arm), arm)
    assert counted == [30, 66]
