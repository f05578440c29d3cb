"""The loss over the union with a Bayesian last layer: VBLL's bound, with smoothed labels (vismt/uncertainty/vbll.py).

    -bound = -sum_c t_c m_c + logsumexp_c(m_c + v_c / 2) = CE(m + v / 2, t) + sum_c t_c v_c / 2
    loss   = mean_b -bound + (KL - log prior of the noise) / N            t: labels, smoothed; N training images of all tasks

m, v: mean and variance of the logits of an image. E log softmax_c(z) >= m_c - logsumexp(m + v / 2) holds for each class, so it
holds for the average that smoothed labels take. Every image of a batch carries the whole second term, so that a balancer gets it
in the loss of each task.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.union import UnionObjective
from vismt.uncertainty.vbll import VBLLClassifier


class VariationalUnionObjective(UnionObjective):
    """`UnionObjective` for a net with `features(images)` and a VBLLClassifier `head`; "ce" is the whole loss.

    Raises UserError for separate heads and losses of unequal classes, which have no bound.
    """

    def __init__(self, net: Any, *args: Any, **options: Any) -> None:
        super().__init__(net, *args, **options)
        if not isinstance(net.head, VBLLClassifier):
            raise UserError(f"head: {type(net.head).__name__} has no bound to train on; give the net a VBLLClassifier.")
        check_bound(self.head, self.class_loss.class_weights, self.class_loss.logit_adjustment, self.class_loss.focal)

    def outputs(self, images: Tensor, labels: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head = self.net.head
        mean, variance = head.logit_distribution(self.net.features(images))
        share = self.label_smoothing
        noise = (1 - share) * variance.gather(1, labels[:, None]).squeeze(1) + share * variance.mean(1)
        penalty = (head.kl() - head.noise_log_prior()) / head.num_train
        losses = self.class_loss.entropies(mean + variance / 2, labels, share) + noise / 2 + penalty
        return mean, losses, mean.argmax(1) == labels


def check_bound(labels: str, class_weights: str | None, logit_adjustment: float, focal: float) -> None:
    """Raise UserError for separate heads and for losses that a variational bound does not cover."""
    if labels != "union":
        raise UserError(f"head: vbll with labels '{labels}'; its bound is over all classes: set labels to union.")
    if class_weights is not None or logit_adjustment or focal:
        raise UserError(
            "head: vbll is trained on a bound of the cross-entropy; leave class_weights, logit_adjustment and focal out."
        )
