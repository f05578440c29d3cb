"""MAML, first-order MAML and MetaSGD: start weights from which a few gradient steps on the support classify the queries.

    w_0 = w,   w_{j+1} = w_j - a * grad L(w_j; support),   minimised over w (and a in MetaSGD): L(w_J; query)

L is the mean cross-entropy. Finn et al., arXiv 1703.03400 (maml, fomaml), and Li et al., arXiv 1707.09835 (metasgd):

    maml       differentiates through the steps
    fomaml     takes the gradient of each step as a constant
    metasgd    differentiates, and also learns a, one rate for each entry of each parameter. The rates start at inner_lr. In the
               paper they start at random values

Two engines give equal numbers. "func" is implemented here on torch.func. "learn2learn" runs the library, with the plain
attention kernel, which has a second derivative. It leaves frozen parameters out, and a task does not change buffers. Parameters
that require a gradient when the net is built are adapted. The others (a frozen backbone under low-rank factors) are never
adapted. Buffers, such as the statistics of batch norm, follow the mode: meta-training updates the buffers of the learner in
every forward pass, of support and of queries. `classifier` works on copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import skip_init

from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import adapter_tensors, check_tensors
from vismt.lowrank.model.record import record_of
from vismt.metatune.functional import WithWeights
from vismt.metatune.protonet import EpisodeObjective
from vismt.metatune.settings import MamlSettings

Tensors = dict[str, Tensor]
# (module, tensors that replace the module's) -> loss of the support set
_Loss = Callable[[nn.Module, Tensors], Tensor]


class LinearLearner(nn.Module):
    """A backbone and a linear head: images (b, 3, h, w) in [0, 1] -> logits (b, ways).

    The head starts like nn.Linear, uniform within 1 / sqrt(d), from `seed`, with a bias of zero. It is float32 if the backbone is
    in half precision. backbone: Module from images to features (b, d), with d as its attribute `width`. Raises UserError for ways
    < 2 and an unknown width.
    """

    def __init__(self, backbone: nn.Module, ways: int, *, seed: int = 0) -> None:
        super().__init__()
        width = getattr(backbone, "width", None)
        if not isinstance(width, int):
            raise UserError(
                f"maml: {type(backbone).__name__} has no attribute width, the size of its features: set it."
            )
        if ways < 2:
            raise UserError(f"maml: a learner of {ways} ways cannot classify: ways must be at least 2.")
        self.backbone, self.seed = backbone, seed
        reference = next(backbone.parameters(), torch.empty(0))
        kind = torch.float64 if reference.dtype == torch.float64 else torch.float32
        self.head = skip_init(nn.Linear, width, ways, device=reference.device, dtype=kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the start values of the head, which are a function of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        ways, width = self.head.weight.shape
        self.head.weight.copy_((2 * torch.rand(ways, width, generator=generator) - 1) / math.sqrt(width))
        self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).to(self.head.weight.dtype))


class MamlNet(nn.Module):
    """A learner and its inner loop.

    learner: Module from images (b, 3, h, w) to logits (b, N), with a fixed N. It is referenced, not copied. Its parameters that
    require a gradient now are adapted. rates: Learned rates of MetaSGD, a Parameter of the same shape for each adapted parameter,
    in the same order. Empty for the other algorithms. Raises UserError for settings out of range, a missing learn2learn, a
    compiled learner and a learner without a trainable parameter.
    """

    def __init__(self, learner: nn.Module, settings: MamlSettings) -> None:
        super().__init__()
        for path, module in learner.named_modules():
            if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
                raise UserError(
                    f"maml: '{path or type(learner).__name__}' is compiled: torch.compile has no second derivative and its "
                    "modules cannot be cloned; pass the learner before torch.compile."
                )
        if settings.engine == "learn2learn":
            _learn2learn()
        trainable = {name: value for name, value in learner.named_parameters() if value.requires_grad}
        if not trainable:
            raise UserError(
                f"maml: nothing is trainable in {type(learner).__name__}: the inner loop needs a trainable parameter."
            )
        self.learner, self.settings, self.adapted = learner, settings, tuple(trainable)
        learned = trainable.values() if settings.algorithm == "metasgd" else ()
        self.rates = nn.ParameterList(nn.Parameter(torch.empty_like(value)) for value in learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every learned rate to inner_lr. The learner is not changed."""
        for rate in self.rates:
            nn.init.constant_(rate, self.settings.inner_lr)

    def forward(self, support_images: Tensor, support_labels: Tensor, query_images: Tensor) -> Tensor:
        """Return query logits (M, N) after the inner loop, from (s, 3, h, w), (s,) and (M, 3, h, w).

        Gradients reach the start weights and the rates.
        """
        adapted = self._adapt(support_images, support_labels, {}, attached=torch.is_grad_enabled())
        return functional_call(self.learner, adapted, (query_images,))

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> WithWeights:
        """Return the query classifier of a task, adapted in the current mode of the learner. The learner is not changed.

        The whole support set is one batch of every inner step. Also works under no_grad.
        """
        buffers = {name: value.detach().clone() for name, value in self.learner.named_buffers()}
        adapted = self._adapt(support_images, support_labels, buffers, attached=False)
        return WithWeights(self.learner, {**buffers, **adapted})

    def own_tensors(self) -> Tensors:
        """Return the tensors that a run saves with the adapter: adapted parameters outside its file, and rates by parameter."""
        saved = {
            f"{path}.{name}".lstrip(".")
            for path, module in self.learner.named_modules()
            if record_of(module) is not None
            for name in adapter_tensors(module)
        }
        parameters = dict(self.learner.named_parameters())
        tensors = {name: parameters[name] for name in self.adapted if name not in saved}
        return tensors | {f"rates.{name}": rate for name, rate in zip(self.adapted, self.rates)}

    @torch.no_grad()
    def load_own_tensors(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Copy the `own_tensors` of another net. what: Name of the source in the UserError for tensors that do not fit."""
        targets = self.own_tensors()
        check_tensors(what, {name: tuple(value.shape) for name, value in targets.items()}, tensors)
        for name, value in targets.items():
            value.copy_(tensors[name])

    def _adapt(self, images: Tensor, labels: Tensor, buffers: Tensors, *, attached: bool) -> Tensors:
        """Return the adapted parameters after the inner loop.

        attached: Whether they keep the graph to the start weights and the rates.
        """
        if labels.shape != images.shape[:1] or not len(labels):
            shapes = f"images {tuple(images.shape)}, labels {tuple(labels.shape)}"
            raise UserError(f"maml: support of {shapes}: need (s, 3, h, w) and (s,), s > 0.")
        ways = int(labels.max()) + 1

        def loss(module: nn.Module, tensors: Tensors) -> Tensor:
            logits = functional_call(module, tensors, (images,))
            if logits.ndim != 2 or logits.shape[1] != ways:
                outputs = logits.shape[1] if logits.ndim == 2 else tuple(logits.shape)
                raise UserError(
                    f"maml: the episode has {ways} ways, the learner {outputs} outputs, a fixed number: draw episodes of as "
                    f"many ways, or build the learner with ways={ways}."
                )
            return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)

        rates: list = [rate if attached else rate.detach() for rate in self.rates]
        rates = rates or [self.settings.inner_lr] * len(self.adapted)
        second_order = attached and self.settings.algorithm != "fomaml"
        steps = self._func_steps if self.settings.engine == "func" else self._learn2learn_steps
        # The fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext():
            return steps(loss, rates, buffers, attached, second_order)

    def _func_steps(self, loss: _Loss, rates: list, buffers: Tensors, attached: bool, second_order: bool) -> Tensors:
        start = dict(self.learner.named_parameters())
        now = {}
        for name in self.adapted:
            value = start[name] if attached and start[name].requires_grad else start[name].detach()
            now[name] = value.requires_grad_()
        for _ in range(self.settings.inner_steps):
            support = loss(self.learner, {**buffers, **now})
            gradients = torch.autograd.grad(support, list(now.values()), create_graph=second_order, allow_unused=True)
            now = {
                name: value if gradient is None else value - rate * gradient
                for (name, value), rate, gradient in zip(now.items(), rates, gradients)
            }
        return now

    def _learn2learn_steps(
        self, loss: _Loss, rates: list, buffers: Tensors, attached: bool, second_order: bool
    ) -> Tensors:
        library = _learn2learn()
        with torch.set_grad_enabled(attached):
            clone = library.clone_module(self.learner)
        for name, value in clone.named_parameters():
            if name in self.adapted and not value.requires_grad:
                value.requires_grad_()
        # Without both flags a frozen parameter raises an UnboundLocalError.
        flags = {"first_order": not second_order, "allow_unused": True, "allow_nograd": True}
        maml = library.algorithms.MAML(clone, self.settings.inner_lr, **flags)
        for _ in range(self.settings.inner_steps):
            if not self.rates:
                maml.adapt(loss(clone, buffers))
                continue
            # The library's MetaSGD fails on frozen parameters and separates shared weights. Its MAML update does neither.
            moved = {name: value for name, value in clone.named_parameters() if name in self.adapted}
            support = loss(clone, buffers)
            gradients = torch.autograd.grad(support, list(moved.values()), create_graph=second_order, allow_unused=True)
            updates = {name: rate * g for name, rate, g in zip(moved, rates, gradients) if g is not None}
            library.algorithms.maml.maml_update(clone, 1.0, [updates.get(name) for name, _ in clone.named_parameters()])
        now = dict(clone.named_parameters())
        return {name: now[name] for name in self.adapted}


class MamlObjective(EpisodeObjective):
    """objective(batch) -> {"loss", "accuracy"} of the queries after the inner loop, for a batch of `EpisodeBatches`.

    `proto` is the MamlNet, so MetaSGD's rates and the learner's trainable parameters are parameters of the objective.
    """

    def __init__(self, learner: nn.Module, settings: MamlSettings) -> None:
        super().__init__(MamlNet(learner, settings))


def _learn2learn() -> ModuleType:
    try:
        with redirect_stderr(StringIO()):  # gym, which it imports, prints a notice about itself
            import learn2learn
    except ImportError as error:
        raise UserError(
            "maml.engine: 'learn2learn' needs learn2learn: pip install \"vismt[meta]\" (Python 3.11 or later: pip install -r "
            f"requirements.txt), or use engine 'func', which computes the same ({error})."
        ) from error
    return learn2learn
