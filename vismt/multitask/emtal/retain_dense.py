"""Quality retaining for semantic segmentation (EMTAL section 3.1; the released code lacks it, so the details are ours).

    L_QR = mean over valid pixels p of KD_p / ema     KD_p as in retain.py, with the bank's logits of the class y(p)
    z_bc = mean of the detached logits over the pixels of class c in image b that `select` names: the "sample" of the bank
    ema <- 0.95 ema + 0.05 mean over valid pixels of the cross-entropy of the batch; a single number, for one task

The resolution is that of the given logits, to which the labels are resampled by the nearest pixel. On the output of a head this
costs a sixteenth of the computation at the labels' size, where the KD of p pixels takes several maps of p x 2 x C.
Pixels labelled 255 are ignored. Each image contributes one sample of a class, independent of its number of pixels; of several
images with the same class the bank stores the last of the batch and shifts once. Depth, normals and other regression tasks have
no classes and therefore no such loss.

Off unless a configuration asks for it, because it costs mIoU: the pull to recent logits of the class shrinks the logits' variance
within a class but not the bias of the head, which is the log prior of the classes, so that the argmax falls to the frequent ones.

mIoU in % on CamVid (233 test images at 126 x 168 px, frozen ViT-S, segformer head, 160 steps, mean of 2 seeds, 2-core CPU):
  without 34.3; with 27.4; of 640 steps 40.5 and 30.1
  a random pixel of the class in place of the mean 26.8; weighting "class" 26.8; select "correct" 29.9; weight 0.1 33.4; teacher
  "uniform" 32.6: neither the mean over pixels, nor the shared ema, nor the start of the bank is the cause
  square-root class weights (class_loss.py): without 41.1, with 40.3; of 640 steps 43.3 and 42.7
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.tasks.base import IGNORE


class DenseRetaining(QualityRetaining):
    """Quality retaining of maps: call `loss(logits, target)`, then `update(logits, target)`, once for every optimiser step.

    The state is that of `QualityRetaining` with a single task: the fp32 buffers bank (C, 2 or 1, C) and ema (1,).

    Args:
        num_classes: number of classes of the segmentation, C.
        options: options of `QualityRetaining`.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, torch.zeros(num_classes, dtype=torch.int64), **options)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return L_QR of a batch; every process must call it, also without a valid pixel.

        Args:
            logits: (b, C, r, c), any floating dtype.
            target: int64 (b, h, w), 0 to C-1 or 255, of any size.

        Returns:
            A scalar in at least fp32, 0 without a valid pixel; its gradient reaches `logits` alone.

        Raises:
            UserError: for other shapes and dtypes, and on the CPU for a label out of range.
        """
        rows, labels, _ = self._pixels(logits, target)
        if not len(labels):
            self._next_ema(rows.float(), labels)  # takes part in the all-reduce of the other processes
            return rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32))
        return super().loss(rows, labels)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the batch to the bank and the running cross-entropy; arguments and errors as of `loss`."""
        rows, labels, image = self._pixels(logits.detach(), target)
        self._check(rows, labels)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.ema.copy_(self._next_ema(rows, labels))
        if self.teacher == "bank":
            chosen = self.selected(rows, labels)
            self._store(*self._samples(rows[chosen], labels[chosen], image[chosen]))

    def _pixels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (p, C), labels (p,) and image numbers (p,) of the valid pixels, sorted by image."""
        valid_shapes = (
            logits.ndim == 4 and target.ndim == 3 and len(logits) == len(target) and logits.shape[1] == self.num_classes
        )
        if not valid_shapes or target.dtype != torch.int64:
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
        """Return mean logits (s, C) and class (s,) of every class in every image, sorted by image."""
        key = image * self.num_classes + labels
        present, counts = key.unique(return_counts=True)
        parts = rows[key.argsort(stable=True)].split(counts.tolist())
        # A scatter would add in undefined order on a GPU.
        means = [part.mean(0) for part in parts]
        return torch.stack(means) if means else rows, present % self.num_classes

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if len(labels):
            super()._check(logits, labels)
