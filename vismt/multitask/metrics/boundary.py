"""F-measure of boundaries at the best threshold of the data set (odsF).

For each threshold the probability map is binarised and thinned, its pixels are matched one to one with true boundary pixels at
most max_dist x image diagonal away, and counts are added over all images:

    P = matched / predicted,   R = matched / true,   F = 2 P R / (P + R),   ods_f = max over thresholds of F

This is the protocol of Martin et al. (IEEE PAMI 26(5), 2004) as in SEISM (Pont-Tuset and Marques, CVPR 2013), which multi-task
papers use. A pixel is positive if probability > threshold. There are 99 thresholds k / 100, thinning runs until convergence,
and targets are not modified. max_dist is 0.0075 for PASCAL and 0.011 for NYUD. An F of pixels that must coincide is not odsF.

Differences from SEISM's Matlab code. Its correspondPixels computes a matching of least total distance, with a cost of unmatched
pixels above any distance and some randomness in sparse graphs. The counts depend only on the number of matched pixels, which is
the largest possible here. An image has one annotation. Probabilities are not rounded to 8 bits. Piotr Dollar's edgesEvalDir
interpolates F between thresholds. Here and in SEISM, F is the maximum over the thresholds. Non-maximum suppression along the
gradient is left out, as in SEISM.

The one-to-one matching is extended until it has no augmenting path, which proves that it is the largest (Berge). A
breadth-first search begins at a free pixel of one side. It passes to the pixels that hold a pixel of the other side within its
radius, until it finds a free pixel there. Pixels that a search without result has reached are on no path, and no later search
of the same map visits them. Searches start on the side with fewer free pixels. A map starts from the matching of the map
before, because maps of neighbouring thresholds differ little. scipy's maximum_bipartite_matching takes exponential time on
pixels along lines (scipy issue 26147, open at 1.17: no result within minutes on a map of 240 x 320), and its maximum_flow, the
reference of the tests, 0.1 to 0.4 s a map.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vismt.base.compiled import Compiled
from vismt.base.errors import UserError, require_known
from vismt.data.maps.edge_thinning import thin
from vismt.multitask.metrics.inputs import Sums, binary, check_same_size, check_thresholds, probability, require_any
from vismt.multitask.metrics.saliency import SCORES, curves

FREE, _ABSENT = -1, -2


class BoundaryF(Sums):
    """Scores odsF, and oisF with the best threshold of each image.

    Args:
        max_dist: Largest distance of matched pixels, as a fraction of the image diagonal.
        thresholds: Number n of thresholds, k / (n + 1) for k = 1..n.
        thinning: Whether predictions are thinned. False for predictions that are thin already.
        scores: Kind of the predictions, "logits" or "probabilities".
        ignore_index: Label of ignored pixels. None for no such label.
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = True
    matched: Tensor  # numbers (n,) by threshold
    predicted: Tensor
    true: Tensor
    best: Tensor  # numbers matched and predicted at the best threshold of each image
    images: Tensor

    def __init__(
        self,
        *,
        max_dist: float = 0.0075,
        thresholds: int = 99,
        thinning: bool = True,
        scores: str = "logits",
        ignore_index: int | None = 255,
        **options: object,
    ) -> None:
        super().__init__(**options)
        if not 0 <= max_dist < 1:
            raise UserError(
                f"BoundaryF: max_dist = {max_dist}; it must be a fraction of the diagonal, 0.0075 for PASCAL, 0.011 for NYUD."
            )
        self.thresholds = check_thresholds("BoundaryF", thresholds)
        self.max_dist, self.thinning, self.ignore_index = max_dist, thinning, ignore_index
        require_known("BoundaryF: scores", [scores], SCORES)
        self.scores = scores
        self.add_sums(matched=(thresholds,), predicted=(thresholds,), true=(), best=(2,), images=())

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. The counts are computed on the CPU.

        An image without a true boundary counts by its false positives.

        Args:
            pred: Predictions float (b, 1, h, w) or (b, h, w), or (b, 2, h, w) with boundaries last.
            target: Targets bool, int or float (b, h, w) or (b, 1, h, w): 1 on boundaries, otherwise 0 or ignore_index. Ignored
                pixels hold neither predictions nor true boundaries.

        Raises:
            UserError: If sizes differ, targets have other values, or predictions are NaN, not floats, or not `scores`.
        """
        probabilities = probability("BoundaryF", pred, self.scores).cpu()
        positive, valid = binary("BoundaryF", target.cpu(), self.ignore_index)
        check_same_size("BoundaryF", probabilities, positive)
        grid = torch.arange(1, self.thresholds + 1, dtype=torch.float64) / (self.thresholds + 1)
        exceeded = torch.bucketize(probabilities, grid) * valid
        for levels, truth in zip(exceeded.numpy(), positive.numpy()):
            matched, predicted = (torch.from_numpy(counts) for counts in self._counts(levels, truth))
            true = int(truth.sum())
            best = int(curves(matched, predicted, torch.tensor(true))[2].argmax())
            self.matched += matched.to(self.matched.device)
            self.predicted += predicted.to(self.predicted.device)
            self.best += torch.stack([matched[best], predicted[best]]).to(self.best.device)
            self.true += true
            self.images += 1

    def compute(self) -> dict[str, float]:
        """Return the scores.

        Returns:
            Numbers by name: "ods_f" in [0, 1], with "precision" and "recall" at the best "threshold" (the lowest of equally
            good ones), "ois_f", and the numbers of "images" and of "pixels" of true boundaries.

        Raises:
            UserError: If no pixel is a true boundary, because recall would be 0 / 0.
        """
        fix = f"give it data, check targets and ignore_index={self.ignore_index}"
        true = require_any("BoundaryF", self.true, "boundary pixel", fix)
        matched, predicted, total = self.matched.cpu(), self.predicted.cpu(), self.true.cpu()
        precision, recall, f = curves(matched, predicted, total)
        best = int(f.argmax())
        best_matched, best_predicted = self.best.cpu()
        ois_f = curves(best_matched, best_predicted, total)[2]
        return {
            "ods_f": float(f[best]),
            "threshold": (best + 1) / (self.thresholds + 1),
            "precision": float(precision[best]),
            "recall": float(recall[best]),
            "ois_f": float(ois_f),
            "images": int(self.images),
            "pixels": true,
        }

    def _counts(self, levels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return matched and predicted pixels, int64 (n,), by threshold.

        levels: Number of thresholds below each pixel, (h, w).
        """
        levels = levels.astype(np.min_scalar_type(self.thresholds + 1))  # small integers compare faster
        # Maps differ only at levels that occur.
        steps = np.flatnonzero(np.bincount(levels.ravel())[1:]) + 1
        # The last map is empty. It belongs to thresholds above all pixels.
        maps = levels[None] >= np.append(steps, self.thresholds + 1).astype(levels.dtype)[:, None, None]
        if self.thinning:
            maps = thin(maps)
        predicted = np.array([np.count_nonzero(chosen) for chosen in maps])
        matched = matching_sizes(truth, maps, self.max_dist * math.hypot(*truth.shape))
        which = np.searchsorted(steps, np.arange(self.thresholds), side="right")
        return matched[which], predicted[which]


def matching_sizes(truth: np.ndarray, maps: np.ndarray, radius: float) -> np.ndarray:
    """Return the size of the largest matching of each map with the truth, int64 (n,).

    Args:
        truth: True pixels, bool (h, w).
        maps: Candidates, bool (n, h, w).
        radius: Largest distance of matched pixels, in pixels.
    """
    reach = min(int(radius), max(truth.shape))
    span = np.arange(-reach, reach + 1)
    offsets = np.stack(np.meshgrid(span, span), -1).reshape(-1, 2)
    squared = (offsets**2).sum(1)
    # The nearest come first, so that a pixel takes the nearest free candidate.
    offsets = offsets[np.argsort(squared, kind="stable")][: (squared <= radius * radius).sum()]
    border = ((reach, reach), (reach, reach))  # no offset leaves the border
    steps = offsets[:, 0] * (truth.shape[1] + 2 * reach) + offsets[:, 1]
    true = np.flatnonzero(np.pad(truth, border))
    padded = np.pad(maps, ((0, 0), *border)).reshape(len(maps), -1)
    # For each place of one side, the place of its partner on the other side. FREE stands for no partner, _ABSENT for no
    # pixel on this side.
    candidate_of, true_of = np.full((2, padded.shape[1]), _ABSENT, dtype=np.int32)
    candidate_of[true] = FREE
    sizes, before = [], true[:0]
    for present in padded:
        true_of[before] = _ABSENT
        before = np.flatnonzero(present)
        true_of[before] = FREE
        held = candidate_of[true]
        candidate_of[true[(held >= 0) & ~present[held]]] = FREE
        matched = true[candidate_of[true] >= 0]
        true_of[candidate_of[matched]] = matched
        sides = [
            (candidate_of, true_of, true[candidate_of[true] < 0]),
            (true_of, candidate_of, before[true_of[before] < 0]),
        ]
        _extend(*min(sides, key=lambda side: len(side[2])), steps)
        sizes.append(np.count_nonzero(candidate_of[true] >= 0))
    return np.array(sizes, dtype=np.int64)


@Compiled
def _extend(partner: np.ndarray, other: np.ndarray, starts: np.ndarray, steps: np.ndarray) -> None:
    """Make a matching the largest, in place.

    partner, other: Partners int32 (places,) of the side of the free pixels `starts`, and of the other side. steps: Steps from a
    place to the places within the radius.
    """
    reached = np.zeros(len(partner), dtype=np.bool_)  # by this search, or by a search that found no path
    above, queue = np.empty_like(partner), np.empty_like(partner)  # above: the place from which a search came
    for start in starts:
        queue[0], above[start], reached[start] = start, -1, True
        head, tail, end = 0, 1, -1
        while head < tail and end < 0:
            place = queue[head]
            head += 1
            for step in steps:
                holder = other[place + step]
                if holder == FREE:
                    end = place + step
                    break
                if holder >= 0 and not reached[holder]:
                    above[holder], reached[holder], queue[tail] = place, True, holder
                    tail += 1
        if end >= 0:
            reached[queue[:tail]] = False
            while place >= 0:
                partner[place], end = end, partner[place]
                other[partner[place]] = place
                place = above[place]
