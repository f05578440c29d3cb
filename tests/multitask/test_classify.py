"""Classification of the image as a dense task: loss and score by hand, the head, and batches with few labelled images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.tiny import images, tiny_vit
from torch import Tensor
from torch.nn import functional as F

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import Sample, collate
from vismt.jobs.multitask.pooled_score import PooledScore
from vismt.multitask.balancing.base import BALANCERS, make_balancer
from vismt.multitask.heads import MAP_HEADS, PooledHead, make_map_head, make_pooled_head
from vismt.multitask.metrics import Accuracy
from vismt.multitask.nets import DenseNet, Union
from vismt.multitask.objectives import MultitaskObjective
from vismt.multitask.tasks import MapTask, make_task

LN2 = math.log(2)
TASKS = [make_task({"name": "semseg", "classes": 4}), make_task({"name": "classify", "classes": 3, "loss_weight": 2.0})]
# Probabilities 1/2, 1/4, 1/4 for each of three images; the last image has no class.
LOGITS, LABELS = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log().expand(3, 3), torch.tensor([0, 1, -1])


def classify(classes: int = 3, **options: float):
    return make_task({"name": "classify", "classes": classes, **options})


# Loss and score --------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_labelled_images() -> None:
    # -ln 1/2 = ln 2 and -ln 1/4 = 2 ln 2; a mean over all images would be ln 2.
    assert classify().loss(LOGITS, LABELS).item() == pytest.approx(3 * LN2 / 2)
    # s = 0.3 leaves 0.8 on the class and 0.1 on each other class: 0.8 + 0.2 + 0.2 = 1.2 and 0.1 + 1.6 + 0.2 = 1.9 times ln 2.
    assert classify(label_smoothing=0.3).loss(LOGITS, LABELS).item() == pytest.approx((1.2 + 1.9) / 2 * LN2)
    assert classify().loss(LOGITS, torch.full((3,), -1)) is None
    assert classify().loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32
    assert classify().loss_weight == 1


def test_nothing_of_an_unlabelled_image_reaches_loss_or_score() -> None:
    logits = LOGITS.clone()
    logits[2] = math.nan
    logits.requires_grad_()
    loss = classify().loss(logits, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(3 * LN2 / 2) and not logits.grad[2].any() and logits.grad[:2].all()
    metric = classify().metric()
    classify().update(metric, logits, LABELS)
    classify().update(metric, logits[2:], LABELS[2:])
    assert metric.compute() == {"accuracy": 0.5, "images": 2}


def test_the_256th_class_is_a_class() -> None:
    task, logits = classify(300), torch.zeros(2, 300)
    logits[:, 255] = 30.0
    assert task.loss(logits, torch.tensor([255, 0])).item() == pytest.approx((0 + 30) / 2, abs=1e-4)
    assert task.valid(torch.tensor([255, -1])).tolist() == [True, False]
    metric = task.metric()
    task.update(metric, logits, torch.tensor([255, 255]))
    assert task.score(metric.compute()) == 1


def test_accuracy_is_pooled_over_images_not_over_classes_or_batches() -> None:
    metric, right = Accuracy(3), torch.eye(3)
    metric.update(right[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 0]))  # 3 of 4
    metric.update(right[[2]], torch.tensor([1]))  # 0 of 1
    # 3 / 5; the mean over classes would be (3/4 + 0) / 2, over batches (3/4 + 0) / 2 too.
    assert metric.compute() == {"accuracy": pytest.approx(3 / 5), "images": 5}
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    metric = Accuracy(7)
    for rows in (slice(0, 20), slice(20, 50)):
        metric.update(logits[rows], labels[rows])
    wanted = (logits.numpy().argmax(1) == labels.numpy()).mean()
    assert metric.compute() == {"accuracy": pytest.approx(wanted), "images": 50}


def test_the_jackknife_of_accuracy_is_right_and_wrong_of_each_labelled_image() -> None:
    pool = PooledScore(classify())
    for name, label in (("a", 0), ("b", 1), ("c", 0), ("d", -1), ("e", 2)):
        pool.add({"id": name, **pool.columns(LOGITS[:1], torch.tensor([label]))})
    result = pool.result()
    assert result.value == 0.5
    right = {"a": 1, "b": 0, "c": 1, "e": 0}
    assert result.images == pytest.approx(right) and {name: pool.alone(name) for name in right} == right


def test_its_logits_have_no_size_and_no_picture() -> None:
    task = classify()
    assert task.resized(LOGITS, (64, 96)) is LOGITS and task.channels == 3
    assert not isinstance(task, MapTask) and not hasattr(task, "picture")
    assert TASKS[0].resized(torch.zeros(1, 4, 2, 3), (8, 12)).shape == (1, 4, 8, 12)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (
            torch.zeros(2, 3, 4, 6),
            torch.zeros(2).long(),
            r"classify: the prediction is \(2, 3, 4, 6\).*needed.*\(b, 3\)",
        ),
        (torch.zeros(2, 4), torch.zeros(2).long(), r"needed floating point \(b, 3\), one row for each image"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), "needed floating point"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4, 6).long(),
            r"the target is \(2, 4, 6\), needed \(2,\), a class for each image",
        ),
        (torch.zeros(2, 3), torch.zeros(1).long(), r"needed \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "float32, needed int64"),
        (torch.zeros(2, 3), torch.tensor([0, 255]), "label 255; classes are 0 to 2, -1 means no label"),
    ],
)
def test_bad_batches(prediction: Tensor, target: Tensor, message: str) -> None:
    for call in (classify().loss, lambda prediction, target: classify().update(None, prediction, target)):
        with pytest.raises(UserError, match=message):
            call(prediction, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'classify' needs 'classes'"),
        ({"classes": 1}, "classes 1; it must be a whole number, at least 2"),
        ({"classes": True}, "classes True"),
        ({"classes": 3, "label_smoothing": 1}, "label_smoothing 1; it must be a number from 0 and below 1"),
        ({"classes": 3, "label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"classes": 3, "smoothing": 0.1}, "no option 'smoothing'.*Near: 'label_smoothing'"),
        ({"classes": 3, "loss_weight": 0}, "classify: loss_weight 0"),
    ],
)
def test_bad_specifications(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task({"name": "classify", **options})


def test_bad_calls_of_the_metric() -> None:
    with pytest.raises(UserError, match="num_classes = 1"):
        Accuracy(1)
    for prediction, target, message in (
        (torch.zeros(2, 4), torch.zeros(2).long(), r"needed \(b, 3\), \(b,\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), r"targets \(3,\)"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "label -1; classes are 0 to 2"),
        (torch.full((1, 3), math.nan), torch.tensor([0]), "3 predicted values are NaN"),
    ):
        with pytest.raises(UserError, match=message):
            Accuracy(3).update(prediction, target)


# Head and net ----------------------------------------------------------------------------------------------------------------


def net(tasks=TASKS) -> DenseNet:
    """Return a net for images of 16 x 24, with a grid of 4 x 6."""
    backbone = Backbone(tiny_vit(0, num_classes=0, img_size=(16, 24)), mean=(0.5,) * 3, std=(0.5,) * 3)
    make = {"semseg": lambda: make_map_head("linear", [32, 32], 4), "classify": lambda: make_pooled_head([32, 32], 3)}
    return DenseNet(backbone, {task.name: make[task.name]() for task in tasks}, [0, 1])


def batch(maps: int, classes: int) -> Sample:
    """Return a batch of images with a label map alone, then images with a class alone."""
    generator, pictures = torch.Generator().manual_seed(maps), images(maps + classes, 24)[:, :, :16]
    samples = [
        {"image": picture, "semseg": torch.randint(0, 4, (16, 24), generator=generator)} for picture in pictures[:maps]
    ]
    return collate(
        [*samples, *({"image": picture, "class": torch.tensor(i % 3)} for i, picture in enumerate(pictures[maps:]))]
    )


def test_the_head_sees_the_mean_of_the_patch_tokens() -> None:
    model, pixels = net(), images(2, 24)[:, :, :16]
    logits, head = model(pixels), model.heads["classify"]
    assert logits["classify"].shape == (2, 3) and logits["semseg"].shape == (2, 4, 4, 6)
    tokens = model.backbone.tokens(pixels)
    assert torch.allclose(logits["classify"], head.predict(tokens[:, 1:].mean(1)), atol=1e-5)
    for other in (tokens[:, 0], tokens.mean(1), tokens[:, 1:].amax(1)):
        assert not torch.allclose(logits["classify"], head.predict(other), atol=1e-3)


def test_the_pooled_head_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    taps = [torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2)]
    head = make_pooled_head([5, 5], 7, seed=3)
    assert head(taps).shape == (2, 7) and sum(p.numel() for p in head.parameters()) == 5 * 7 + 7
    assert torch.equal(head([taps[0] + 1, taps[1]]), head(taps)) and not torch.allclose(
        head([taps[0], taps[1] + 1]), head(taps)
    )
    moved = taps[1].flatten(2)[..., torch.randperm(12, generator=generator)].unflatten(2, (4, 3))
    assert torch.allclose(head([moved, moved]), head(taps), atol=1e-6)  # the order of tokens does not matter
    same, other = make_pooled_head([5, 5], 7, seed=3), make_pooled_head([5, 5], 7, seed=4)
    assert torch.equal(head.predict.weight, same.predict.weight) and not torch.equal(
        head.predict.weight, other.predict.weight
    )
    assert PooledHead not in MAP_HEADS.values()  # not a head for maps
    with pytest.raises(UserError, match="no head 'pooled'"):
        make_map_head("pooled", [5], 7)
    with pytest.raises(UserError, match="head: channels 0"):
        make_pooled_head([5], 0)


# Partial labels --------------------------------------------------------------------------------------------------------------


def objective_of(model: DenseNet, tasks: list, **options: Any) -> MultitaskObjective:
    """Return the objective of tasks, the last of which is of whole images."""
    *maps, whole = tasks
    return MultitaskObjective(
        model, maps, Union((whole.name,), (whole.classes,)), weights=[whole.loss_weight], **options
    )


def gradients(model: DenseNet) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("balancing", [None, *BALANCERS])
@pytest.mark.parametrize(("maps", "classes"), [(3, 0), (0, 3), (2, 2)])
def test_heads_without_a_labelled_image_get_a_gradient_of_zero(balancing: str | None, maps: int, classes: int) -> None:
    model, names = net(), [task.name for task in TASKS]
    balancer = make_balancer(balancing, names) if balancing else None
    objective = objective_of(model, TASKS, balancer=balancer, balanced=list(model.backbone.vit.parameters()))
    scalars = objective(batch(maps, classes))
    scalars["loss"].backward()
    assert scalars["loss"].isfinite()
    for name, labelled in (("semseg", maps), ("classify", classes)):
        grads = [parameter.grad for parameter in model.heads[name].parameters()]
        assert all(grad is not None and grad.isfinite().all() and bool(grad.any()) == bool(labelled) for grad in grads)
        assert bool(scalars[name].isnan()) != bool(labelled)
    assert model.backbone.vit.blocks[0].mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("balancing", [None, *BALANCERS])
def test_a_single_task_passes_over_a_batch_of_the_other(balancing: str | None) -> None:
    model = net(TASKS[1:])
    balancer = make_balancer(balancing, ["classify"]) if balancing else None
    scalars = objective_of(model, TASKS[1:], balancer=balancer, balanced=list(model.backbone.vit.parameters()))(
        batch(3, 0)
    )
    scalars["loss"].backward()
    assert float(scalars["loss"].detach()) == 0 and scalars["classify"].isnan()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.heads.parameters())


def test_a_mixed_batch_is_the_sum_of_its_two_halves() -> None:
    """The loss of each task depends on the images with its labels alone."""
    mixed, halves = net(), [net(), net()]
    data = batch(2, 3)
    parts = [
        {"image": data["image"][:2], "semseg": data["semseg"][:2]},
        {"image": data["image"][2:], "class": data["class"][2:]},
    ]
    scalars = objective_of(mixed, TASKS)(data)
    scalars["loss"].backward()
    separate = [objective_of(model, TASKS)(part) for model, part in zip(halves, parts)]
    for half in separate:
        half["loss"].backward()
    assert scalars["semseg"].item() == pytest.approx(separate[0]["semseg"].item(), rel=1e-5)
    assert scalars["classify"].item() == pytest.approx(separate[1]["classify"].item(), rel=1e-5)
    logits = mixed(data["image"])["classify"][2:]
    assert scalars["classify"].item() == pytest.approx(F.cross_entropy(logits, data["class"][2:]).item(), rel=1e-5)
    assert scalars["loss"].item() == pytest.approx((scalars["semseg"] + 2 * scalars["classify"]).item(), rel=1e-5)
    first, second = map(gradients, halves)
    for name, grad in gradients(mixed).items():
        assert torch.allclose(grad, first[name] + second[name], atol=1e-6), name
