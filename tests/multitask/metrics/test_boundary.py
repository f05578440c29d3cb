"""odsF and maxF: matching compared with brute force and maximum flow, counts by hand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.blobs import blobs
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from scipy.special import logit

from vismt.base.errors import UserError
from vismt.data.maps.derived_maps import edges_from_depth, edges_from_labels
from vismt.data.maps.edge_thinning import thin
from vismt.multitask.metrics import BoundaryF, MaxF
from vismt.multitask.metrics.boundary import matching_sizes


def tensors(*maps: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(values))[None] for values in maps)


# Matching --------------------------------------------------------------------------------------------------------------------


def brute_force(truth: np.ndarray, chosen: np.ndarray, radius: float) -> int:
    """Try every candidate for every true pixel."""
    true, candidates = np.argwhere(truth), [tuple(pixel) for pixel in np.argwhere(chosen)]

    def best(number: int, taken: frozenset) -> int:
        if number == len(true):
            return 0
        most = best(number + 1, taken)
        for pixel in candidates:
            if pixel not in taken and math.dist(pixel, true[number]) <= radius:
                most = max(most, 1 + best(number + 1, taken | {pixel}))
        return most

    return best(0, frozenset())


def by_flow(truth: np.ndarray, chosen: np.ndarray, radius: float) -> int:
    true, candidates = np.argwhere(truth), np.argwhere(chosen)
    near = np.argwhere(((true[:, None] - candidates[None]) ** 2).sum(-1) <= radius**2)
    source, sink = len(true) + len(candidates), len(true) + len(candidates) + 1
    starts = np.concatenate([np.full(len(true), source), near[:, 0], len(true) + np.arange(len(candidates))])
    ends = np.concatenate([np.arange(len(true)), len(true) + near[:, 1], np.full(len(candidates), sink)])
    graph = csr_matrix((np.ones(len(starts), dtype=np.int32), (starts, ends)), shape=(sink + 1, sink + 1))
    return maximum_flow(graph, source, sink).flow_value


def test_matching_is_the_largest_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        truth, chosen = rng.random((2, 4, 5)) < (0.3, 0.5)[trial % 2]
        if truth.sum() > 7:
            continue
        radius = (0.0, 1.0, 1.5, 2.0)[trial % 4]
        assert matching_sizes(truth, chosen[None], radius) == brute_force(truth, chosen, radius)


@pytest.mark.parametrize("radius", [1.0, 2.3, 4.4])
def test_matching_of_many_maps_of_one_image_by_flow(radius: float) -> None:
    # Each matching starts from the one before; lines and dense maps need long augmenting paths.
    truth = thin(np.abs(blobs(60, 70, 3, 1) - 0.5) < 0.03)
    maps = [thin(blobs(60, 70, 2, 2) > level) for level in (0.2, 0.4, 0.45, 0.5, 0.7)]
    maps += [np.random.default_rng(3).random((60, 70)) < share for share in (0.05, 0.3)]
    maps.append(maps[0])
    sizes = matching_sizes(truth, np.stack(maps), radius).tolist()
    assert sizes == [by_flow(truth, chosen, radius) for chosen in maps] and len(set(sizes)) > 3


def test_greedy_and_many_to_one_matching_would_give_other_numbers() -> None:
    # Truth at columns 1 and 2, predictions at 2 and 3, radius 1. Nearest first pairs 2 with 2 and leaves 1 and 3; the largest
    # pairs 1 with 2 and 2 with 3.
    truth, chosen = np.zeros((2, 1, 5), dtype=bool)
    truth[0, [1, 2]], chosen[0, [2, 3]] = True, True
    assert matching_sizes(truth, chosen[None], 1.0) == 2
    # Two parallel lines around a true one: each of their pixels is near a true pixel, but only half can be matched.
    truth, lines = np.zeros((2, 5, 8), dtype=bool)
    truth[2], lines[1], lines[3] = True, True, True
    assert (lines & binary_dilation(truth)).sum() == 16 and matching_sizes(truth, lines[None], 1.0) == 8
    # so P = 8 / 16, R = 8 / 8, F = 2/3; dilation would say P = R = F = 1. The diagonal is 9.43, times 0.11 is 1.04.
    metric = BoundaryF(max_dist=0.11, scores="probabilities")
    metric.update(*tensors(lines.astype(float), truth))
    assert metric.compute()["ods_f"] == pytest.approx(2 / 3)


# odsF ------------------------------------------------------------------------------------------------------------------------


def test_counts_are_added_over_images_per_threshold() -> None:
    # Columns of 4 pixels, thin already, matched at distance 0. Image 1: truth at columns 0 and 4 with 0.8 and 0.7, a false one
    # at 2 with 0.5. Image 2: truth at column 2 with 0.3.
    probability, truth = np.zeros((2, 4, 6)), np.zeros((2, 4, 6), dtype=np.uint8)
    for image, column, value in ((0, 0, 0.8), (0, 4, 0.7), (0, 2, 0.5), (1, 2, 0.3)):
        probability[image, :, column], truth[image, :, column] = value, value != 0.5
    metric = BoundaryF(max_dist=0, thinning=False, scores="probabilities")
    metric.update(torch.from_numpy(probability), torch.from_numpy(truth))
    scores = metric.compute()
    # t < .3: 12 matched of 16 predicted and 12 true, F = 24/28 (the images' own F, 16/20 and 1, have mean 0.9);
    # t < .5: 8 of 12, F = 16/24; t < .7: 8 of 8, F = 16/20; t < .8: 4 of 4, F = 8/16.
    assert scores["ods_f"] == pytest.approx(24 / 28) and scores["threshold"] == pytest.approx(0.01)
    assert scores["precision"] == pytest.approx(12 / 16) and scores["recall"] == 1
    # Image 1 is best at .5 (8 of 8), image 2 below .3 (4 of 4).
    assert scores["ois_f"] == 1 and (scores["images"], scores["pixels"]) == (2, 12)
    # The single threshold is 1/2, which 0.5 does not exceed.
    single = BoundaryF(max_dist=0, thinning=False, scores="probabilities", thresholds=1)
    single.update(torch.from_numpy(probability), torch.from_numpy(truth))
    assert single.compute()["ods_f"] == pytest.approx(16 / 20)


def test_ods_f_against_a_slow_reference() -> None:
    skimage = pytest.importorskip("skimage.morphology")
    truth = [thin(np.abs(blobs(30, 26, 2, seed) - 0.5) < 0.05) for seed in range(2)]
    scores = [
        2 * gaussian_filter(edges.astype(float), 1.2) + 0.4 * blobs(30, 26, 1, 9 + n) for n, edges in enumerate(truth)
    ]
    scores = [score.clip(0, 1) for score in scores]
    ignored = np.zeros((30, 26), dtype=bool)
    ignored[:, :5] = True
    radius = 0.05 * math.hypot(30, 26)
    curves = np.zeros((2, 99, 3))  # matched, predicted, true
    for image, (edges, score) in enumerate(zip(truth, scores)):
        for k in range(99):
            binary = skimage.thin((score > (k + 1) / 100) & ~ignored)
            curves[image, k] = by_flow(edges & ~ignored, binary, radius), binary.sum(), (edges & ~ignored).sum()

    def f(counts: np.ndarray) -> np.ndarray:
        """2PR / (P + R)."""
        return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2])

    per_image = curves[np.arange(2), f(curves).argmax(1)].sum(0)
    most = f(curves.sum(0))
    for kind in ("probabilities", "logits"):
        metric = BoundaryF(max_dist=0.05, scores=kind)
        for edges, score in zip(truth, scores):
            target = np.where(ignored, 255, edges)
            metric.update(*tensors(score if kind == "probabilities" else logit(score.clip(1e-9, 1 - 1e-9)), target))
        computed = metric.compute()
        assert computed["ods_f"] == pytest.approx(most.max()) and computed["ois_f"] == pytest.approx(f(per_image))
        assert computed["threshold"] == pytest.approx((most.argmax() + 1) / 100) and 0.3 < computed["ods_f"] < 0.99
    pixelwise = BoundaryF(max_dist=0, scores="probabilities")
    for edges, score in zip(truth, scores):
        pixelwise.update(*tensors(score, np.where(ignored, 255, edges)))
    assert pixelwise.compute()["ods_f"] < computed["ods_f"] - 0.01


def disk(height: int, width: int) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return np.hypot(rows - height / 2, columns - width / 3) < height / 3


def unlabelled(labels: np.ndarray) -> np.ndarray:
    """Set a slanted band and a corner to the ignore label, as between the objects of a scene."""
    rows, columns = np.indices(labels.shape)
    return np.where((abs(rows + columns // 3 - 40) < 3) | (rows + columns > 130), 255, labels)


def slanted_step(height: int, width: int) -> np.ndarray:
    """Return depths of two planes with a slanted step between them, without values in a square on the step."""
    rows, columns = np.indices((height, width))
    depth = np.where(3 * rows + 7 * columns < 400, 2.0, 3.0) + rows / 1000
    depth[20:26, 40:46] = 0
    return depth


@pytest.mark.parametrize(("derive", "source"), [
    (edges_from_labels, disk(70, 90).astype(np.int64)),
    (edges_from_labels, (6 * blobs(70, 90, 4, 3)).astype(np.int64)),
    (edges_from_labels, (4 * blobs(70, 90, 1, 5)).astype(np.int64)),
    (edges_from_labels, unlabelled(disk(70, 90).astype(np.int64))),
    (edges_from_labels, unlabelled((6 * blobs(70, 90, 4, 3)).astype(np.int64))),
    (edges_from_depth, slanted_step(70, 90)),
    (edges_from_depth, 2 + 2 * (blobs(70, 90, 5, 7) > 0.5)),
])  # fmt: skip
def test_the_derived_target_as_prediction_is_perfect(derive: Callable, source: np.ndarray) -> None:
    edge = derive(torch.from_numpy(source))[None]
    metric = BoundaryF(thresholds=1, scores="probabilities")
    metric.update((edge == 1).to(torch.float32), edge)
    scores = metric.compute()
    assert scores["ods_f"] == 1.0 and scores["pixels"] == int((edge == 1).sum()) > 50


def test_an_image_without_boundaries_costs_precision_and_two_channels_are_a_softmax() -> None:
    score, truth = np.zeros((4, 6)), np.zeros((4, 6))
    score[:, 1] = truth[:, 1] = 1
    alone, both = BoundaryF(scores="probabilities"), BoundaryF(scores="probabilities")
    alone.update(*tensors(score, truth))
    both.update(*tensors(score, truth))
    both.update(*tensors(score, np.zeros_like(truth)))
    assert alone.compute()["ods_f"] == 1 and both.compute()["precision"] == pytest.approx(1 / 2)
    logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 2, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    for make in (BoundaryF, MaxF):
        two_channels, one_channel = make(), make()
        two_channels.update(logits, target)
        one_channel.update(logits[:, 1] - logits[:, 0], target)
        assert two_channels.compute() == one_channel.compute()


def test_an_image_of_240x320_takes_about_a_second() -> None:
    truth = thin(np.abs(blobs(240, 320, 8, 4) - 0.5) < 0.02)
    score = (gaussian_filter(truth.astype(float), 2) * 4 + 0.2 * blobs(240, 320, 1, 5)).clip(0, 1)
    metric, start = BoundaryF(max_dist=0.011, scores="probabilities"), time.process_time()
    metric.update(*tensors(score, truth))
    assert time.process_time() - start < 5 and metric.compute()["ods_f"] > 0.9


# maxF ------------------------------------------------------------------------------------------------------------------------


def test_max_f_by_hand() -> None:
    # thresholds 1/4, 1/2, 3/4; at a threshold counts as positive. The last pixel is ignored.
    metric = MaxF(thresholds=3, scores="probabilities")
    metric.update(torch.tensor([[[0.5, 0.8, 0.25, 0.1, 0.9]]]), torch.tensor([[[1, 0, 1, 0, 255]]]))
    # t=1/4: TP 2 of 3, R 1: 1.3 (2/3) / (0.3 (2/3) + 1); t=1/2: P 1/2, R 1/2: 1/2; t=3/4: 0
    scores = metric.compute()
    assert scores["max_f"] == pytest.approx(1.3 * (2 / 3) / (0.2 + 1))
    assert scores["threshold"] == 0.25 and scores["pixels"] == 4
    assert (scores["precision"], scores["recall"]) == pytest.approx((2 / 3, 1))


@pytest.mark.parametrize("beta_squared", [0.3, 1.0])
def test_max_f_against_numpy_pools_over_images(beta_squared: float) -> None:
    rng = np.random.default_rng(6)
    target, score = rng.integers(0, 2, (4, 9, 8)), rng.random((4, 9, 8))
    score = 0.7 * score + 0.3 * target * np.array([1.0, 0.5, 0.9, 0.0])[:, None, None]
    target[rng.random(target.shape) < 0.2] = 255
    best = []
    for t in np.arange(1, 256) / 256:
        hit = (score >= t) & (target != 255)
        true = (hit & (target == 1)).sum()
        p, r = (true / hit.sum() if hit.any() else 0), true / (target == 1).sum()
        best.append((1 + beta_squared) * p * r / (beta_squared * p + r) if p + r else 0)
    metric = MaxF(beta_squared=beta_squared, scores="probabilities")
    metric.update(torch.from_numpy(score)[:, None], torch.from_numpy(target))
    assert metric.compute()["max_f"] == pytest.approx(max(best))
    assert metric.compute()["threshold"] == pytest.approx((np.argmax(best) + 1) / 256)


MAP = torch.full((1, 2, 2), 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BoundaryF(max_dist=4), "max_dist = 4; it must be a fraction of the diagonal"),
        (lambda: BoundaryF(thresholds=0), "thresholds = 0; it must be at least 1"),
        (lambda: BoundaryF(scores="logit"), "Near: 'logits'"),
        (lambda: BoundaryF(scores="probabilities").update(MAP, MAP * 0), r"range over \[2, 2\]; if they are logits"),
        (lambda: BoundaryF().update(MAP, MAP), "target holds 2; it must be 0 or 1, or ignore_index"),
        (lambda: BoundaryF().update(MAP.long(), MAP * 0), "thresholds need scores, not a map of torch.int64"),
        (lambda: BoundaryF().update(torch.ones(1, 3, 2, 2), MAP * 0), r"prediction must be .* is \(1, 3, 2, 2\)"),
        (lambda: MaxF(beta_squared=0), "it must be positive"),
        (lambda: MaxF(ignore_index=None).update(MAP, 255 * MAP.bool().byte()), "target holds 255"),
    ],
)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
