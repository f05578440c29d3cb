"""Test-time fine-tuning on a task's support set (P>M>F: Hu et al., arXiv 2204.07305; AMT-FT with a merged backbone).

    p_c(theta) = mean feature of the clean support of class c
    theta <- Adam(theta, grad CE(s cos(f_theta(z), p(theta)), y)),    z = DiffAugment(support), anew in every step

Prototypes are recomputed in every step and carry a gradient too; the scale s is fixed. The tuned weights live in a
dictionary and the model runs on them by a functional call: it is never changed, so there is nothing to reset and no task
can see another, nor its Adam state.

attention_scale: one factor per attention head on the logits q k^T / sqrt(d), start 1, all else fixed. It is multiplied
into the rows of q in the fused qkv projection, weight and bias, which is the same function and leaves stock attention
alone. ATTNSCALE (Basu et al., arXiv 2304.01917) learns "scaling parameters for each attention matrix"; a scalar per head is
our reading, and its domain adapter is left out. adversarial: AMT's "Adv. TTF" is named in the paper and nowhere specified;
here z is attacked, on its labels against the prototypes of the moment, before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vismt.errors import UserError, near
from vismt.metatune.attention_scale import attention_heads, scaled_queries
from vismt.metatune.diffaugment import diff_augment
from vismt.metatune.functional import Functional, check_weights
from vismt.metatune.protocol import Task
from vismt.metatune.protonet import PrototypeClassifier, cosine_logits, prototypes
from vismt.seeds import mix_seed

PARAMETERS = ("all", "attention_scale")
SupportAttack = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class FineTuneSettings:
    """How a task is fine-tuned.

    lr: Adam's, 0 leaves the task as it is. parameters: "all" of the backbone, frozen or not, or "attention_scale".
    probability: of the augmentation of a step. adversarial: attack the augmented support, by default with PGD of
    `attack_steps` steps and a budget of `epsilon` in pixel units of [0, 1]. seed: of the augmentation, the same for every
    task.
    """

    lr: float = 1e-3
    steps: int = 40
    parameters: str = "all"
    probability: float = 0.9
    adversarial: bool = False
    epsilon: float = 4.5 / 255
    attack_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parameters not in PARAMETERS:
            raise UserError(f"finetune.parameters: '{self.parameters}'.{near(str(self.parameters), PARAMETERS)}")
        if not 0 <= self.lr <= 1 or self.steps < 0 or not 0 <= self.probability <= 1:
            raise UserError(
                f"finetune: lr {self.lr}, steps {self.steps}, probability {self.probability}: need lr from 0 to 1, "
                "steps >= 0 and a probability from 0 to 1."
            )
        if not 0 <= self.epsilon <= 1 or self.attack_steps < 1:
            raise UserError(
                f"finetune: epsilon {self.epsilon}, attack_steps {self.attack_steps}: need 0 <= epsilon <= 1 in pixel "
                "units of [0, 1] (8/255, not 8) and attack_steps >= 1."
            )


def finetune(
    backbone: nn.Module,
    support: Tensor,
    labels: Tensor,
    settings: FineTuneSettings,
    *,
    scale: float | Tensor,
    weights: Mapping[str, Tensor] | None = None,
    attack: SupportAttack | None = None,
) -> dict[str, Tensor]:
    """The backbone's weights tuned on one support set, by name, for `Functional(backbone, ...)`; the backbone is unchanged.

    backbone: images (b, 3, h, w) in [0, 1] -> features (b, d); its buffers mean and std, where it has them, say where the
    augmentation acts. support (s, 3, h, w); labels (s,) 0..N-1, every class present. scale: of the cosine. weights: start
    from these in place of the backbone's own; those that are not tuned come back as they were given. attack: (images,
    labels, logits of images) -> images, in place of the built-in one of an adversarial run.

    Tuned tensors are detached and new, in the dtype they started from; steps are taken in fp32 or wider. The backbone is
    in eval mode meanwhile. Callers may be under no_grad or inference_mode. The whole support is one batch. Raises
    UserError for weights or labels that do not fit, a backbone with nothing to tune, and a loss that is not finite.
    """
    if attack is not None and not settings.adversarial:
        raise UserError(
            "fine-tuning: an attack is given, but adversarial is off: switch it on or leave the attack out."
        )
    start = dict(weights or {})
    check_weights(backbone, start)
    with torch.inference_mode(False), torch.enable_grad(), _evaluating(backbone):
        given = {name: _usable(tensor) for name, tensor in start.items()}
        held = {
            name: _usable(value) for name, value in (*backbone.named_parameters(), *backbone.named_buffers())
        } | given
        tuned = _All(backbone, held) if settings.parameters == "all" else _AttentionScale(backbone, held)
        task = _Task(backbone, held, tuned, _usable(support), _usable(labels).long(), scale, settings, attack)
        if settings.lr > 0:
            task.run()
        return given | {name: tensor.detach().clone() for name, tensor in tuned.weights().items()}


class FineTuned(nn.Module):
    """A task's classifier, fine-tuned on its support before it is used.

    proto: anything whose classifier(support_images, support_labels) is a `PrototypeClassifier` on a module or on a
    `Functional` (ProtoNet, a pool with merging). Tuning starts from that backbone, prototypes are recomputed at its end,
    other buffers of the classifier are handed on. settings, attack: of `finetune`. With lr or steps 0 the classifier is
    handed through.
    """

    def __init__(self, proto: Task, settings: FineTuneSettings, *, attack: SupportAttack | None = None) -> None:
        super().__init__()
        self.proto, self.settings, self.attack = proto, settings, attack

    def classifier(self, support_images: Tensor, support_labels: Tensor, *, batch: int = 256) -> PrototypeClassifier:
        """(s, 3, h, w), (s,) -> the tuned query classifier. `batch`: images at a time for the final prototypes."""
        task = self.proto.classifier(support_images, support_labels)
        if not isinstance(task, PrototypeClassifier):
            raise UserError(
                f"fine-tuning: the task's classifier is {type(task).__name__}: it needs one with prototypes."
            )
        if self.settings.lr == 0 or self.settings.steps == 0:
            return task
        merged = isinstance(task.backbone, Functional)
        module, start = (task.backbone.module, task.backbone.weights) if merged else (task.backbone, None)
        tuned = Functional(
            module,
            finetune(
                module,
                support_images,
                support_labels,
                self.settings,
                scale=task.scale,
                weights=start,
                attack=self.attack,
            ),
        )
        with torch.no_grad():
            features = torch.cat([tuned(piece) for piece in support_images.split(batch)])
            result = PrototypeClassifier(tuned, prototypes(features, support_labels), task.scale)
        for name, buffer in task.named_buffers(recurse=False):
            if name not in dict(
                result.named_buffers(recurse=False)
            ):  # a pool's account of the task, such as its mixture
                result.register_buffer(name, buffer, persistent=False)
        result.training = task.training
        return result


class _All:
    """Every parameter of the backbone, as fp32 (or wider) leaves."""

    def __init__(self, backbone: nn.Module, held: Mapping[str, Tensor]) -> None:
        self._kinds = {
            name: held[name].dtype for name, _ in backbone.named_parameters() if held[name].is_floating_point()
        }
        self._leaves = {
            name: held[name].to(torch.promote_types(kind, torch.float32), copy=True).requires_grad_(True)
            for name, kind in self._kinds.items()
        }
        self.leaves = list(self._leaves.values())
        if not self.leaves:
            raise UserError(f"fine-tuning: {type(backbone).__name__} has no parameter to tune.")

    def weights(self) -> dict[str, Tensor]:
        # Views: autocast caches its casts of leaves, and would go on with the weights of the first step.
        return {name: leaf.view_as(leaf).to(self._kinds[name]) for name, leaf in self._leaves.items()}


class _AttentionScale:
    """A factor per head of every attention."""

    def __init__(self, backbone: nn.Module, held: Mapping[str, Tensor]) -> None:
        self._held, self._heads = held, attention_heads(backbone)
        self.leaves = [
            torch.ones(site.heads, device=held[site.tensors[0]].device).requires_grad_(True) for site in self._heads
        ]

    def weights(self) -> dict[str, Tensor]:
        return {
            name: scaled_queries(self._held[name], factor, site)
            for site, factor in zip(self._heads, self.leaves)
            for name in site.tensors
        }


@dataclass
class _Task:
    """One support set and what is tuned on it."""

    backbone: nn.Module
    held: Mapping[str, Tensor]
    tuned: _All | _AttentionScale
    support: Tensor
    labels: Tensor
    scale: float | Tensor
    settings: FineTuneSettings
    attack: SupportAttack | None

    def run(self) -> None:
        settings = self.settings
        scale = _usable(self.scale) if isinstance(self.scale, Tensor) else self.scale
        generator = torch.Generator().manual_seed(mix_seed(settings.seed, "fine-tuning"))
        mean, std = (getattr(self.backbone, name, None) for name in ("mean", "std"))
        optimiser = torch.optim.Adam(self.tuned.leaves, lr=settings.lr)
        for step in range(settings.steps):
            weights = self.tuned.weights()
            centres = prototypes(self._features(self.support, weights), self.labels)
            views = diff_augment(self.support, generator, probability=settings.probability, mean=mean, std=std)
            if settings.adversarial:
                views = self._attacked(views, weights, centres, scale)
            loss = F.cross_entropy(cosine_logits(self._features(views, weights), centres, scale), self.labels)
            if not bool(loss.isfinite()):
                where = f"the loss is {loss.item()} in step {step + 1} at lr {settings.lr}"
                raise UserError(f"fine-tuning: {where}: lower lr, or mend images or weights that are not finite.")
            # Not .backward(): the attack's logits and the caller's graph, if any, must not collect gradients.
            for leaf, gradient in zip(
                self.tuned.leaves, torch.autograd.grad(loss, self.tuned.leaves, allow_unused=True)
            ):
                leaf.grad = gradient
            optimiser.step()

    def _features(self, images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return functional_call(self.backbone, {**self.held, **weights}, (images,))

    def _attacked(
        self, images: Tensor, weights: Mapping[str, Tensor], centres: Tensor, scale: float | Tensor
    ) -> Tensor:
        fixed, centres = {name: tensor.detach() for name, tensor in weights.items()}, centres.detach()

        def logits(changed: Tensor) -> Tensor:
            return cosine_logits(self._features(changed, fixed), centres, scale)

        if self.attack is not None:
            return self.attack(images, self.labels, logits).detach()
        return _pgd(images, self.labels, logits, self.settings.epsilon, self.settings.attack_steps)


def _pgd(images: Tensor, labels: Tensor, logits: Callable[[Tensor], Tensor], epsilon: float, steps: int) -> Tensor:
    """Images within epsilon (l_inf) that raise the cross-entropy: signed steps of 2.5 epsilon / steps (Madry et al.,
    arXiv 1706.06083) from the images themselves. No box of [0, 1]: augmented images have left it already.
    """
    delta = torch.zeros_like(images)
    for _ in range(steps):
        delta.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits(images + delta), labels), delta)
        delta = (delta.detach() + 2.5 * epsilon / steps * slope.sign()).clamp(-epsilon, epsilon)
    return images + delta


def _usable(tensor: Tensor) -> Tensor:
    """The tensor without its graph; a copy where it was made in inference mode, which autograd would refuse."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
