"""Quality retaining: self-distillation towards recent logits of the same class (EMTAL).

    L_QR = mean_s KD_s / ema[t(s)]               KD_s = sum_j T^2 KL( softmax(bank[y_s, j] / T) || softmax(z_s / T) )
    ema[t] <- 0.95 ema[t] + 0.05 mean CE of task t in the batch, without label smoothing      the weight has no gradient
    bank[y, 0] <- bank[y, 1],  bank[y, 1] <- z                                                after the loss

so d KD_s / d z_s = T sum_j (softmax(z_s / T) - softmax(bank_j / T)), with a larger weight for tasks that have converged. Zhong
et al., NeurIPS 2024, arXiv 2501.06884. The default follows the released code. The bank holds the last two logits of each class,
of correct and wrong predictions alike. It does not hold the best logits so far. The paper instead has one running mean Z_y <- m
Z_y + (1 - m) z, KL(student || bank), no temperature, a sum over the batch, and the CE of the batch as the weight: `mode="ema",
reverse=True, temperature=1, reduction="sum", ema_decay=0`, and half of the result (mode "ema" counts its single slot twice, as
the code does). Three things differ from the code. The state is fp32, saved, and shared by all processes (the code keeps it in
fp16 and does not save it). Within a batch the bank takes the last sample of a class on every device. Samples with an infinite
or NaN logit do not change the state.

It raises the accuracy of a classifier and lowers the quality of its probabilities, which a temperature restores.

Maps (EMTAL section 3.1, which the released code lacks, so the details are ours):

    L_QR = mean over valid pixels p of KD_p / ema     KD_p with the bank's logits of the class y(p)
    z_bc = mean of the detached logits over the pixels of class c in image b: the "sample" of the bank
    ema <- 0.95 ema + 0.05 mean over valid pixels of the cross-entropy of the batch (a single number, for one task)

The loss is computed at the resolution of the given logits. The labels are resampled to it by the nearest pixel. On the output
of a head this costs a sixteenth of the computation at the labels' size, where the KD of p pixels takes several maps of p x 2 x
C. Pixels labelled 255 are ignored. Each image contributes one sample of a class, for any number of pixels. If several images
have the same class, the bank stores the last of the batch and shifts once. Depth, normals and other regression tasks have no
classes and therefore no such loss.

Dense runs leave it out unless a configuration asks for it, because it costs mIoU. The pull to recent logits of the class
shrinks the logits' variance within a class, but not the bias of the head, which is the log prior of the classes. The argmax
then falls to the frequent classes. mIoU in % on CamVid (233 test images at 126 x 168 px, frozen ViT-S, segformer head, 160
steps, mean of 2 seeds, 2-core CPU) is 34.3 without and 27.4 with it, and after 640 steps 40.5 and 30.1. With square-root class
weights (class_loss.py) it is 41.1 without and 40.3 with it, and after 640 steps 43.3 and 42.7. Four variants gave 26.8 to 32.6,
so none of them is the cause: a random pixel of the class instead of the mean, one ema for each class, a bank of correct pixels
alone, and a uniform teacher instead of the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vismt.base.errors import UserError, require_known
from vismt.data.maps.dense_sample import IGNORE
from vismt.multitask.balancing.base import count_processes

MODES = ("fifo2", "ema")
REDUCTIONS = ("mean", "sum")


class QualityRetaining(nn.Module):
    """Quality retaining: call `loss(logits, labels)`, then `update(logits, labels)`, once for every optimiser step.

    Logits (b, C) and labels int64 (b,), 0 to C-1, are of whole images. Logits (b, C, r, c) and labels int64 (b, h, w) of any
    size, 0 to C-1 or 255, are of maps.

    Args:
        num_classes: Number C of classes of all tasks.
        task_of_class: Task number of each class, int64 (C,), 0 to t-1. Every task has at least one class. None for one task.
        temperature: Temperature T > 0.
        mode: "fifo2" (the last two logits) or "ema" (a running mean).
        ema_decay: Decay of the running cross-entropy, in [0, 1].
        ema_init: Start value of the running cross-entropy, > 0.
        momentum: Momentum m of mode "ema", in [0, 1).
        reduction: "mean" or "sum" over the samples of the batch.
        reverse: Whether to take KL(student || bank) instead of KL(bank || student).

    Attributes:
        bank: Buffer fp32 (C, 2 or 1, C), newest last. It starts at zero, which pulls a class without a sample so far to the
            uniform distribution.
        ema: Buffer fp32 (t,). Both buffers stay fp32 if the model is cast to another dtype.

    Raises:
        UserError: If a value is out of range.
    """

    bank: Tensor
    ema: Tensor
    task_of_class: Tensor

    def __init__(
        self,
        num_classes: int,
        task_of_class: Tensor | Sequence[int] | None = None,
        temperature: float = 2.0,
        mode: str = "fifo2",
        ema_decay: float = 0.95,
        ema_init: float = 10.0,
        *,
        momentum: float = 0.5,
        reduction: str = "mean",
        reverse: bool = False,
    ) -> None:
        super().__init__()
        tasks = torch.zeros(num_classes).long() if task_of_class is None else torch.as_tensor(task_of_class)
        _check_tasks(tasks, num_classes)
        for name, value, choices in (("mode", mode, MODES), ("reduction", reduction, REDUCTIONS)):
            require_known(f"quality retaining: {name}", [value], choices)
        for name, number, valid, needed in (
            ("temperature", temperature, 0 < temperature < float("inf"), "> 0"),
            ("ema_decay", ema_decay, 0 <= ema_decay <= 1, "from 0 to 1"),
            ("ema_init", ema_init, 0 < ema_init < float("inf"), "> 0"),
            ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
        ):
            if not valid:
                raise UserError(f"quality retaining: {name} {number}, needed {needed}.")
        self.num_classes, self.temperature, self.mode, self.reduction = num_classes, float(temperature), mode, reduction
        self.ema_decay, self.momentum, self.reverse = ema_decay, momentum, reverse
        self.register_buffer("task_of_class", tasks.clone(), persistent=False)
        self.register_buffer("bank", torch.zeros(num_classes, 2 if mode == "fifo2" else 1, num_classes))
        self.register_buffer("ema", torch.full((int(tasks.max()) + 1,), float(ema_init)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return L_QR of a batch without changing the state. Every process must call it, also without a label.

        Under several processes the mean or sum is over this process's samples, and the weights depend on all samples.

        Args:
            logits: Logits of any floating dtype, over the classes of all tasks.
            labels: Labels.

        Returns:
            A scalar in at least fp32, 0 without a label. Its gradient reaches only `logits`.

        Raises:
            UserError: If a shape or dtype is wrong, or, on the CPU, a label is out of range.
        """
        rows, labels, _ = self._samples(logits, labels)
        student = rows.to(torch.promote_types(rows.dtype, torch.float32))
        ema = self._next_ema(student, labels)
        if not len(labels):
            return student.sum()
        T = self.temperature
        teacher = (self.bank[labels].to(student.dtype) / T).log_softmax(-1)
        softened = (student / T).log_softmax(-1)[:, None].expand_as(teacher)
        p, q = (softened, teacher) if self.reverse else (teacher, softened)
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum((1, 2))  # KL(p || q)
        distance = divergence * (T * T * 2 / self.bank.shape[1])
        per_sample = distance / ema[self.task_of_class[labels]].to(student.dtype)
        return per_sample.mean() if self.reduction == "mean" else per_sample.sum()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the batch to the bank and the running cross-entropies. Arguments and errors are as for `loss`.

        For a class with several samples the bank shifts once and stores the last sample (of the last process).
        """
        rows, labels, image = self._samples(logits.detach(), labels)
        student = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.ema.copy_(self._next_ema(student, labels))
        if logits.ndim == 4:
            key = image * self.num_classes + labels
            present, counts = key.unique(return_counts=True)
            parts = student[key.argsort(stable=True)].split(counts.tolist())
            # The mean of every class in every image, sorted by image. A scatter would add in undefined order on a GPU.
            means = [part.mean(0) for part in parts]
            student, labels = torch.stack(means) if means else student, present % self.num_classes
        self._store(student, labels)

    def _store(self, student: Tensor, labels: Tensor) -> None:
        """Add the last sample of each class to the bank. Every process calls it, also without a sample."""
        student, labels = _from_all(student.float()), _from_all(labels)
        place = torch.arange(len(labels), device=labels.device)
        place = torch.where(student.isfinite().all(1), place, -1)
        last_of_class = torch.full((self.num_classes,), -1, device=labels.device)
        last = last_of_class.scatter_reduce(0, labels, place, "amax")[labels]
        newest = self.bank[labels, -1]
        stored = student[last.clamp_min(0)]
        if self.mode == "ema":
            stored = self.momentum * newest + (1 - self.momentum) * stored
        # All samples of a class write the same rows, so the order of the writes does not matter.
        unchanged = (last < 0)[:, None]
        if self.mode == "fifo2":
            self.bank[labels, 0] = torch.where(unchanged, self.bank[labels, 0], newest)
        self.bank[labels, -1] = torch.where(unchanged, newest, stored)

    @torch.no_grad()
    def _next_ema(self, student: Tensor, labels: Tensor) -> Tensor:
        """Return the running cross-entropies (t,) after this batch of all processes. Tasks without a sample keep their value."""
        entropies = F.cross_entropy(student, labels, reduction="none").float()
        finite = student.isfinite().all(1)
        rows = torch.stack([torch.where(finite, entropies, 0), finite.float()], dim=1)
        member = F.one_hot(self.task_of_class[labels], len(self.ema)).T.float()
        # A scatter adds in undefined order on a GPU, and a matrix product may round to TF32.
        sums = (member[:, :, None] * rows).sum(1)
        if count_processes() > 1:
            dist.all_reduce(sums)
        total, count = sums.unbind(1)
        mean = total / count.clamp_min(1)
        return torch.where(count > 0, self.ema_decay * self.ema + (1 - self.ema_decay) * mean, self.ema)

    def _samples(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n, C), labels (n,) and image numbers (n,) of whole images, or of valid pixels, sorted by image."""
        maps = logits.ndim == 4
        fits = (
            labels.ndim == (3 if maps else 1)
            and len(logits) == len(labels)
            and logits.shape[1:2] == (self.num_classes,)
        )
        if not fits or logits.ndim not in (2, 4) or not logits.is_floating_point() or labels.dtype != torch.int64:
            raise UserError(
                f"quality retaining: logits {tuple(logits.shape)} {logits.dtype}, labels {tuple(labels.shape)} {labels.dtype}; "
                f"needed (b, {self.num_classes}) floating point and (b,) int64, or of maps (b, {self.num_classes}, r, c) and "
                "(b, h, w)."
            )
        if maps and labels.shape[-2:] != logits.shape[-2:]:
            labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
        image = torch.arange(len(labels), device=labels.device)
        if maps:
            valid = labels != IGNORE
            image = image[:, None, None].expand_as(labels)[valid]
            logits, labels = logits.movedim(1, -1)[valid], labels[valid]
        if len(labels) and labels.device.type == "cpu":
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < self.num_classes:
                raise UserError(
                    f"quality retaining: labels from {low} to {high}, the union has {self.num_classes} classes; add each task's "
                    "offset once."
                )
        return logits, labels, image

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QualityRetaining:
        bank, ema = self.bank, self.ema
        super()._apply(fn, recurse)
        self.bank, self.ema = bank.to(self.bank.device), ema.to(self.ema.device)  # moved, but not cast
        return self

    def extra_repr(self) -> str:
        return f"classes={self.num_classes}, tasks={len(self.ema)}, mode={self.mode}, temperature={self.temperature:g}"


def _check_tasks(tasks: Tensor, num_classes: int) -> None:
    if tasks.shape != (num_classes,) or tasks.dtype != torch.int64 or not num_classes:
        raise UserError(
            f"quality retaining: task_of_class is {tuple(tasks.shape)} {tasks.dtype}, needed ({num_classes},) int64."
        )
    empty = sorted(set(range(int(tasks.max()) + 1)) - set(tasks.tolist()))
    if int(tasks.min()) < 0 or empty:
        problem = f"task {empty[0]} has no class" if empty else f"task {int(tasks.min())}"
        raise UserError(f"quality retaining: task_of_class: {problem}; number the tasks 0, 1, 2, ... without a gap.")


def _from_all(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order. The numbers of rows may differ."""
    if count_processes() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])
