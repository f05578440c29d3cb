"""The best F-measure over thresholds, from counts pooled over the data set.

    F = (1 + beta^2) P R / (beta^2 P + R),   P = TP / predicted positives,   R = TP / positives,   maxF = max over thresholds

beta^2 = 0.3 (Achanta et al., CVPR 2009). Counts per threshold are added over all pixels, and P and R are computed once, as in
InvPT and TaskPrompter. Saliency benchmarks often average P and R over images instead, which is not offered. A pixel is positive
if probability >= threshold, with thresholds k / (n + 1) for k = 1..n. InvPT and TaskPrompter take 19 thresholds
(`thresholds=19`), and their code applies a second sigmoid to probabilities, after which few thresholds have an effect. The
saliency mIoU of Vandenhende et al. and MTLoRA is a different metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.multitask.metrics.inputs import Sums, binary, check_same_size, check_thresholds, probability, require_any

SCORES = ("logits", "probabilities")


class MaxF(Sums):
    """Score maxF of a binary map.

    Args:
        thresholds: Number n of thresholds.
        beta_squared: beta^2 of the F-measure, > 0.
        ignore_index: Label of ignored pixels. None for no such label.
        scores: Kind of the predictions, "logits" or "probabilities".
        options: Options of torchmetrics.Metric.
    """

    higher_is_better = True
    counts: Tensor  # (2, n + 1): negatives and positives by the number of thresholds that the probability reaches

    def __init__(
        self,
        *,
        thresholds: int = 255,
        beta_squared: float = 0.3,
        ignore_index: int | None = 255,
        scores: str = "logits",
        **options: object,
    ) -> None:
        super().__init__(**options)
        self.thresholds = check_thresholds("MaxF", thresholds)
        if not beta_squared > 0:
            raise UserError(f"MaxF: beta_squared = {beta_squared}; it must be positive.")
        self.beta_squared, self.ignore_index = beta_squared, ignore_index
        require_known("MaxF: scores", [scores], SCORES)
        self.scores = scores
        self.add_sums(counts=(2, thresholds + 1))

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. Images in which all pixels are ignored do not count.

        Args:
            pred: Scores float (b, 1, h, w) or (b, h, w), or (b, 2, h, w) of background and salient.
            target: Targets bool, int or float (b, h, w) or (b, 1, h, w): 0, 1 or ignore_index.

        Raises:
            UserError: If sizes differ, targets have other values, or predictions are NaN, not floats, or not `scores`.
        """
        values = probability("MaxF", pred, self.scores)
        positive, valid = binary("MaxF", target.to(values.device), self.ignore_index)
        check_same_size("MaxF", values, positive)
        grid = torch.arange(1, self.thresholds + 1, dtype=torch.float64, device=values.device) / (self.thresholds + 1)
        reached = torch.bucketize(values[valid], grid, right=True).cpu()
        key = reached + positive[valid].cpu() * (self.thresholds + 1)
        self.counts += key.bincount(minlength=self.counts.numel()).view_as(self.counts).to(self.counts.device)

    def compute(self) -> dict[str, float]:
        """Return the score.

        Returns:
            Numbers by name: "max_f" in [0, 1], with "precision" and "recall" at the best "threshold" (the lowest of equally
            good ones), and the number of valid "pixels".

        Raises:
            UserError: If no pixel is salient, because recall would be 0 / 0.
        """
        fix = f"give it data, check targets and ignore_index={self.ignore_index}"
        require_any("MaxF", self.counts[1].sum(), "salient pixel", fix)
        negatives, positives = self.counts.cpu().flip(1).cumsum(1).flip(1)[:, 1:]
        precision, recall, f = curves(positives, positives + negatives, self.counts[1].sum().cpu(), self.beta_squared)
        best = int(f.argmax())
        return {
            "max_f": float(f[best]),
            "threshold": (best + 1) / (self.thresholds + 1),
            "precision": float(precision[best]),
            "recall": float(recall[best]),
            "pixels": int(self.counts.sum()),
        }


def curves(
    true: Tensor, predicted: Tensor, positives: Tensor, beta_squared: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and F, fp64, from counts. A value of 0 / 0 is 0."""
    precision = (true / predicted.double()).nan_to_num(0.0)
    recall = (true / positives.double()).nan_to_num(0.0)
    f = (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)
    return precision, recall, f.nan_to_num(0.0)
