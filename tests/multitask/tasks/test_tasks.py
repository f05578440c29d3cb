"""Dense tasks on small maps: losses by hand, valid pixels, metrics, pictures, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.tasks import IGNORE, NYUD_WEIGHTS, PASCAL_WEIGHTS, TASKS, Task, make_task
from vismt.multitask.tasks.classes import Segmentation, class_colors, unite
from vismt.multitask.tasks.maps import InverseDepth

LN2, LN3 = math.log(2), math.log(3)
SPECS = ({"name": "semseg", "classes": 3}, "depth", "normals", "edge", "parts", "saliency")
HEIGHT, WIDTH = 4, 6


def named(spec: str | dict) -> str:
    return spec if isinstance(spec, str) else spec["name"]


every_task = pytest.mark.parametrize("spec", SPECS, ids=named)


def nothing(task: Task, count: int = 1) -> Tensor:
    """Return targets without a valid pixel."""
    if task.vector:
        return torch.zeros(count, 3, HEIGHT, WIDTH)
    if task.name == "depth":
        return torch.zeros(count, HEIGHT, WIDTH)
    return torch.full((count, HEIGHT, WIDTH), IGNORE)


def labelled(task: Task, count: int = 1, seed: int = 0) -> Tensor:
    """Return random targets that are valid at every pixel but the first column."""
    generator, target = torch.Generator().manual_seed(seed), nothing(task, count)
    if task.vector:
        target[..., 1:] = torch.randn(count, 3, HEIGHT, WIDTH - 1, generator=generator)
        return torch.nn.functional.normalize(target, dim=1)
    if task.name == "depth":
        target[..., 1:] = 1 + torch.rand(count, HEIGHT, WIDTH - 1, generator=generator)
        return target
    if task.name == "edge":
        target[..., 1:] = torch.tensor([0, 0, 1, 0, 0])  # a line, which thinning does not change
        return target
    target[..., 1:] = torch.randint(task.classes, (count, HEIGHT, WIDTH - 1), generator=generator)
    return target


def perfect(task: Task, target: Tensor) -> Tensor:
    """Return the prediction that is correct at every valid pixel."""
    if task.vector:
        return 3 * target
    if task.name == "depth":
        return target[:, None].clone()
    right = torch.nn.functional.one_hot(target.where(target != IGNORE, 0), task.classes).movedim(-1, 1).float()
    return 20 * (right if task.channels > 1 else right[:, 1:] - 0.5)


def predictions(task: Task, count: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(count, task.channels, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


# Losses by hand --------------------------------------------------------------------------------------------------------------


def test_segmentation_is_the_mean_over_valid_pixels() -> None:
    # Three pixels with class probabilities (1/2, 1/4, 1/4); labels 0, 1 and none: -ln 1/2 = ln 2, -ln 1/4 = 2 ln 2.
    logits = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log().view(1, 3, 1, 1).expand(1, 3, 1, 3)
    target = torch.tensor([[[0, 1, IGNORE]]])
    loss = make_task({"name": "semseg", "classes": 3}).loss(logits, target)
    assert loss.item() == pytest.approx(3 * LN2 / 2)  # a mean over all pixels would be ln 2
    assert loss.ndim == 0


def test_depth_is_pooled_over_the_valid_pixels_of_the_batch() -> None:
    # Image 1: one valid pixel, off by 3. Image 2: three, off by 0, 0, 1. (3 + 1) / 4 = 1; the mean of images is 5/3.
    target = torch.tensor([[[2.0, 0.0, 0.0]], [[1.0, 1.0, 2.0]]])
    prediction = torch.tensor([[[[5.0, 9.0, 9.0]]], [[[1.0, 1.0, 1.0]]]])
    assert make_task("depth").loss(prediction, target).item() == pytest.approx(1.0)
    # Below 2 metres only the two exact pixels are valid; the bound is excluded.
    assert make_task({"name": "depth", "max_depth": 2}).loss(prediction, target).item() == 0.0
    broken = torch.tensor([[[2.0, math.inf, math.nan]], [[-1.0, 1.0, 2.0]]])  # (3 + 0 + 1) / 3
    assert make_task("depth").loss(prediction, broken).item() == pytest.approx(4 / 3)


def test_normals_in_all_conventions() -> None:
    # p = (3, 4, 0) is n = (.6, .8, 0); p = (0, 0, 2) is n = (0, 0, 1). Truth (0, 0, 1) for both, none for the third pixel.
    prediction = torch.tensor([[3.0, 4, 0], [0, 0, 2], [5, 5, 5]]).T.reshape(1, 3, 1, 3)
    target = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]).T.reshape(1, 3, 1, 3)
    # |n - g|: .6 + .8 + 1 = 2.4 and 0; 1 - n . g: 1 and 0.
    for convention, wanted in (("invpt", 2.4 / 2), ("astmt", 2.4 / 6), ("libmtl", 1 / 2)):
        task = make_task({"name": "normals", "convention": convention})
        assert task.loss(prediction, target).item() == pytest.approx(wanted)
        assert task.loss(7 * prediction, target).item() == pytest.approx(wanted)  # the length of p does not matter
        assert task.loss_weight == (1 if convention == "libmtl" else 10)
    # (1, -1, 0) is a normal, but its components sum to 0.
    target[0, :, 0, 2] = torch.tensor([1.0, -1, 0]) / math.sqrt(2)
    assert make_task("normals").valid(target).sum() == 3
    assert make_task({"name": "normals", "convention": "libmtl"}).valid(target).sum() == 2
    zero = torch.zeros(1, 3, 1, 3, requires_grad=True)
    make_task("normals").loss(zero, target).backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() < 1e5


def test_edges_weigh_and_divide_by_pixels() -> None:
    # One boundary, three others, one ignored, z = ln 3 everywhere: softplus(-z) = ln 4/3, softplus(z) = ln 4.
    target = torch.tensor([[[1, 0, 0, 0, IGNORE]]])
    z = torch.full((1, 1, 1, 5), LN3)
    wanted = (0.95 * math.log(4 / 3) + 3 * 0.05 * math.log(4)) / 4
    assert make_task("edge").loss(z, target).item() == pytest.approx(wanted)
    # w = 3/4: #negative / #valid.
    balanced = (0.75 * math.log(4 / 3) + 3 * 0.25 * math.log(4)) / 4
    assert make_task({"name": "edge", "positive_weight": None}).loss(z, target).item() == pytest.approx(balanced)


def test_saliency_is_balanced_on_valid_pixels() -> None:
    # One salient pixel of four valid ones: w = 3/4 (4/5 if the ignored pixel were background). z_1 - z_0 = ln 3 throughout.
    target = torch.tensor([[[1, 0, 0, 0, IGNORE]]])
    two = torch.stack([torch.full((1, 1, 5), 5.0), torch.full((1, 1, 5), 5.0 + LN3)], dim=1)
    wanted = (0.75 * math.log(4 / 3) + 3 * 0.25 * math.log(4)) / 4
    assert make_task("saliency").loss(two, target).item() == pytest.approx(wanted)
    single_logit = make_task({"name": "saliency", "channels": 1})
    assert single_logit.loss(torch.full((1, 1, 1, 5), LN3), target).item() == pytest.approx(wanted)
    # Two logits are a weighted softmax cross-entropy over the number of pixels, not over the sum of weights.
    summed = torch.nn.functional.cross_entropy(
        two, target, torch.tensor([0.25, 0.75]), ignore_index=IGNORE, reduction="sum"
    )
    assert summed.item() / 4 == pytest.approx(wanted)
    background = two.clone().requires_grad_()
    loss = make_task("saliency").loss(background, torch.zeros(1, 1, 5, dtype=torch.int64))  # no salient pixel: w = 1
    loss.backward()
    assert loss.item() == 0 and not background.grad.any()


def test_weights_of_the_literature() -> None:
    assert NYUD_WEIGHTS == {"semseg": 1, "depth": 1, "normals": 10, "edge": 50}
    assert PASCAL_WEIGHTS == {"semseg": 1, "parts": 2, "saliency": 5, "normals": 10, "edge": 50}
    tasks = {named(spec): make_task(spec) for spec in SPECS}
    assert {*tasks, "classify"} == set(TASKS)  # classify is not among their tasks: test_classify.py
    assert {name: task.loss_weight for name, task in tasks.items()} == NYUD_WEIGHTS | PASCAL_WEIGHTS
    assert {name: task.channels for name, task in tasks.items()} == {
        "semseg": 3,
        "depth": 1,
        "normals": 3,
        "edge": 1,
        "parts": 7,
        "saliency": 2,
    }
    assert {name for name, task in tasks.items() if task.headline.lower_is_better} == {"depth", "normals"}
    assert {name for name, task in tasks.items() if task.predicts_classes} == {"semseg", "parts"}
    assert {name for name, task in tasks.items() if task.headline.share} == {"semseg", "parts", "edge", "saliency"}
    assert make_task({"name": "edge", "loss_weight": 3}).loss_weight == 3
    assert isinstance(tasks["parts"], Segmentation)


@pytest.mark.parametrize(
    ("spec", "label", "unit"),
    [
        ({"name": "semseg", "classes": 3}, "mIoU", ""),
        ("depth", "RMSE", "m"),
        ({"name": "depth", "measure": "abs_err"}, "mean absolute error", "m"),
        ({"name": "depth", "measure": "abs_rel"}, "mean relative error", ""),
        ({"name": "depth", "measure": "log_rmse"}, "RMSE of the log", ""),
        ("normals", "mean angle", "degrees"),
        ("edge", "odsF", ""),
        ("parts", "mIoU", ""),
        ("saliency", "maxF", ""),
        ({"name": "saliency", "measure": "miou"}, "mIoU", ""),
        ({"name": "classify", "classes": 3}, "accuracy", ""),
    ],
)
def test_the_score_has_a_label_and_a_unit(spec: str | dict, label: str, unit: str) -> None:
    task = make_task(spec)
    assert (task.headline.label, task.headline.unit) == (label, unit)
    if task.name == "depth":
        assert (InverseDepth.of(task).headline.label, InverseDepth.of(task).headline.unit) == (label, "")


# Valid pixels ----------------------------------------------------------------------------------------------------------------


@every_task
def test_nothing_at_invalid_pixels_reaches_the_loss(spec: str | dict) -> None:
    task = make_task(spec)
    assert task.loss(predictions(task).requires_grad_(), nothing(task)) is None
    target, prediction = labelled(task), predictions(task)
    prediction[..., 0] = math.nan  # the first column has no label
    prediction.requires_grad_()
    loss = task.loss(prediction, target)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all()
    assert not prediction.grad[..., 0].any() and prediction.grad[..., 1:].any()
    assert task.loss(prediction.bfloat16(), target).dtype == torch.float32


@every_task
def test_a_sample_without_labels_counts_nowhere(spec: str | dict) -> None:
    task = make_task(spec)
    target, prediction = labelled(task), predictions(task)
    both, garbage = torch.cat([target, nothing(task)]), torch.cat([prediction, torch.full_like(prediction, math.nan)])
    assert torch.equal(task.loss(garbage, both), task.loss(prediction, target))
    metric, alone = task.metric(), task.metric()
    task.update(metric, garbage, both)
    task.update(metric, garbage[1:], both[1:])
    task.update(alone, prediction, target)
    assert metric.compute() == alone.compute()


@every_task
def test_the_metric_knows_the_right_answer(spec: str | dict) -> None:
    task = make_task(spec)
    target = labelled(task, 2)
    scores = []
    for prediction in (perfect(task, target), predictions(task, 2)):
        metric = task.metric()
        task.update(metric, prediction.requires_grad_(), target)
        scores.append(task.score(metric.compute()))
    best, chance = scores
    assert best == pytest.approx(0 if task.headline.lower_is_better else 1, abs=1e-3)
    assert chance > best + 0.1 if task.headline.lower_is_better else chance < best - 0.1


def test_options_of_the_metrics_arrive() -> None:
    assert make_task({"name": "edge", "max_dist": 0.011, "thresholds": 9}).metric().max_dist == 0.011
    assert make_task({"name": "semseg", "classes": 3, "absent": "skip"}).metric().absent == "skip"
    depth = make_task({"name": "depth", "max_depth": 80, "convention": "libmtl"}).metric()
    assert depth.valid_range == (0, 80) and depth.convention == "libmtl"
    assert make_task({"name": "normals", "convention": "libmtl"}).metric().convention == "libmtl"
    for channels in (1, 2):
        task = make_task({"name": "saliency", "channels": channels, "measure": "miou"})
        z = torch.tensor([[[[2.0, 2.0, -2.0, 2.0]]]])
        prediction, target = z if channels == 1 else torch.cat([-z, z], 1), torch.tensor([[[1, 0, 0, IGNORE]]])
        metric = task.metric()
        task.update(metric, prediction, target)
        assert task.score(metric.compute()) == pytest.approx((1 / 2 + 1 / 2) / 2)


# Pictures --------------------------------------------------------------------------------------------------------------------


@every_task
def test_a_right_prediction_looks_like_its_target(spec: str | dict) -> None:
    task = make_task(spec)
    target = labelled(task)
    truth, drawn = task.picture(target[0]), task.picture(perfect(task, target)[0], like=target[0])
    assert truth.dtype == torch.uint8 and truth.shape == drawn.shape == (3, HEIGHT, WIDTH)
    assert (truth[..., 0] == 64).all()  # no value: dark grey
    assert (truth.int() - drawn.int())[..., 1:].abs().max() <= 1
    assert len(truth[..., 1:].flatten(1).unique(dim=1).T) > 1


def test_colours() -> None:
    colors = class_colors(40)
    assert len(set(colors)) == 40 and all(len(set(color)) > 1 for color in colors)
    task = make_task({"name": "semseg", "classes": 2, "colors": [[1, 2, 3], [4, 5, 6]]})
    assert task.picture(torch.tensor([[0, 1, IGNORE]]))[:, 0].T.tolist() == [[1, 2, 3], [4, 5, 6], [64, 64, 64]]
    normal = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 0]]).T.reshape(3, 1, 3)
    # (v + 1) / 2: 0 becomes 127.5, which rounds to the even 128.
    assert make_task("normals").picture(normal)[:, 0].T.tolist() == [[255, 128, 128], [128, 0, 128], [64, 64, 64]]
    edge = make_task("edge").picture(torch.tensor([[[0.0, -50.0, 50.0, math.nan]]]))
    assert edge[:, 0].T.tolist() == [[128] * 3, [0] * 3, [255] * 3, [64] * 3]


def test_depth_colours_follow_the_range_of_the_target() -> None:
    task = make_task("depth")
    target = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    truth = task.picture(target).int()[:, 0]
    assert truth[:, 0].sum() > truth[:, 1].sum() > truth[:, 2].sum()  # near is bright
    prediction = torch.tensor([[[3.0, 9.0, -1.0, 2.0]]])
    drawn = task.picture(prediction, like=target).int()[:, 0]
    # Values beyond the range take the colours of its ends.
    assert torch.equal(drawn[:, [0, 1, 2, 3]], truth[:, [2, 2, 0, 1]])
    assert not torch.equal(task.picture(prediction).int()[:, 0], drawn)
    for constant in (torch.full((2, 3), 2.0), torch.zeros(2, 3), torch.full((1, 2, 3), -1.0)):
        assert len(task.picture(constant).flatten(1).unique(dim=1).T) == 1


def test_depth_is_scored_by_its_measure() -> None:
    # Off by 3 at 1 and by 1 at 2: sqrt(5), 2, (3 + 1/2) / 2, sqrt((ln 4^2 + ln 3/2^2) / 2).
    target, prediction = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[[4.0, 3.0]]]])
    logs = math.hypot(math.log(4), math.log(1.5)) / math.sqrt(2)
    wanted = {"rmse": math.sqrt(5), "abs_err": 2.0, "abs_rel": 1.75, "log_rmse": logs}
    for convention, default in (("pooled", "rmse"), ("libmtl", "abs_err")):
        for measure in (None, *wanted):
            task = make_task({"name": "depth", "convention": convention, "measure": measure})
            metric = task.metric()
            task.update(metric, prediction, target)
            assert task.measure == (measure or default)
            assert task.score(metric.compute()) == pytest.approx(wanted[task.measure]) and task.headline.lower_is_better
    assert InverseDepth.of(make_task({"name": "depth", "measure": "abs_rel"})).measure == "abs_rel"


def test_inverse_depth_is_bright_where_it_is_large() -> None:
    depth = make_task("depth")
    inverse = InverseDepth.of(depth)
    target = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    assert torch.equal(inverse.picture(1 / target)[:, 0, [0, 2]], depth.picture(target)[:, 0, [0, 2]])  # near, far
    drawn = inverse.picture(torch.tensor([[[0.25, 9.0, -1.0]]]), like=1 / target.where(target > 0, torch.inf))[:, 0]
    # Values beyond the range take the colours of its ends.
    assert torch.equal(drawn, depth.picture(target)[:, 0, [2, 0, 2]])
    assert (inverse.picture(target)[:, 0, 3] == 64).all()


@pytest.mark.parametrize("convention", ["pooled", "libmtl"])
def test_written_depths_have_the_scored_error(convention: str) -> None:
    task = make_task({"name": "depth", "convention": convention, "measure": "rmse"})
    prediction, target = torch.tensor([[[[-2.0, 0.5, 3.0]]]]), torch.tensor([[[1.0, 1.0, 2.0]]])
    metric = task.metric()
    task.count(metric, prediction, target)
    error = (task.answer(prediction[0]) - target).square().mean().sqrt()
    assert float(metric.compute()["rmse"]) == pytest.approx(float(error), rel=1e-6)
    assert task.caption(prediction[0]) == "near 0.00 to far 3.00"


def test_written_normals_have_length_one() -> None:
    written = make_task("normals").answer(torch.arange(1.0, 61.0).view(3, 4, 5))
    assert torch.allclose(written.norm(dim=0), torch.ones(4, 5))


def test_two_tasks_of_whole_images_share_one_softmax() -> None:
    tasks = [make_task({"name": name, "kind": "classify", "classes": k}) for name, k in (("a", 2), ("b", 3))]
    assert [task.outputs for task in unite(tasks)] == [5, 5] and unite(tasks[:1]) == tasks[:1]


def test_captions_and_legends() -> None:
    logits = torch.eye(3).log()[[2, 0, 2]].movedim(-1, 0)[:, None]  # classes 2, 0, 2
    task = make_task({"name": "semseg", "classes": 3, "colors": [[1, 2, 3], [4, 5, 6], [255, 0, 16]]})
    assert task.legend(logits) == [("class 2", "#ff0010"), ("class 0", "#010203")]
    assert task.legend(logits, ["road", "car", "sky"]) == [("sky", "#ff0010"), ("road", "#010203")]
    assert task.caption(logits) == "" and task.rescaled(logits, 2.0) is logits
    classify = make_task({"name": "classify", "classes": 3})
    probabilities = torch.tensor([0.25, 0.5, 0.25]).log()
    assert classify.caption(probabilities) == "class 1 50 %" and classify.legend(probabilities) == []
    assert classify.caption(probabilities, ["cat", "dog", "eel"]) == "dog 50 %"
    depth, inverse = make_task("depth"), InverseDepth.of(make_task("depth"))
    values = torch.tensor([[[1.0, 2.0, 4.0]]])
    assert depth.caption(values) == "near 1.00 to far 4.00" and inverse.caption(values) == "near 4.00 to far 1.00"
    assert torch.equal(depth.rescaled(values, 2.0), 2 * values)
    assert torch.equal(inverse.rescaled(values, 2.0), values / 2)
    assert len(make_task("parts").default_class_names) == 7
    assert not make_task({"name": "parts", "classes": 3}).default_class_names and not task.default_class_names


# Errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("semsg", "no dense task 'semsg'.*Near: 'semseg'"),
        ({"classes": 3}, "no dense task 'None'.*Known"),
        (3, "give its name"),
        ({"name": "semseg"}, "'semseg' needs 'classes'"),
        ({"name": "semseg", "clases": 3}, "no option 'clases'.*Near: 'classes'"),
        ({"name": "semseg", "classes": 1}, "classes 1; it must be a whole number from 2 to 255"),
        ({"name": "parts", "classes": "7"}, "parts: classes '7'"),
        ({"name": "semseg", "classes": 3, "absent": "skp"}, "absent 'skp'.*Near: 'skip'"),
        ({"name": "semseg", "classes": 2, "colors": [[0, 0, 0]]}, "colors must be .* each of 2 classes"),
        ({"name": "semseg", "classes": 2, "colors": [0, 0]}, "colors must be"),
        ({"name": "semseg", "classes": 2, "colors": [[0, 0, 0], [0, 0, 256]]}, "colors must be"),
        ({"name": "depth", "max_depth": 0}, "depth: max_depth 0; it must be a number above 0"),
        ({"name": "depth", "convention": "poled"}, "convention 'poled'.*Near: 'pooled'"),
        ({"name": "depth", "loss_weight": 0}, "depth: loss_weight 0"),
        ({"name": "depth", "measure": "rsme"}, "measure 'rsme'. Near: 'rmse'"),
        ({"name": "normals", "measure": "median"}, "no option 'measure'"),
        ({"name": "normals", "convention": "mtl"}, "convention 'mtl'.*'libmtl'"),
        ({"name": "normals", "loss_weight": "10"}, "normals: loss_weight '10'"),
        ({"name": "edge", "positive_weight": 1}, "edge: positive_weight 1; .* above 0 and below 1"),
        ({"name": "edge", "max_dist": 0}, "edge: max_dist 0"),
        ({"name": "edge", "thresholds": 0}, "edge: thresholds 0"),
        ({"name": "saliency", "channels": 3}, "saliency: channels 3; 2"),
        ({"name": "saliency", "measure": "maxf"}, "measure 'maxf'.*Near: 'max_f'"),
    ],
)
def test_bad_specifications(spec: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(spec)


@pytest.mark.parametrize(
    ("spec", "prediction", "target", "message"),
    [
        (
            SPECS[0],
            torch.zeros(1, 2, 2, 3),
            torch.zeros(1, 2, 3).long(),
            r"semseg: the prediction is \(1, 2, 2, 3\).*\(b, 3, h",
        ),
        (SPECS[0], torch.zeros(1, 3, 2, 3).long(), torch.zeros(1, 2, 3).long(), "needed floating point"),
        (SPECS[0], torch.zeros(1, 3, 2, 3), torch.zeros(1, 4, 6).long(), r"target \(1, 4, 6\): resize the prediction"),
        (SPECS[0], torch.zeros(1, 3, 2, 3), torch.zeros(2, 2, 3).long(), r"target \(2, 2, 3\)"),
        (SPECS[0], torch.zeros(1, 3, 2, 3), torch.zeros(1, 2, 3), "float32, needed int64"),
        (
            SPECS[0],
            torch.zeros(1, 3, 2, 3),
            torch.full((1, 2, 3), 3),
            "label 3; classes are 0 to 2, 255 means no label",
        ),
        ("edge", torch.zeros(1, 1, 2, 3), torch.full((1, 2, 3), -1), "label -1; classes are 0 to 1"),
        ("depth", torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), r"target is \(1, 1, 2, 3\), needed \(b, h, w\)"),
        ("normals", torch.zeros(1, 3, 2, 3), torch.zeros(1, 2, 3), r"needed \(b, 3, h, w\)"),
    ],
)
def test_bad_batches(spec: str | dict, prediction: Tensor, target: Tensor, message: str) -> None:
    task = make_task(spec)
    with pytest.raises(UserError, match=message):
        task.loss(prediction, target)
    with pytest.raises(UserError, match=message):
        task.update(None, prediction, target)


def test_bad_pictures() -> None:
    with pytest.raises(UserError, match=r"edge: cannot draw a map \(1, 1, 2, 3\)"):
        make_task("edge").picture(torch.zeros(1, 1, 2, 3))
    with pytest.raises(UserError, match="label 9; classes"):
        make_task(SPECS[0]).picture(torch.full((2, 3), 9))


@pytest.mark.parametrize("spec", SPECS)
def test_every_shown_number_is_computed_and_the_score_is_among_them(spec: str | dict) -> None:
    task = make_task(spec)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(1, 2, (2, 8, 8), generator=generator).to(
        torch.float32 if task.name == "depth" else torch.int64
    )
    if task.name == "normals":
        target = torch.nn.functional.normalize(torch.randn(2, 3, 8, 8, generator=generator), dim=1)
    metric = task.metric()
    task.update(metric, torch.randn(2, task.channels, 8, 8, generator=generator), target)
    values = task.values(metric.compute())
    assert values.keys() == task.numbers.keys() and values[task.measure] == task.score(metric.compute())
    assert task.headline == task.numbers[task.measure]


def test_a_class_that_does_not_occur_has_no_iou_and_classes_have_names() -> None:
    task = make_task({"name": "semseg", "classes": 3, "class_names": ["sky", "road", "bus"]})
    metric = task.metric()
    task.update(metric, torch.eye(3)[torch.tensor([[[0, 1]]])].movedim(-1, 1), torch.tensor([[[0, 0]]]))
    values = task.values(metric.compute())
    assert values["miou"] == pytest.approx((1 / 2 + 0 + 0) / 3)  # absent "zero"
    assert values["iou 0"] == 0.5 and values["iou 1"] == 0 and math.isnan(values["iou 2"])
    assert task.numbers["iou 2"].label == "IoU of bus"
    assert make_task({"name": "semseg", "classes": 3}).numbers["iou 2"].label == "IoU of class 2"
    with pytest.raises(UserError, match="class_names"):
        make_task({"name": "semseg", "classes": 3, "class_names": ["sky"]})


def test_the_constant_prediction_has_the_least_loss() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    constant = make_task({"name": "semseg", "classes": 4}).constant(labels)
    assert constant.exp().tolist() == pytest.approx([6 / 14, 4 / 14, 3 / 14, 1 / 14])
    assert float(make_task("depth").constant(torch.tensor([1.0, 2.0, 6.0]))) == 3
    assert make_task("normals").constant(torch.tensor([[0.0, 0, 1], [1, 0, 0]])).tolist() == [0.5, 0, 0.5]
    shares = torch.tensor([1] * 3 + [0] * 5)
    assert float(make_task("edge").constant(shares).sigmoid()) == pytest.approx(4 / 10)
    assert make_task("saliency").constant(shares).softmax(0).tolist() == pytest.approx([6 / 10, 4 / 10])
