"""Losses over classes of unequal frequency: class weights, Dice, and logits without the frequencies.

    l = -w_y log p_y,     p = softmax(z),     pi_c = n_c / N

n_c of the N training labels (pixels or images) have class c. Weights are scaled to sum_c pi_c w_c = 1, so that the loss has the
scale of the plain cross-entropy for any classes. The mean divides by the number of labels, not by the sum of the weights.

class_weights   w_c before scaling null            1 sqrt            n_c^(-1/2)                     square-root balancing
(Mahajan et al., arXiv 1805.00932, by sampling) inverse         1 / n_c effective       (1 - beta) / (1 - beta^n_c)    Cui et
al., arXiv 1901.05555; there beta = (M - 1) / M is chosen by hand, here M is
                                               the mean of the n_c, so that equal images at two resolutions have equal weights

With label smoothing, log p_y becomes sum_c q_c log p_c, and w is still w_y. `adjusted` is post-hoc logit adjustment (Menon et
al., arXiv 2007.07314): the answer is the argmax of z - tau log pi.

    Dice = 1 - mean_c 2 sum_i p_ic [y_i = c] / (sum_i p_ic + sum_i [y_i = c])     over classes with a label in the batch

p = softmax(z), sums over the valid pixels of the batch. This is Sudre et al., arXiv 1707.03237, with equal weights. V-Net
(Milletari et al., arXiv 1606.04797) has squares in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError, near, shown_value

CLASS_WEIGHTS = ("sqrt", "inverse", "effective")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassLoss:
    """Options of a loss over k classes, and the loss itself.

    Args:
        class_weights: None, "sqrt", "inverse" or "effective".
        class_counts: Numbers n_c of training labels of each class. If they are None, a job counts them.
    """

    class_weights: str | None = None
    class_counts: Sequence[int] | None = None

    @property
    def needs_counts(self) -> bool:
        """Whether the loss depends on counts that are not given."""
        return self.class_counts is None and self.class_weights is not None

    def check_options(self, where: str, classes: int) -> None:
        """Raise UserError for values out of range and counts that do not fit `classes`."""
        if self.class_weights is not None and self.class_weights not in CLASS_WEIGHTS:
            hint = near(str(self.class_weights), CLASS_WEIGHTS)
            raise UserError(f"{where}: class_weights '{self.class_weights}'; null for none.{hint}")
        if self.class_counts is not None:
            check_counts(where, self.class_counts, classes)

    @cached_property
    def weights(self) -> Tensor | None:
        """Weights w_c, float32 (k,). None without class weights."""
        if self.class_weights is None:
            return None
        if self.class_counts is None:
            raise UserError("class_weights need class_counts, the number of training labels of each class.")
        counts = torch.as_tensor(self.class_counts, dtype=torch.float64)
        if self.class_weights == "effective":
            weights = 1 / -torch.expm1(counts * torch.log1p(-1 / counts.mean().clamp_min(2)))  # times a constant
        else:
            weights = counts ** {"sqrt": -0.5, "inverse": -1.0}[self.class_weights]
        return (weights * counts.sum() / (weights * counts).sum()).float()

    def entropies(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss l of each label (n,).

        Args:
            logits: Logits, float (n, k).
            labels: Labels, int64 (n,).
            label_smoothing: Share of the label that is spread over all classes, in [0, 1).

        Raises:
            UserError: If the counts that the options need are missing.
        """
        losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        return losses if self.weights is None else losses * self.weights.to(losses)[labels]


def adjusted(logits: Tensor, counts: Sequence[int] | Tensor, tau: float) -> Tensor:
    """Return z - tau log pi of logits (b, k, ...) and counts n_c > 0."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    shift = tau * (counts / counts.sum()).log().float().to(logits)
    return logits - shift.reshape(-1, *[1] * (logits.ndim - 2))


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return Dice, a scalar, of logits (n, k) and labels int64 (n,), n > 0."""
    shares = logits.softmax(1)
    truth = F.one_hot(labels, logits.shape[1]).to(shares)  # a scatter would add in undefined order on a GPU
    true = truth.sum(0)
    overlap = 2 * (shares * truth).sum(0) / (shares.sum(0) + true)
    return 1 - overlap[true > 0].mean()


def check_loss_factor(where: str, option: str, value: object) -> None:
    """Raise UserError unless `value` is a number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where}: {option} {shown_value(value)}; it must be a number, 0 or more.")


def check_counts(where: str, counts: Sequence[int], classes: int) -> None:
    """Raise UserError unless `counts` has a whole number above 0 for each class."""
    if isinstance(counts, str) or not isinstance(counts, Sequence) or len(counts) != classes:
        raise UserError(
            f"{where}: class_counts {shown_value(counts)}; give the number of training labels of each of {classes} classes."
        )
    bad = next((c for c, n in enumerate(counts) if isinstance(n, bool) or not isinstance(n, int) or n < 1), None)
    if bad is not None:
        raise UserError(
            f"{where}: class {bad} has {shown_value(counts[bad])} training labels; class_weights need at least one "
            "of every class. Train on images that have the class, or leave them out."
        )
