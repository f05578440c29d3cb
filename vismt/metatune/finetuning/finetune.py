"""Test-time fine-tuning on a task's support set (P>M>F: Hu et al., arXiv 2204.07305; AMT-FT with a merged backbone).

    p_c(theta) = mean feature of the clean support of class c
    theta <- Adam(theta, grad CE(s cos(f_theta(z), p(theta)), y)),    z = DiffAugment(support), drawn in every step

Prototypes are computed again in every step and have a gradient too. The scale s is fixed. The tuned weights are kept in a
dictionary, and the model runs on them by a functional call. The model is never changed, so there is nothing to reset. Tasks share
neither weights nor Adam state. AMT's "Adv. TTF" is left out, because the paper names it and does not specify it.

attention_scale trains a factor a_h for the attention logits of each head, which starts at 1, and nothing else. The factor is
multiplied into the rows of q in the fused query-key-value projection, weight and bias. The stock attention stays as it is:

    a_h * (q_h k_h^T) / sqrt(d) = ((a_h q_h) k_h^T) / sqrt(d),    q_h = W_h x + b_h

ATTNSCALE (Basu et al., arXiv 2304.01917) learns "scaling parameters for each attention matrix". A scalar for each head is our
interpretation. The domain adapter of ATTNSCALE is left out.

lr "auto" chooses the rate for every task on its own support:

    lr* = argmax_{lr in RATES} accuracy of held-out support images under the weights tuned at lr on the other images

The smallest rate wins a tie, and a rate of 0 skips the tuning. A task that gains nothing by tuning is therefore left alone. A
rate at which a loss is not finite is not chosen.

Every class is cut in two halves, in the order of the support. Each half is judged by the prototypes of the other half, under
weights tuned on the other half. A class with one image cannot be cut. Its image stays in the tuning, and VIEWS random crops of
the image are judged in its place. The tuning has not seen these crops, because it shifts and recolours images but does not
scale them. At 1 shot, only these crops are judged.

The paper chooses one rate for a domain on labelled validation tasks. Its release takes these tasks from the test loader, with
the labels of their queries. For single tasks the release has the same grid, keeps the first image of each class for tuning, and
judges the others once. With one-shot tasks it therefore never tunes. Here each image is judged once, and no query takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.data.transforms import augment
from vismt.lowrank.contexts import evaluating
from vismt.lowrank.layers.forms import LowRankLinear
from vismt.metatune.features import features
from vismt.metatune.finetuning.diffaugment import diff_augment
from vismt.metatune.functional import WithWeights, check_named_weights
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.metatune.protonet import PrototypeClassifier, cosine_logits, prototypes
from vismt.metatune.settings import AUTO, HEADS, FineTuneSettings

RATES = (0.0, 1e-4, 1e-3, 1e-2)  # of which auto chooses
_SEED = 0  # of the augmentation and the crops, the same for every task
VIEWS = 4  # random crops of a single image, on which a rate is judged
# images -> features
Features = Callable[[Tensor], Tensor]


class LossNotFinite(UserError):
    """The loss of a fine-tuning is infinite or not a number."""


def finetune(
    backbone: nn.Module,
    support: Tensor,
    labels: Tensor,
    settings: FineTuneSettings,
    *,
    scale: float | Tensor,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tune the weights of a backbone on a support set. The backbone is not changed.

    The whole support is one batch. Steps are taken in fp32 or wider, with the backbone in eval mode. Callers may be under
    no_grad or inference_mode.

    Args:
        backbone: Module from images (b, 3, h, w) in [0, 1] to features (b, d). If it has buffers mean and std, the augmentation
            normalises with them.
        support: Images (s, 3, h, w) in [0, 1].
        labels: Labels (s,) in 0..N-1, every class present.
        settings: Settings of the fine-tuning.
        scale: Scale of the cosine.
        weights: Tensors by name to start from, in place of the tensors of the backbone.

    Returns:
        The tuned tensors by name, for `WithWeights(backbone, ...)`. They are detached and new, in the dtype of their start. The
        tensors of `weights` that are not tuned are included.

    Raises:
        UserError: If weights or labels do not fit, the backbone has nothing to tune, or a loss is not finite.
    """
    if settings.lr == AUTO:

        def tune(images: Tensor, labels: Tensor, lr: float) -> WithWeights:
            fixed = replace(settings, lr=lr)
            tuned = finetune(backbone, images, labels, fixed, scale=scale, weights=weights)
            return WithWeights(backbone, tuned)

        with evaluating(backbone):
            settings = replace(settings, lr=choose_rate(tune, support, labels))
    start = dict(weights or {})
    check_named_weights(backbone, start)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(backbone):
        start = {name: _usable(tensor) for name, tensor in start.items()}
        named = (*backbone.named_parameters(), *backbone.named_buffers())
        tensors = {name: _usable(value) for name, value in named} | start
        kind = _AllParameters if settings.parameters == "all" else _AttentionScale
        tuned = kind(backbone, tensors)
        mean, std = (getattr(backbone, name, None) for name in ("mean", "std"))
        images, truth = _usable(support), _usable(labels).long()
        factor = _usable(scale) if isinstance(scale, Tensor) else scale
        generator = torch.Generator().manual_seed(mix_seed(_SEED, "fine-tuning"))
        optimiser = torch.optim.Adam(tuned.leaves, lr=float(settings.lr))
        for step in range(settings.steps if float(settings.lr) > 0 else 0):
            now = {**tensors, **tuned.weights()}
            centres = prototypes(functional_call(backbone, now, (images,)), truth)
            views = diff_augment(images, generator, mean=mean, std=std)
            loss = F.cross_entropy(cosine_logits(functional_call(backbone, now, (views,)), centres, factor), truth)
            if not bool(loss.isfinite()):
                raise LossNotFinite(
                    f"fine-tuning: the loss is {loss.item()} in step {step + 1} at lr {settings.lr}: lower lr, or check for "
                    "images or weights that are not finite."
                )
            # Not .backward(): the caller's graph, if any, must not collect gradients.
            gradients = torch.autograd.grad(loss, tuned.leaves, allow_unused=True)
            for leaf, gradient in zip(tuned.leaves, gradients):
                leaf.grad = gradient
            optimiser.step()
        return start | {name: tensor.detach().clone() for name, tensor in tuned.weights().items()}


@HEADS.register("finetune")
class FineTuned(nn.Module):
    """A few-shot model with a classifier that is fine-tuned on the support of a task.

    The tuning starts from the backbone of another model's classifier. Prototypes are computed again at its end, and other buffers
    of the classifier are copied. With lr or steps 0 the classifier is returned unchanged.

    proto: Model with `classifier(support_images, support_labels)` that returns a `PrototypeClassifier` on a module or on a
    `WithWeights` (ProtoNet, a pool with merging). settings: Settings of `finetune`.
    """

    def __init__(self, proto: FewShotModel, settings: FineTuneSettings) -> None:
        super().__init__()
        self.proto, self.settings = proto, settings

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> PrototypeClassifier:
        """Return the tuned query classifier of a support of images (s, 3, h, w) and labels (s,)."""
        task = self.proto.classifier(support_images, support_labels)
        if not isinstance(task, PrototypeClassifier):
            raise UserError(
                f"fine-tuning: the task's classifier is {type(task).__name__}: it needs one with prototypes."
            )
        if self.settings.lr == 0 or self.settings.steps == 0:
            return task
        backbone = task.backbone
        module, start = (backbone.module, backbone.weights) if isinstance(backbone, WithWeights) else (backbone, None)
        weights = finetune(module, support_images, support_labels, self.settings, scale=task.scale, weights=start)
        tuned = WithWeights(module, weights)
        with torch.no_grad():
            centres = prototypes(features(tuned, support_images), support_labels)
            result = PrototypeClassifier(tuned, centres, task.scale)
        copied = dict(result.named_buffers(recurse=False))
        for name, buffer in task.named_buffers(recurse=False):
            if name not in copied:  # a pool's description of the task, such as its mixture
                result.register_buffer(name, buffer, persistent=False)
        result.training = task.training
        return result


class _AllParameters:
    """Every parameter of the backbone, as leaves in fp32 or wider. tensors: Start values by name."""

    def __init__(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        names = [name for name, _ in backbone.named_parameters() if tensors[name].is_floating_point()]
        self._dtypes = {name: tensors[name].dtype for name in names}
        self._leaves = {
            name: tensors[name].to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_(True)
            for name, dtype in self._dtypes.items()
        }
        self.leaves = list(self._leaves.values())
        if not self.leaves:
            raise UserError(f"fine-tuning: {type(backbone).__name__} has no parameter to tune.")

    def weights(self) -> dict[str, Tensor]:
        # Views: autocast caches its casts of leaves, and would use the weights of the first step again.
        return {name: leaf.view_as(leaf).to(self._dtypes[name]) for name, leaf in self._leaves.items()}


@dataclass(frozen=True)
class QueryRows:
    """The queries of one attention: the first `rows` rows of `tensors` (names in the backbone), head after head."""

    heads: int
    rows: int
    tensors: tuple[str, ...]


def attention_heads(backbone: nn.Module) -> list[QueryRows]:
    """Return the query rows of every attention of a backbone with timm's fused qkv, stock or with a low-rank update.

    Raises UserError for a backbone without attention, and for an attention whose logits the rows of q do not scale.
    """
    attentions = []
    module: Any
    for path, module in backbone.named_modules():
        if not hasattr(module, "num_heads") or any(hasattr(part, "num_heads") for part in list(module.modules())[1:]):
            continue  # not an attention, or a module that contains one
        qkv: Any = getattr(module, "qkv", None)
        reason = _unsupported(module, qkv)
        if reason:
            raise UserError(f"attention_scale: '{path}' ({type(module).__name__}): {reason}; use parameters='all'.")
        names = [
            name
            for name in ("weight", "quantized", "bias", "lora_B", "lora_B0")
            if getattr(qkv, name, None) is not None
        ]
        tensors = tuple(f"{path}.qkv.{name}" if path else f"qkv.{name}" for name in names)
        attentions.append(QueryRows(module.num_heads, qkv.out_features // 3, tensors))
    if not attentions:
        raise UserError(
            f"attention_scale: {type(backbone).__name__} has no attention with heads; use parameters='all'."
        )
    return attentions


def _unsupported(module: Any, qkv: nn.Module | None) -> str:
    """Return why the rows of q in `qkv` do not scale the logits of this attention. Return "" if they do."""
    if type(qkv) is not nn.Linear and not isinstance(qkv, LowRankLinear):
        return "it has no fused qkv projection" if qkv is None else f"its qkv is {type(qkv).__name__}"
    if not isinstance(getattr(module, "q_norm", None), nn.Identity | None):
        return "it normalises q, which undoes the factor"
    if getattr(module, "q_bias", None) is not None:
        return "its bias of q lies outside of qkv"
    if qkv.out_features % (3 * module.num_heads):
        return f"its qkv has {qkv.out_features} rows for {module.num_heads} heads"
    return ""


class _AttentionScale:
    """A factor for each head of every attention. tensors: Tensors of the backbone by name."""

    def __init__(self, backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._heads = tensors, attention_heads(backbone)
        self.leaves = [
            torch.ones(site.heads, device=tensors[site.tensors[0]].device).requires_grad_(True) for site in self._heads
        ]

    def weights(self) -> dict[str, Tensor]:
        scaled = {}
        for site, factor in zip(self._heads, self.leaves):
            rows = factor.repeat_interleave(site.rows // site.heads)
            for name in site.tensors:
                tensor = self._tensors[name]
                queries = tensor[: site.rows] * rows.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
                scaled[name] = torch.cat([queries, tensor[site.rows :]])
        return scaled


def _usable(tensor: Tensor) -> Tensor:
    """Detach a tensor. Copy it if it was created in inference mode, because autograd refuses such a tensor."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def choose_rate(tune: Callable[[Tensor, Tensor, float], Features], support: Tensor, labels: Tensor) -> float:
    """Return the rate of RATES that generalises best within a support set.

    Args:
        tune: Function from (images, labels, rate) to the features of images under the weights tuned on these images.
        support: Images (s, 3, h, w) in [0, 1].
        labels: Labels (s,) in 0..N-1, every class present.
    """
    alone = (labels[:, None] == labels).sum(1) == 1
    crops = [augment(support[alone], mix_seed(_SEED, "crops", view)) for view in range(VIEWS)]
    best, chosen = -1.0, 0.0
    for rate in RATES:
        right = []
        try:
            for mask in held_out(labels):
                tuned = tune(support[~mask], labels[~mask], rate)
                judged = torch.cat([support[mask], *crops])
                truth = torch.cat([labels[mask], labels[alone].repeat(VIEWS)])
                with torch.no_grad():
                    centres = prototypes(tuned(support[~mask]), labels[~mask])
                    right.append(cosine_logits(tuned(judged), centres).argmax(1) == truth)
        except LossNotFinite:
            continue
        share = float(torch.cat(right).double().mean())
        if share > best:
            best, chosen = share, rate
    return chosen


def held_out(labels: Tensor) -> list[Tensor]:
    """Return the folds, each a mask (s,) of held-out images. If every class has one image, there is one empty mask."""
    same = labels[:, None] == labels
    place, count = same.tril(-1).sum(1), same.sum(1)
    masks = [(count > 1) & (place % 2 == half) for half in (0, 1)]
    return masks if bool(masks[0].any()) else masks[:1]
