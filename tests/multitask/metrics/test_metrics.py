"""Metrics of label, depth and normal maps compared with hand-made cases and numpy; several processes; Delta_m of Table 3."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from vismt.base.errors import UserError
from vismt.multitask.metrics import Accuracy, BoundaryF, DepthErrors, MaxF, MeanIoU, NormalErrors, delta_m


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def filled(metric: Metric, *batches: tuple[Tensor, ...]) -> dict:
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


# Segmentation ----------------------------------------------------------------------------------------------------------------


def test_mean_iou_of_a_2x2_map_by_hand() -> None:
    # target 0 1 / 1 ignored, prediction 0 0 / 1 2; class 3 does not occur, class 2 is predicted at the ignored pixel alone.
    target, pred = torch.tensor([[[0, 1], [1, 255]]]), torch.tensor([[[0, 0], [1, 2]]])
    # class 0: TP 1, FP 1, FN 0 -> 1/2; class 1: TP 1, FP 0, FN 1 -> 1/2; classes 2, 3: 0/0. 2 of 3 pixels are correct.
    for absent, mean in (("zero", (1 / 2 + 1 / 2) / 4), ("skip", 1 / 2), ("nan", math.nan)):
        scores = filled(MeanIoU(4, absent=absent), (pred, target))
        assert scores["miou"] == pytest.approx(mean, nan_ok=True)
        assert scores["iou"] == pytest.approx([0.5, 0.5, math.nan, math.nan], nan_ok=True)
        assert scores["mean_accuracy"] == pytest.approx((1 + 1 / 2) / 2)  # of the two classes with a label
        assert scores["confusion"] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert scores["pixel_accuracy"] == pytest.approx(2 / 3) and scores["pixels"] == 3


def test_a_class_that_is_predicted_but_not_labelled_counts_as_zero() -> None:
    pred, target = (
        torch.tensor([[[0, 2]]]),
        torch.tensor([[[0, 0]]]),
    )  # class 0: 1/2; class 2: 0/1; class 1 does not occur
    assert filled(MeanIoU(3, absent="skip"), (pred, target))["miou"] == pytest.approx(1 / 4)
    assert filled(MeanIoU(3), (pred, target))["miou"] == pytest.approx(1 / 6)  # "zero" is the default


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16])
@pytest.mark.parametrize("ignore", [255, -1, None, 3])
def test_mean_iou_against_numpy(ignore: int | None, dtype: torch.dtype) -> None:
    if ignore == -1 and dtype == torch.uint8:
        pytest.skip("an unsigned map has no -1")
    classes, logits = 21, torch.from_numpy(rng().standard_normal((3, 21, 9, 7))).float()
    target = rng(1).integers(0, classes, (3, 9, 7))
    if ignore is not None:
        target[rng(2).random(target.shape) < 0.3] = ignore
    label = torch.from_numpy(target).to(dtype)
    pred, valid = logits.numpy().argmax(1), target != ignore
    hits = [(pred == c) & (target == c) & valid for c in range(classes)]
    unions = [((pred == c) | (target == c)) & valid for c in range(classes)]
    iou = [hit.sum() / union.sum() if union.any() else 0.0 for hit, union in zip(hits, unions)]
    for prediction in (logits, logits.argmax(1), logits.argmax(1)[:, None].int()):
        scores = filled(MeanIoU(classes, ignore_index=ignore), (prediction, label))
        assert scores["iou"] == pytest.approx(iou) and scores["miou"] == pytest.approx(np.mean(iou))
        assert scores["pixel_accuracy"] == pytest.approx((pred == target)[valid].mean())
        assert scores["pixels"] == valid.sum()


def test_mean_iou_is_pooled_over_the_set_and_skips_images_without_labels() -> None:
    right = (torch.tensor([[[0, 0]]]), torch.tensor([[[0, 0]]]))
    half_right = (torch.tensor([[[0, 0]]]), torch.tensor([[[0, 1]]]))
    empty = (torch.tensor([[[1, 1]]]), torch.tensor([[[255, 255]]]))
    scores = filled(MeanIoU(2), right, half_right, empty)
    assert scores["miou"] == pytest.approx((3 / 4 + 0 / 1) / 2)  # the mean of the images would be (1/2 + 1/4) / 2
    assert scores["pixels"] == 4


# Depth -----------------------------------------------------------------------------------------------------------------------


def test_depth_errors_of_2x2_maps_by_hand() -> None:
    # Image 1: one valid pixel, off by 3. Image 2: three valid pixels, all correct but one that is off by 1.
    target = torch.tensor([[[4.0, 0], [0, 0]], [[2.0, 2], [0, 8]]])
    pred = torch.tensor([[[7.0, 5], [5, 5]], [[2.0, 1], [5, 8]]])
    scores = filled(DepthErrors(), (pred, target))
    assert scores["pixels"] == 4
    assert scores["rmse"] == pytest.approx(math.sqrt((9 + 1) / 4))
    assert scores["rmse"] != pytest.approx((3 + math.sqrt(1 / 3)) / 2)  # the mean of per-image RMSEs
    assert scores["abs_err"] == pytest.approx((3 + 1) / 4)
    assert scores["abs_rel"] == pytest.approx((3 / 4 + 1 / 2) / 4)
    assert scores["sq_rel"] == pytest.approx((9 / 4 + 1 / 2) / 4)
    assert scores["log_rmse"] == pytest.approx(math.sqrt((math.log(7 / 4) ** 2 + math.log(2) ** 2) / 4))
    # ratios 1.75, 1, 2, 1 against 1.25, 1.5625, 1.953125
    assert [scores[f"delta{k}"] for k in (1, 2, 3)] == [2 / 4, 2 / 4, 3 / 4]


@pytest.mark.parametrize("channel", [False, True])
def test_depth_errors_against_numpy_with_every_kind_of_validity(channel: bool) -> None:
    target, pred = rng(3).uniform(0.5, 10, (4, 6, 5)), rng(4).uniform(-0.5, 10, (4, 6, 5))
    target[rng(5).random(target.shape) < 0.2] = 255
    target[0, 0, 0], mask = math.nan, rng(6).random(target.shape) < 0.7
    batch = [
        torch.from_numpy(values).unsqueeze(1) if channel else torch.from_numpy(values)
        for values in (pred, target, mask)
    ]
    cases: list[tuple[DepthErrors, np.ndarray, list[Tensor]]] = [
        (DepthErrors(ignore=255), (target != 255) & np.isfinite(target), batch[:2]),
        (DepthErrors(ignore=255), (target != 255) & mask & np.isfinite(target), batch),
        (DepthErrors(valid_range=(1, 8)), (target > 1) & (target < 8), batch[:2]),
        (DepthErrors(valid_range=(1, 8), convention="libmtl"), (target > 1) & (target < 8) & mask, batch),
    ]
    for metric, valid, arguments in cases:
        scores, g, p = filled(metric, tuple(arguments)), target[valid], pred[valid]
        least = np.maximum(p, 1e-9)
        q = p if metric.convention == "libmtl" else least
        want = {
            "rmse": np.sqrt(np.mean((q - g) ** 2)),
            "abs_err": np.abs(q - g).mean(),
            "abs_rel": (np.abs(q - g) / g).mean(),
            "sq_rel": ((q - g) ** 2 / g).mean(),
            "log_rmse": np.sqrt(np.mean(np.log(least / g) ** 2)),
            "pixels": valid.sum(),
            **{f"delta{k}": np.mean(np.maximum(least / g, g / least) < 1.25**k) for k in (1, 2, 3)},
        }
        assert scores == pytest.approx(want)


def test_the_two_conventions_of_depth_differ_where_a_prediction_is_negative() -> None:
    pred, target = torch.tensor([[[-1.0]]]), torch.tensor([[[2.0]]])
    pooled, libmtl = filled(DepthErrors(), (pred, target)), filled(DepthErrors(convention="libmtl"), (pred, target))
    assert pooled["abs_err"] == pytest.approx(2) and libmtl["abs_err"] == pytest.approx(3)
    assert pooled["delta3"] == libmtl["delta3"] == 0  # max(-1/2, -2) < 1.25 would accept it
    assert pooled["log_rmse"] == libmtl["log_rmse"] == pytest.approx(math.log(2 / 1e-9))


def test_sums_of_depth_do_not_lose_small_errors() -> None:
    # fp32 cannot represent 2^24 + 1: a sum in fp32 would not increase.
    metric = DepthErrors()
    metric.update(torch.full((1, 1, 1), 4097.0), torch.ones(1, 1, 1))
    for _ in range(3):
        metric.update(torch.full((1, 1, 1), 2.0), torch.ones(1, 1, 1))
    assert metric.compute()["rmse"] == math.sqrt((2**24 + 3) / 4)


# Normals ---------------------------------------------------------------------------------------------------------------------


def tilted(degrees: list[float], length: float = 1.0) -> Tensor:
    """Return vectors (1, 3, 1, n) rotated from z towards x."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return length * torch.stack([angle.sin(), torch.zeros_like(angle), angle.cos()])[None, :, None]


def test_angles_by_hand_whatever_the_lengths() -> None:
    turns = [0.0, 10.0, 20.0, 25.0, 45.0, 180.0]
    scores = filled(NormalErrors(), (tilted(turns, 3.0), tilted([0.0] * 6, 0.5)))
    assert scores["mean"] == pytest.approx(280 / 6) and scores["median"] == pytest.approx(22.5, abs=5e-4)
    assert scores["rmse"] == pytest.approx(math.sqrt((100 + 400 + 625 + 2025 + 32400) / 6))
    assert [scores[f"within_{limit}"] for limit in ("11.25", "22.5", "30")] == [2 / 6, 3 / 6, 4 / 6]


def test_identical_vectors_and_tiny_angles() -> None:
    normal = torch.from_numpy(rng(7).standard_normal((2, 3, 4, 5))).float()
    same = filled(NormalErrors(), (normal, normal.clone()))
    assert same["mean"] == same["median"] == same["rmse"] == 0 and same["within_11.25"] == 1
    tiny = filled(NormalErrors(), (tilted([1e-7]), tilted([0.0])))
    assert tiny["mean"] == pytest.approx(1e-7, rel=1e-6)  # arccos gives 0 here


def test_normals_against_numpy_and_the_conventions_of_validity() -> None:
    pred, target = rng(8).standard_normal((3, 3, 16, 20)), rng(9).standard_normal((3, 3, 16, 20))
    mark, mask = rng(10).random((3, 16, 20)), rng(11).random((3, 16, 20)) < 0.8
    target = np.where((mark < 0.2)[:, None], 255.0, target)
    target = np.where(((mark > 0.2) & (mark < 0.3))[:, None], 0.0, target)
    target[:, :, 0, 0] = (1, -1, 0)  # a direction whose components sum to 0
    void = (target == 255).all(1)
    arguments = (torch.from_numpy(pred), torch.from_numpy(target), torch.from_numpy(mask)[:, None])
    for convention, valid in (("pooled", (target != 0).any(1) & ~void), ("libmtl", target.sum(1) != 0)):
        valid = valid & mask
        p, g = (np.moveaxis(values, 1, -1)[valid] for values in (pred, target))
        cosine = (p * g).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(g, axis=1)
        degrees = np.degrees(np.arccos(cosine.clip(-1, 1)))
        scores = filled(NormalErrors(convention=convention), arguments)
        assert scores["pixels"] == valid.sum() and scores["mean"] == pytest.approx(degrees.mean())
        assert abs(scores["median"] - np.median(degrees)) <= 5.1e-4
        assert scores["within_30"] == pytest.approx((degrees < 30).mean())


def test_a_zero_prediction_is_at_90_degrees_and_a_zero_target_is_no_pixel() -> None:
    zero, up = torch.zeros(1, 3, 1, 1), tilted([0.0])
    assert filled(NormalErrors(), (zero, up))["mean"] == pytest.approx(90)
    metric = NormalErrors()
    metric.update(up, zero, torch.ones(1, 1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="no valid pixel was counted"):
        metric.compute()


# All of them -----------------------------------------------------------------------------------------------------------------


def samples(number: int, seed: int) -> dict[str, tuple[Callable[[], Metric], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(seed)

    def map_of(*shape: int) -> Tensor:
        return torch.rand(number, *shape, generator=generator)

    labels = torch.randint(0, 4, (number, 12, 10), generator=generator)
    return {
        "MeanIoU": (lambda: MeanIoU(4), (map_of(4, 12, 10), labels)),
        "DepthErrors": (DepthErrors, (map_of(1, 12, 10), map_of(1, 12, 10) + 0.1, map_of(1, 12, 10) < 0.6)),
        "NormalErrors": (NormalErrors, (map_of(3, 12, 10), map_of(3, 12, 10), map_of(12, 10) < 0.6)),
        "MaxF": (lambda: MaxF(thresholds=20), (map_of(2, 12, 10), labels.clamp_max(1))),
        "BoundaryF": (lambda: BoundaryF(max_dist=0.1), (8 * map_of(1, 12, 10) - 4, (labels == 0).float())),
        "Accuracy": (lambda: Accuracy(4), (map_of(4), labels[:, 0, 0])),
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # torchmetrics warns when there was no update
@pytest.mark.parametrize("name", ["MeanIoU", "DepthErrors", "NormalErrors", "MaxF", "BoundaryF", "Accuracy"])
def test_processes_add_up_batches_do_not_matter_and_reset_forgets(name: str) -> None:
    make, batch = samples(5, seed=12)[name]
    whole = make()
    once = filled(whole, batch)
    # Two processes with 2 and 3 images: gathering returns each state of both.
    first, second = make(), make()
    first.update(*(values[:2] for values in batch))
    for image in range(2, 5):
        second.update(*(values[image : image + 1] for values in batch))
    states = {id(getattr(first, state)): getattr(second, state) for state in first._reductions}
    first.dist_sync_fn, first.distributed_available_fn = lambda state, group: [state, states[id(state)]], lambda: True
    merged = first.compute()
    assert merged.keys() == once.keys() and all(
        merged[key] == pytest.approx(once[key], rel=1e-12) for key in once if key != "confusion"
    )
    whole.reset()
    with pytest.raises(UserError, match=f"^{name}: no .* was counted"):
        whole.compute()
    assert filled(whole, batch) == once


@pytest.mark.parametrize("name", ["MeanIoU", "DepthErrors", "NormalErrors", "MaxF", "BoundaryF"])
def test_sizes_that_differ_are_named_with_what_to_do(name: str) -> None:
    make, (pred, target, *_) = samples(2, seed=13)[name]
    with pytest.raises(UserError, match=r"prediction is 6 x 5 pixels, the .* 12 x 10; resize the prediction"):
        make().update(pred[..., :6, :5], target)
    with pytest.raises(UserError, match="1 predictions, but 2 of"):
        make().update(pred[:1], target)
    broken = pred.clone()
    broken[1, 0] = math.nan
    with pytest.raises(UserError, match=r"NaN.*diverged"):
        make().update(broken, target)


ONE = torch.ones(1, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanIoU(1), "at least 2"),
        (lambda: MeanIoU(3, absent="zeros"), r"absent 'zeros'\. Near: 'zero'"),
        (
            lambda: MeanIoU(3).update(torch.rand(1, 2, 2, 2), ONE.long()),
            r"logits \(b, 3, h, w\), these are \(1, 2, 2, 2\)",
        ),
        (lambda: MeanIoU(3).update(ONE.long(), ONE), "integer labels, is torch.float32"),
        (lambda: MeanIoU(3).update(ONE.long(), 3 * ONE.long()), "label 3; classes are 0 to 2; ignore_index is 255"),
        (lambda: MeanIoU(3).update(-ONE.long(), ONE.long()), "predicted class -1; classes are"),
        (lambda: MeanIoU(3).update(ONE.long(), torch.ones(2, 2, dtype=torch.long)), r"target must be .* is \(2, 2\)"),
        (lambda: DepthErrors(valid_range=(3, 1)), r"valid_range \(3, 1\) is empty"),
        (lambda: DepthErrors(convention="libmlt"), "Near: 'libmtl'"),
        (lambda: DepthErrors(ignore=None).update(ONE, 0 * ONE), "valid target is 0, but depths are positive"),
        (lambda: DepthErrors().update(ONE, ONE, ONE), "mask must be bool, .* it is torch.float32"),
        (lambda: DepthErrors().update(ONE, ONE, torch.ones(1, 3, 3, dtype=torch.bool)), "3 x 3"),
        (lambda: DepthErrors().update(math.inf * ONE, ONE), "4 predicted values are NaN or infinite"),
        (lambda: NormalErrors(convention="lib"), r"convention 'lib'\."),
        (lambda: NormalErrors().update(ONE[:, None], torch.ones(1, 3, 2, 2)), r"prediction must be \(b, 3, h, w\)"),
        (lambda: delta_m({}, {}, {}), "no task"),
        (lambda: delta_m({"a": 1}, {"a": 1, "b": 1}, {"a": False}), "'b' is missing from scores"),
        (lambda: delta_m({"a": 1}, {"a": 1}, {}), "'a' is missing from lower_is_better"),
        (lambda: delta_m({"a": 1}, {"a": 0}, {"a": False}), "baseline of 'a' is 0; .* positive"),
        (lambda: delta_m({"a": math.nan}, {"a": 1}, {"a": False}), "both must be finite"),
    ],
)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_delta_m_of_table_3() -> None:
    lower = {"semseg": False, "depth": True, "normals": True, "edge": False}
    taskprompter = {"semseg": 50.40, "depth": 0.5402, "normals": 18.91, "edge": 77.60}
    emtal = {"semseg": 52.90, "depth": 0.5284, "normals": 18.95, "edge": 77.10}
    # (+4.96 + 2.18 - 0.21 - 0.64) / 4
    assert round(delta_m(emtal, taskprompter, lower), 2) == 1.57
    assert delta_m(taskprompter, taskprompter, lower) == 0
