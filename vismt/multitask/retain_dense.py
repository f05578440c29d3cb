"""Quality retaining for semantic segmentation (EMTAL section 3.1; its code has none, so the details are ours).

    L_QR = mean over valid pixels p of KD_p / ema     KD_p as in retain.py, with the bank's logits of the class y(p)
    z_bc = mean of the detached logits over the pixels of class c in image b: the "sample" that the bank stores
    ema <- 0.95 ema + 0.05 mean over valid pixels of the cross-entropy of the batch; one task, one number

All at the resolution of the logits that come in, for which the labels are taken at the nearest pixel: handed a head's own
output this costs a sixteenth of what it costs at the labels' size, where the KD of p pixels takes several p x 2 x C maps.
Labels of 255 take part in nothing. An image moves a class once, however many pixels it has; of several images with one class the
last of the batch is stored, and the bank moves once. Depth, normals and other regression have no class and no such loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.errors import UserError
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.tasks.base import IGNORE


class DenseRetaining(QualityRetaining):
    """`loss(logits, target)`, then `update(logits, target)`, once each for every optimiser step.

    num_classes: C of the segmentation. options: QualityRetaining's. Buffers: bank (C, 2 or 1, C) and ema (1,), fp32.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, torch.zeros(num_classes, dtype=torch.int64), **options)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """L_QR, a scalar in at least fp32, or None when no pixel is valid; its gradient reaches `logits` alone.

        logits: (b, C, r, c), any floating dtype. target: int64 (b, h, w), 0 to C-1 or 255, of any size.
        Every process must call it, also without a valid pixel. Raises UserError for other shapes and dtypes, and on the CPU
        for a label out of range.
        """
        rows, labels, _ = self._pixels(logits, target)
        if not len(labels):
            self._next_ema(rows.float(), labels)  # the others wait for this process's share
            return None
        return super().loss(rows, labels)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take the batch into the bank and the running cross-entropy. Same arguments and errors as `loss`."""
        rows, labels, image = self._pixels(logits.detach(), target)
        self._check(rows, labels)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        ema = self._next_ema(rows, labels)
        super().update(*self._samples(rows, labels, image))
        self.ema.copy_(ema)  # of pixels, where the bank's update took that of the samples

    def _pixels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (p, C), labels (p,) and image (p,) of the valid pixels, image by image."""
        fits = (
            logits.ndim == 4 and target.ndim == 3 and len(logits) == len(target) and logits.shape[1] == self.num_classes
        )
        if not fits or target.dtype != torch.int64:
            raise UserError(
                f"quality retaining: logits {tuple(logits.shape)}, target {tuple(target.shape)} {target.dtype}; needed "
                f"(b, {self.num_classes}, r, c) and int64 (b, h, w) of the same images."
            )
        if target.shape[-2:] != logits.shape[-2:]:
            target = F.interpolate(target[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
        valid = target != IGNORE
        image = torch.arange(len(target), device=target.device)[:, None, None].expand_as(target)
        return logits.movedim(1, -1)[valid], target[valid], image[valid]

    def _samples(self, rows: Tensor, labels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean logits (s, C) and class (s,) of every image and class that has pixels, in the order of the images."""
        key = image * self.num_classes + labels
        present, counts = key.unique(return_counts=True)
        parts = rows[key.argsort(stable=True)].split(counts.tolist())
        # One mean a part, not a scatter, whose order of additions is undefined on a GPU.
        means = [part.mean(0) for part in parts]
        return torch.stack(means) if means else rows, present % self.num_classes

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if len(labels):  # without a valid pixel there is nothing to check, and nothing wrong
            super()._check(logits, labels)
