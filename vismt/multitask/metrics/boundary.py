"""F-measure of boundaries at the best threshold of the data set (odsF).

For each threshold the probability map is binarised and thinned, its pixels are matched one to one with true boundary pixels
at most max_dist x image diagonal away, and counts are added over all images:

    P = matched / predicted,   R = matched / true,   F = 2 P R / (P + R),   ods_f = max over thresholds of F

The protocol of Martin et al. (IEEE PAMI 26(5), 2004) as in SEISM (Pont-Tuset and Marques, CVPR 2013), which multi-task papers
use: positive where probability > threshold, 99 thresholds k / 100, thinning until convergence, unmodified targets. max_dist is
0.0075 for PASCAL and 0.011 for NYUD. An F of pixels that must coincide is not odsF.

Differences from SEISM's Matlab code. Its correspondPixels computes a matching of least total distance, with a cost of unmatched
pixels above any distance and some randomness in sparse graphs; the counts depend only on the number of matched pixels, which
is the largest possible here. One annotation per image. Probabilities are not rounded to 8 bits. Piotr Dollar's edgesEvalDir
interpolates F between thresholds; here and in SEISM it is the maximum over them. Non-maximum suppression along the
gradient is left out, as in SEISM.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from vismt.base.errors import UserError
from vismt.data.maps.edge_thinning import thin
from vismt.multitask.metrics.inputs import (
    binary,
    check_choice,
    check_same_size,
    check_thresholds,
    probability,
    require_any,
)
from vismt.multitask.metrics.matching import matching_sizes
from vismt.multitask.metrics.saliency import SCORES, curves


class BoundaryF(Metric):
    """odsF, and oisF with the best threshold of each image.

    Args:
        max_dist: largest distance of matched pixels, a fraction of the image diagonal.
        thresholds: number of thresholds n, k / (n + 1) for k = 1..n.
        thinning: False for predictions that are thin already.
        scores: kind of the predictions, "logits" or "probabilities".
        ignore_index: label of ignored pixels, None for no such label.
        options: options of torchmetrics.Metric.
    """

    full_state_update, higher_is_better, is_differentiable = False, True, False
    matched: Tensor  # (n,) by threshold
    predicted: Tensor
    true: Tensor
    best: Tensor  # matched, predicted at the best threshold of each image
    images: Tensor

    def __init__(
        self,
        *,
        max_dist: float = 0.0075,
        thresholds: int = 99,
        thinning: bool = True,
        scores: str = "logits",
        ignore_index: int | None = 255,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= max_dist < 1:
            raise UserError(
                f"BoundaryF: max_dist = {max_dist}; it must be a fraction of the diagonal, 0.0075 for PASCAL, 0.011 for NYUD."
            )
        self.thresholds = check_thresholds("BoundaryF", thresholds)
        self.max_dist, self.thinning, self.ignore_index = max_dist, thinning, ignore_index
        self.scores = check_choice("BoundaryF", "scores", scores, SCORES)
        shapes: dict[str, tuple[int, ...]] = {
            "matched": (thresholds,),
            "predicted": (thresholds,),
            "true": (),
            "best": (2,),
            "images": (),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch; computed on the CPU.

        An image without a true boundary counts by its false positives.

        Args:
            pred: float (b, 1, h, w) or (b, h, w), or (b, 2, h, w) with boundaries last.
            target: 1 on boundaries, otherwise 0 or ignore_index; bool, int or float (b, h, w) or (b, 1, h, w). Ignored pixels
                hold neither predictions nor true boundaries.

        Raises:
            UserError: for different sizes, other targets, NaN, and predictions that are not floats or not `scores`.
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
            "ods_f" in [0, 1], with "precision" and "recall" at the best "threshold", the lowest of equally good ones; "ois_f";
            the numbers of "images" and of "pixels" of true boundaries.

        Raises:
            UserError: without a true boundary pixel, because recall would be 0 / 0.
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
        """Return matched and predicted pixels, int64 (n,), by threshold. levels: (h, w), thresholds below each pixel."""
        levels = levels.astype(np.min_scalar_type(self.thresholds + 1))  # small integers compare faster
        # Maps differ only at levels that occur.
        steps = np.flatnonzero(np.bincount(levels.ravel())[1:]) + 1
        # The last map is empty, of thresholds above all pixels.
        maps = levels[None] >= np.append(steps, self.thresholds + 1).astype(levels.dtype)[:, None, None]
        if self.thinning:
            maps = thin(maps)
        predicted = np.array([np.count_nonzero(chosen) for chosen in maps])
        matched = matching_sizes(truth, maps, self.max_dist * math.hypot(*truth.shape))
        which = np.searchsorted(steps, np.arange(self.thresholds), side="right")
        return matched[which], predicted[which]
