"""AMT: LoRA factors that are tuned on episodes under two attacks (Yang, Liu, Wei, NeurIPS 2024).

An expert has one pair of factors for each of q, k and v, which starts at the principal part of the weight:

    DeltaW = s B A,    A = sqrt(S_r / s) V_r^T,  B = U_r sqrt(S_r / s)    of W = U S V^T

The training of an expert:

    L(theta) = CE(z(x), y) + lambda * mean_q KL(p(x_q) || p(x_q^adv)),    minimised at theta + nu

x^adv is the pyramid attack on the queries (input_attack.py). The support stays clean. Beyond the paper, x^adv may also be an
attack in the l2 ball, a corruption, or Gaussian noise for randomised smoothing, which is not clipped. nu is one step along the
gradient of L on the LoRA factors (weight_attack.py). Both query branches have a gradient and share the prototypes of the clean
support.

Paper and released code differ. The default is the code's form, and the paper's form is an option:

    part    code (default)                                        paper
    KL      KL(clean || adv)                                      KL(adv || clean)
    nu      normalised for each tensor, for A and B at once       plain gradient of the adversarial cross-entropy. The update of
                                                                  A moves only A, and the update of B moves only B

The code leaves the prototypes at theta (support="clean"). The default here computes them again at theta + nu, so that ascent
and descent use the same function. The scale of the cosine is trained, as in the release. Left out: the classifier's additive
bias, which changes no loss. With learned vectors of classes in place of prototypes (protonet.py), the loss is TRADES on class
labels. pool.py has the pool, and merging.py the merging.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vismt.base.errors import Diverged, UserError, near
from vismt.base.seeds import mix_seed
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import inject
from vismt.lowrank.model.merge import merged_copy
from vismt.lowrank.model.record import AdaptReport
from vismt.lowrank.svd import kaiming, principal
from vismt.metatune.amt.input_attack import PLAIN, pyramid_attack
from vismt.metatune.amt.weight_attack import weight_perturbation
from vismt.metatune.protonet import ProtoNet, cosine_logits
from vismt.metatune.settings import CORRUPTION, GAUSSIAN, Adversary
from vismt.methods import Method, register_method

# images (m, 3, h, w) in [0, 1], severity 1 to 5, seed -> the images under a corruption that the seed draws
Corrupt = Callable[[Tensor, int, int], Tensor]
PATIENCE = 10  # episodes in a row with a flat prediction that count as collapsed
_FLAT = 0.05  # largest difference between the predictions of two queries for a class, times k, that counts as flat


def amt(model: nn.Module, *, init: str = "svd", split_qkv: bool = True, **options: Any) -> AdaptReport:
    """Adapt a model as one AMT expert: factors for each q, k, v block and linear layer.

    init: Start of the factors, "svd" (principal factors) or "lora" (zero B). options: Arguments of `inject`.
    """
    if init not in ("svd", "lora"):
        raise UserError(f"adapt.init: '{init}' for 'amt'.{near(str(init), ('svd', 'lora'))}")
    if options.get("dropout"):
        raise UserError(f"adapt.dropout: {options['dropout']} with 'amt', whose factors carry most of W; set it to 0.")
    start = principal if init == "svd" else kaiming
    return inject(model, "amt", start, offset=init == "svd", split_qkv=split_qkv, **options)


register_method(Method("amt", amt, layers=(LowRankLayer,)))


class AdversarialObjective(nn.Module):
    """objective(batch) -> {"loss", "accuracy", "robust", "kl"} for an episode of `EpisodeBatches`.

    "robust" is the accuracy on the attacked queries. Budget and random start are functions of the seed and the number of the
    episode. The parameters are not changed. corrupt: Function that corrupts the queries, for an adversary with the norm
    "corruption".
    """

    flat: Tensor

    def __init__(self, proto: ProtoNet, adversary: Adversary, corrupt: Corrupt | None = None) -> None:
        super().__init__()
        if corrupt is None and adversary.norm == CORRUPTION:
            raise UserError("adversary: norm corruption without a function that corrupts; give `corrupt`.")
        self.proto, self.adversary, self.corrupt = proto, adversary, corrupt
        self.register_buffer("flat", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return scalars of support (s, 3, h, w), support_labels (s,), query (m, 3, h, w), query_labels (m,) and number ()."""
        support, truth, query, labels = (batch[name] for name in ("support", "support_labels", "query", "query_labels"))
        number, adversary = int(batch["number"]), self.adversary
        strength = min(1.0, (number + 1) / adversary.warmup) if adversary.warmup else 1.0
        gamma = 0.0 if adversary.weight_attack == "none" else strength * adversary.gamma
        named = self.proto.backbone.named_parameters()
        factors = {name: p for name, p in named if name.endswith(("lora_A", "lora_B")) and p.requires_grad}

        # ---- at theta: the input attack needs the predictions, the weight attack their graph
        if gamma and adversary.support == "clean":  # the graph of these prototypes outlives the graph of the queries
            of_support, features = self.proto.backbone(support), self.proto.backbone(query)
        else:
            of_support, features = self.proto.features(support, query)
        centres = self.proto.centres(of_support, truth)
        clean = self._score(features, centres)
        attacked = self._attack_input(query, clean, centres, number, strength)
        adversarial = clean
        if attacked is not None:
            attacked_features = self.proto.backbone(attacked)
            adversarial = self._score(attacked_features, centres)
        self._watch(clean)
        metrics = {"accuracy": _accuracy(clean, labels), "robust": _accuracy(adversarial, labels)}
        if not gamma or not factors:
            loss, kl = self._value(clean, adversarial, labels)
            return {"loss": loss, **metrics, "kl": kl.detach()}

        # ---- nu: in the code's form the prototypes are constant during the ascent
        if adversary.support == "clean":
            clean = self._score(features, centres.detach())
            adversarial = clean if attacked is None else self._score(attacked_features, centres.detach())
        joint = adversary.weight_attack == "joint"
        ascended = self._value(clean, adversarial, labels)[0] if joint else F.cross_entropy(adversarial, labels)
        nu = weight_perturbation(ascended, factors, gamma, form="normalised" if joint else "plain")

        # ---- at theta + nu
        images = [query] if attacked is None else [query, attacked]
        if joint:
            moved = {name: p + nu[name] for name, p in factors.items()}
            classes = (centres, truth, None if adversary.support == "clean" else support)
            loss, kl = self._moved(moved, classes, images, labels, self.proto.scale)
        else:
            loss, kl = self._separate_passes(factors, nu, (support, truth), images, labels)
        return {"loss": loss, **metrics, "kl": kl.detach()}

    def _separate_passes(
        self,
        factors: Mapping[str, Tensor],
        nu: Mapping[str, Tensor],
        task: tuple[Tensor, Tensor],
        images: list[Tensor],
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return loss and KL of the paper's form.

        A learns from the loss in which only A is moved, and B from the loss in which only B is moved. Other trainable parameters
        learn in the pass of A. The value is the loss of the pass of A, and the gradient is the sum of both passes. task: Images
        and labels of the support.
        """
        support, truth = task
        passes = []
        for kind in ("lora_A", "lora_B"):
            parameters = factors if kind == "lora_A" else dict(self.proto.backbone.named_parameters())
            live = {name: p if name.endswith(kind) else p.detach() for name, p in parameters.items()}
            moved = {name: p + nu[name] if name in nu and name.endswith(kind) else p for name, p in live.items()}
            classes: tuple[Tensor | None, Tensor, Tensor | None] = (None, truth, support)
            if self.adversary.support == "clean":
                centres = self.proto.centres(functional_call(self.proto.backbone, live, (support,)), truth)
                classes = (centres, truth, None)
            scale = self.proto.scale if kind == "lora_A" else self.proto.scale.detach()
            passes.append(self._moved(moved, classes, images, labels, scale))
        (loss, kl), (second, _) = passes
        return loss + second - second.detach(), kl

    def collapsed(self, step: int) -> None:
        """Raise Diverged if the last episodes all had a flat prediction. Synchronises with the device."""
        if int(self.flat) >= PATIENCE:
            raise Diverged(
                f"train: collapsed to one answer for every image (seen at step {step}, {int(self.flat)} episodes in a row): the "
                "adversary is too strong for so short a training. Lower train.lr, pool.weight or this level, or raise "
                "pool.warmup and train.warmup."
            )

    def _attack_input(
        self, query: Tensor, clean: Tensor, centres: Tensor, number: int, strength: float
    ) -> Tensor | None:
        adversary = self.adversary
        generator = torch.Generator().manual_seed(mix_seed(adversary.seed, "attack", number))
        drawn = int(torch.randint(len(adversary.epsilons), (1,), generator=generator))
        if self.corrupt is not None and adversary.norm == CORRUPTION:
            return self.corrupt(query, int(adversary.epsilons[drawn]), mix_seed(adversary.seed, CORRUPTION, number))
        epsilon = strength * adversary.epsilons[drawn]
        if epsilon == 0:
            return None
        if adversary.norm == GAUSSIAN:
            return query + epsilon * torch.randn(query.shape, generator=generator).to(query)
        half = _attack_dtype(query)
        twin = merged_copy(self.proto.backbone, half)
        middle, scale = centres.detach(), self.proto.scale.detach()

        def logits(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, half, enabled=half is not None):
                return cosine_logits(twin(images), middle, scale)

        return pyramid_attack(
            logits,
            query,
            epsilon=epsilon,
            step_size=adversary.step_ratio * epsilon,
            steps=adversary.steps,
            levels=PLAIN if adversary.norm == "l2" else adversary.pyramid,
            norm=adversary.norm,
            generator=generator,
            clean_logits=clean,
        )

    def _moved(
        self,
        moved: Mapping[str, Tensor],
        classes: tuple[Tensor | None, Tensor, Tensor | None],
        images: list[Tensor],
        labels: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return loss and KL with the parameters in `moved` replaced.

        classes: Prototypes (N, d), support labels (s,) and support images. If there are images, the prototypes are computed
        again from them.
        """
        centres, truth, support = classes
        parts = images if support is None else [support, *images]
        features = functional_call(self.proto.backbone, dict(moved), (torch.cat(parts),)).split(
            [len(part) for part in parts]
        )
        if support is not None:
            centres, features = self.proto.centres(features[0], truth), features[1:]
        assert centres is not None  # they are given, or follow from the support
        return self._value(
            cosine_logits(features[0], centres, scale), cosine_logits(features[-1], centres, scale), labels
        )

    def _score(self, features: Tensor, centres: Tensor) -> Tensor:
        return cosine_logits(features, centres, self.proto.scale)

    def _value(self, clean: Tensor, adversarial: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return trades(clean, adversarial, labels, self.adversary.weight, self.adversary.kl)

    @torch.no_grad()
    def _watch(self, clean: Tensor) -> None:
        predictions = clean.float().softmax(1)
        spread = (predictions.amax(0) - predictions.amin(0)).max() * clean.shape[1]
        self.flat.copy_(torch.where(spread < _FLAT, self.flat + 1, torch.zeros_like(self.flat)))


def trades(
    clean: Tensor, adversarial: Tensor, labels: Tensor, weight: float, kl: str = "clean_adv"
) -> tuple[Tensor, Tensor]:
    """Return CE(clean, labels) + weight * mean KL, and the mean KL (Zhang et al., arXiv 1901.08573).

    clean, adversarial: Logits (m, k). labels: Labels (m,). kl: "clean_adv" for KL(p(clean) || p(adversarial)), or "adv_clean"
    for the reverse. Gradients reach both logits.
    """
    log_clean, log_adversarial = F.log_softmax(clean.float(), 1), F.log_softmax(adversarial.float(), 1)
    first, second = (log_clean, log_adversarial) if kl == "clean_adv" else (log_adversarial, log_clean)
    distance = F.kl_div(second, first, reduction="batchmean", log_target=True)
    return F.nll_loss(log_clean, labels) + weight * distance, distance


def _attack_dtype(images: Tensor) -> torch.dtype | None:
    """Return the dtype of the products in the input attack: autocast's dtype, bf16 on a CPU with units for it, or None."""
    kind = images.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    fast = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast and images.dtype == torch.float32 else None


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()
