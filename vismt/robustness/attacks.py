"""Adversarial images of any classifier, through torchattacks (Kim, arXiv 2010.01950) and nothing else.

The model takes pixels in [0, 1] and normalises them itself. While an attack runs the model is frozen, in eval mode and
outside autocast; afterwards its flags and the random state are as before. FAB, a minimal-norm attack, keeps only what
lies within the budget. AutoAttack (Croce & Hein, arXiv 2003.01690) is APGD-CE, APGD-T, FAB-T and Square at their
published lengths (100 steps, 5000 queries; torchattacks' own bundle takes 10 steps); below 4 classes, where its targeted
loss is not defined, it is APGD-CE, FAB and Square, which the condition's text names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.robustness.checks import check_input, within_budget

TEXTS = {
    "pgd": "PGD",
    "pgd_l2": "PGD",
    "fgsm": "FGSM",
    "mifgsm": "MI-FGSM",
    "difgsm": "DI-FGSM",
    "tifgsm": "TI-FGSM",
    "apgd_ce": "APGD-CE",
    "apgd_t": "APGD-T",
    "fab": "FAB",
    "square": "Square",
    "autoattack": "AutoAttack",
}
NORMS = {"linf": "Linf", "l2": "L2"}
EITHER_NORM = {"apgd_ce", "apgd_t", "fab", "square", "autoattack"}
# Steps when none are given (10 else); AutoAttack's Square always has AUTO_QUERIES.
STEPS = {"fgsm": 1, "square": 5000, "autoattack": 100}
AUTO_QUERIES = 5000


@dataclass(frozen=True)
class AttackSpec:
    """One attack and its budget.

    name: pgd, pgd_l2, fgsm, mifgsm, difgsm, tifgsm (transfer), apgd_ce, apgd_t, fab, square, autoattack. epsilon: radius
    in pixel units of [0, 1]. step_size: None = epsilon / 10; attacks that choose their own steps do not use it. steps:
    None = 10 (FGSM 1, Square 5000 queries, AutoAttack 100). norm: "linf" or "l2"; pgd with "l2" is pgd_l2. random_start:
    PGD only. Raises UserError for an unknown name or norm, a norm that the attack does not have, a negative radius, a step
    of zero.
    """

    name: str = "pgd"
    epsilon: float = 4.5 / 255
    step_size: float | None = None
    steps: int | None = None
    norm: str = "linf"
    random_start: bool = True
    seed: int = 0
    kind: ClassVar[Literal["attack"]] = "attack"
    # The clean image is inside every budget, so an example that is wrong there is not robust.
    worst_case: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name not in TEXTS:
            raise UserError(f"attack '{self.name}' is not known.{near(self.name, TEXTS)}")
        if self.norm not in NORMS:
            raise UserError(f"attack {self.name}: norm '{self.norm}' is not known.{near(self.norm, NORMS)}")
        if self.name == "pgd" and self.norm == "l2":
            object.__setattr__(self, "name", "pgd_l2")
        if self.name == "pgd_l2":
            object.__setattr__(self, "norm", "l2")
        elif self.norm == "l2" and self.name not in EITHER_NORM:
            raise UserError(f"attack {self.name}: no l2 form; take one of {', '.join(sorted(EITHER_NORM))}, pgd_l2.")
        if self.steps is None:
            object.__setattr__(self, "steps", STEPS.get(self.name, 10))
        if self.norm == "linf" and self.epsilon > 1:
            meant = f"{self.epsilon:g}/255"
            raise UserError(
                f"attack {self.name}: epsilon {self.epsilon:g} is more than all of [0, 1]; do you mean '{meant}'?"
            )
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0) or self.steps < 1 or self.step <= 0 < self.epsilon:
            raise UserError(
                f"attack {self.name}: epsilon {self.epsilon}, steps {self.steps}, step_size {self.step_size}: "
                "need epsilon >= 0 (in pixel units of [0, 1]), steps >= 1, step_size > 0."
            )

    @property
    def step(self) -> float:
        """Step size in pixel units."""
        return self.epsilon / 10 if self.step_size is None else self.step_size

    @property
    def label(self) -> str:
        """The condition's text, "PGD-10 linf 4.5/255"; settings that are not the default follow."""
        return self.describe()

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`, with the parts of an AutoAttack that run on fewer than 4 classes."""
        text = TEXTS[self.name]
        if self.name != "fgsm" and self.steps != STEPS.get(self.name):
            text += f"-{self.steps}"
        if self.name == "autoattack" and num_classes is not None and num_classes < 4:
            text += " (APGD-CE+FAB+Square)"
        text += f" {self.norm} " + (f"{self.epsilon * 255:.6g}/255" if self.norm == "linf" else f"{self.epsilon:.6g}")
        if self.step_size is not None and not math.isclose(self.step_size, self.epsilon / 10):
            text += f" step {self.step_size * 255:.4g}/255" if self.norm == "linf" else f" step {self.step_size:.4g}"
        if not self.random_start and self.name in ("pgd", "pgd_l2"):
            text += " no random start"
        return text + (f" seed {self.seed}" if self.seed else "")

    def __str__(self) -> str:
        return self.label

    def settings(self) -> dict[str, object]:
        """Return every field, for a protocol's hash."""
        return asdict(self)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, seed: int) -> Tensor:
        """Return what `attack` returns with `seed` in place of the spec's seed."""
        return _attack(model, images, labels, self, num_classes, seed)


def attack(model: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec, *, num_classes: int) -> Tensor:
    """Return adversarial images within spec.epsilon of `images`.

    Deterministic in spec.seed; the global random state is not changed.

    Args:
        model: Maps images to logits (b, num_classes) and normalises them itself. Its mode and its parameters' flags are
            restored afterwards.
        images: float (b, 3, h, w) in [0, 1].
        labels: Integers (b,) in 0..num_classes-1.
        spec: The attack. With epsilon 0 the images are returned.
        num_classes: Number of logits.

    Returns:
        float32 (b, 3, h, w) in [0, 1] on the images' device.

    Raises:
        UserError: Pixels outside [0, 1], labels or logits that do not fit num_classes, logits that are not finite, fewer
            than 2 classes, apgd_t below 4, or image sides that l2 Square cannot tile.
    """
    return _attack(model, images, labels, spec, num_classes, spec.seed)


def _attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    num_classes: int,
    seed: int,
) -> Tensor:
    clean = images.detach().float().clone()
    check_input(clean, labels, spec, num_classes)
    device = next((p.device for p in model.parameters()), clean.device)
    with _frozen(model), torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        victim = _Victim(model, device)
        victim.training = False  # the mode that torchattacks restores
        start, truth = clean.to(device), labels.detach().to(device).long()
        with torch.no_grad():
            logits = victim(start[:1])
        if logits.shape[1:] != (num_classes,) or not bool(logits.isfinite().all()):
            output = f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}"
            raise UserError(f"attack {spec}: the model gives {output}; need finite (b, {num_classes}).")
        if spec.epsilon == 0:
            return clean.to(images.device)
        with _seeded(seed):
            adversarial = _build(spec, victim, num_classes, seed)(start, truth).detach().float()
    return within_budget(start, adversarial, spec).to(images.device)


class _Victim(nn.Module):
    """The model in the form that torchattacks needs: a Module with a parameter on its device, float32 in and out."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.marker = nn.Parameter(torch.zeros((), device=device), requires_grad=False)
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self.inner = model

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.to(self.dtype)).float()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode without trainable parameters, on which FAB would leave gradients; restore every flag."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, trainable in parameters:
            parameter.requires_grad_(trainable)
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fork and seed the torch generators: some attacks reset the global seed, and that of every CUDA device."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _build(spec: AttackSpec, victim: _Victim, num_classes: int, seed: int) -> Any:
    library = _torchattacks()
    radius, steps = spec.epsilon, spec.steps
    stepped = {"eps": radius, "alpha": spec.step, "steps": steps}
    budget = {"eps": radius, "norm": NORMS[spec.norm], "seed": seed % 2**31}
    if spec.name == "pgd":
        return library.PGD(victim, **stepped, random_start=spec.random_start)
    if spec.name == "pgd_l2":
        return library.PGDL2(victim, **stepped, random_start=spec.random_start)
    if spec.name == "fgsm":
        return library.FGSM(victim, eps=radius)
    if spec.name in ("mifgsm", "difgsm", "tifgsm"):
        return getattr(library, spec.name.upper())(victim, **stepped)
    if spec.name == "square":
        return library.Square(victim, **budget, n_queries=steps)
    cross_entropy = library.APGD(victim, **budget, steps=steps, loss="ce")
    if spec.name == "apgd_ce":
        return cross_entropy
    few, targets = num_classes < 4, min(num_classes, 10)  # AutoAttack targets the 9 nearest classes
    nearest = spec.name == "autoattack" and not few
    boundary = library.FAB(victim, **budget, steps=steps, n_classes=targets, multi_targeted=nearest)
    if spec.name == "fab":
        return boundary
    targeted = None if few else library.APGDT(victim, **budget, steps=steps, n_classes=targets)
    if spec.name == "apgd_t":
        return targeted
    square = library.Square(victim, **budget, n_queries=AUTO_QUERIES)
    return library.MultiAttack([part for part in (cross_entropy, targeted, boundary, square) if part is not None])


def _torchattacks() -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise UserError('attacks need torchattacks: pip install "torchattacks>=3.5.1".') from error
    return torchattacks
