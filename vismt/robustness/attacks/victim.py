"""The model under attack: logits, gradients of a loss on them, and the checks that keep a broken model from looking robust.

The gradient of a loss is taken in two parts. The loss is differentiated by the logits in float64 and scaled for each image to a
largest entry of 1, and then propagated to the pixels. Small gradients are therefore not rounded to zero on the way. The scale
has no other effect, because attacks use only the direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.contexts import evaluating
from vismt.metatune.functional import answers
from vismt.robustness.attacks.losses import Loss

PROBABILITY_SLACK = 1e-4


class Victim:
    """A frozen model as a function of images and of the rows that they belong to.

    model: Module from images (b, 3, h, w) in [0, 1] to logits (b, num_classes). A model with `rows_of` (see
    `vismt.metatune.protocol.episode_runner.PackedClassifier`) classifies each image by the task of its row.
    """

    def __init__(self, model: nn.Module, num_classes: int, what: str) -> None:
        self.model, self.num_classes, self.what = model, num_classes, what
        self.has_gradient = False

    def logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return float32 logits (b, num_classes) of images (b, 3, h, w). rows: Numbers (b,) of the attacked images."""
        output = answers(self.model, images, rows)
        fits = isinstance(output, Tensor) and tuple(output.shape) == (len(images), self.num_classes)
        if not fits or not bool(output.isfinite().all()):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            finite = bool(output.isfinite().all()) if isinstance(output, Tensor) else False
            raise UserError(
                f"attack {self.what}: the model gives logits of shape {shape}, finite: {finite}; need finite "
                f"(b, {self.num_classes})."
            )
        return output.float()

    @torch.no_grad()
    def predictions(self, images: Tensor, rows: Tensor, batch: int) -> Tensor:
        """Return clean logits (b, num_classes), and refuse a model that returns probabilities."""
        parts = [self.logits(*pair) for pair in zip(images.split(batch), rows.split(batch), strict=True)]
        logits = torch.cat(parts)
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < PROBABILITY_SLACK).all()):
            raise UserError(
                f"attack {self.what}: the model returns probabilities (each row is positive and sums to 1); attacks need "
                "logits: leave the softmax out."
            )
        return logits

    def gradient(
        self, images: Tensor, rows: Tensor, labels: Tensor, targets: Tensor | None, loss: Loss
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (b, k), losses (b,) in float64 and their gradient (b, 3, h, w), scaled for each image.

        Raises UserError if no gradient reaches the images, or all of the first gradients are zero.
        """
        leaf = images.detach().requires_grad_(True)
        output = self.logits(leaf, rows)
        outer = output.detach().double().requires_grad_(True)
        values = loss(outer, labels, targets)
        (slope,) = torch.autograd.grad(values.sum(), outer)
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        gradient = None
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(output, leaf, slope.to(output.dtype), allow_unused=True)
        self._check_gradient(gradient)
        assert gradient is not None
        return output.detach(), values.detach(), gradient

    def _check_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None and not self.has_gradient:
            self.has_gradient = bool(gradient.any())
        if gradient is None or not self.has_gradient:
            seen = "has no gradient to its images" if gradient is None else "has gradients of zero on every image"
            raise UserError(
                f"attack {self.what}: the model {seen} (no_grad, rounding or an argmax inside?), so this attack cannot "
                "judge it; remove the cause, or take square, which needs no gradient."
            )
        if not bool(gradient.isfinite().all()):
            raise UserError(
                f"attack {self.what}: the model has gradients that are not finite; no accuracy is reported."
            )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode without trainable parameters, and restore every flag afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
