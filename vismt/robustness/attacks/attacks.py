"""Adversarial images of any classifier: PGD, FGSM, APGD, FAB-T, Square, AutoAttack and `strong`, each with restarts.

The model takes pixels in [0, 1] and normalises them itself. While an attack runs, the model is frozen, in eval mode and outside
autocast. Afterwards its flags and the random state are as before. An image that is wrong when clean, or that a step, restart,
target or part of an ensemble has broken, is not attacked further (active_set.py).

AutoAttack (Croce and Hein, arXiv 2003.01690) is APGD-CE, APGD-T and FAB-T with 100 steps and at most 9 targets, and Square with
5,000 queries. `strong` is its cheap form, the worst case of APGD-CE and APGD-T with 20 steps. APGD-T is not defined below 4
classes. Both are then APGD-CE with 5 restarts, FAB-T and Square, which the text of the condition names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, near
from vismt.base.norm_balls import NORMS, PIXELS, within_budget
from vismt.base.seeds import mix_seed
from vismt.config.sections import fraction
from vismt.config.typed import Checked, within
from vismt.lowrank.contexts import evaluating
from vismt.metatune.functional import answers
from vismt.robustness.attack_settings import AttackSettings
from vismt.robustness.attacks.active_set import Outcome, Round, waves
from vismt.robustness.attacks.fab import fab
from vismt.robustness.attacks.foreign import ATTACKS, L2_ENDING, PREFIX, foreign
from vismt.robustness.attacks.losses import cross_entropy, dlr, targeted_dlr
from vismt.robustness.attacks.pgd import apgd, pgd
from vismt.robustness.attacks.square import square
from vismt.robustness.attacks.victim import Victim, frozen


@dataclass(frozen=True)
class _Kind:
    """The text of an attack in tables, its default length and restarts, and the norms and classes that it needs."""

    text: str
    steps: int = 100
    restarts: int = 1
    norms: tuple[str, ...] = NORMS
    classes: int = 2
    has_step: bool = False  # whether step_size is used


KINDS = {
    "pgd": _Kind("PGD", 10, 2, has_step=True),
    "pgd_paper": _Kind("PGD paper protocol", 10, has_step=True),
    "fgsm": _Kind("FGSM", 1),
    "apgd_ce": _Kind("APGD-CE"),
    "apgd_dlr": _Kind("APGD-DLR", classes=3),
    "apgd_t": _Kind("APGD-T", classes=4),
    "fab": _Kind("FAB-T"),
    "square": _Kind("Square", 5000, norms=("linf", "l2")),
    "autoattack": _Kind("AutoAttack", norms=("linf", "l2")),
    "strong": _Kind("strong", 20),
}
ENSEMBLES = ("autoattack", "strong")
FOREIGN = _Kind("", 10, has_step=True)  # an attack of ATTACKS
FOREIGN_L2 = replace(FOREIGN, norms=("l2",))
TARGETS = 9
FEW_WAYS = 4  # below this number of classes the ensembles have other parts
FEW_WAY_RESTARTS = 5
QUERIES = {"autoattack": 5000, "strong": 1000}  # of Square in an ensemble


def radius_text(norm: str, epsilon: float) -> str:
    """Return a radius as in tables, "4.5/255" in linf and "0.5" in other norms."""
    return f"{epsilon * 255:.6g}/255" if norm == "linf" else f"{epsilon:.6g}"


def budget_text(norm: str, epsilon: float) -> str:
    """Return a budget as in tables, "linf 4.5/255" or "l2 0.5"."""
    return f"{norm} {radius_text(norm, epsilon)}"


@dataclass(frozen=True)
class AttackSpec(AttackSettings, Checked):
    """One attack and its budget, in numbers.

    Args:
        name: pgd, pgd_paper (step epsilon / 10 and one restart, the protocol of the few-shot papers), fgsm, apgd_ce, apgd_dlr,
            apgd_t, fab, square, autoattack, strong, torchattacks:NAME, or a name of ATTACKS.
        epsilon: Radius in pixel units of [0, 1], as a number or as text such as "8/255".
        step_size: Step in the same units. None means 2.5 epsilon / steps. Only PGD and torchattacks use it.
        steps: Number of steps. None means 10 (FGSM always 1, APGD and FAB 100, Square 5000 queries, strong 20).
        norm: "linf", "l2" or "l1".
        restarts: Number of restarts. None means 1 (for pgd 2).
        random_start: Whether PGD starts at a random point.

    Raises:
        UserError: For an unknown name or norm, a norm that the attack does not have, a negative radius, or a step of zero.
    """

    epsilon: Annotated[float, within(0, unit=PIXELS)] = 4.5 / 255
    step_size: float | None = None
    seed: int = 0
    KEY: ClassVar = "attack"
    kind: ClassVar[Literal["attack"]] = "attack"
    # The clean image is inside every budget, so an example that is wrong there is not robust.
    worst_case: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("epsilon", "step_size"):
            value = getattr(self, key)
            if isinstance(value, str):
                object.__setattr__(self, key, fraction(value, f"attack.{key}"))
        super().__post_init__()
        if self.name not in KINDS and self.name not in ATTACKS:
            raise UserError(f"attack '{self.name}' is not known.{near(self.name, (*KINDS, *ATTACKS, PREFIX))}")
        if self.norm not in self._kind.norms:
            raise UserError(
                f"attack {self.name}: no {self.norm} form, it has {' and '.join(self._kind.norms)}; change the norm, or "
                "take apgd_ce, apgd_t, fab or strong."
            )
        if self.steps is None or self.name == "fgsm":  # which is a single step, whatever the length of the others
            object.__setattr__(self, "steps", self._kind.steps)
        if self.restarts is None:
            object.__setattr__(self, "restarts", self._kind.restarts)
        for key, value in (("epsilon", self.epsilon), ("step_size", self.step_size or 0.0)):
            if self.norm == "linf" and value > 1:
                raise UserError(
                    f"attack {self.name}: {key} {value:g} is more than all of [0, 1]; do you mean '{value:g}/255'?"
                )
        if not self.step > 0 and self.epsilon:
            raise UserError(f"attack {self.name}: step_size {self.step_size}; it must be above 0, in {PIXELS}.")

    @property
    def _kind(self) -> _Kind:
        l2 = self.name.startswith(PREFIX) and self.name.endswith(L2_ENDING)
        return KINDS.get(self.name, FOREIGN_L2 if l2 else FOREIGN)

    @property
    def length(self) -> int:
        """Number of steps."""
        return self.steps or 0

    @property
    def step(self) -> float:
        """Step size in pixel units."""
        if self.step_size is not None:
            return self.step_size
        if self.name == "pgd_paper":
            return self.epsilon / 10
        return 2.5 * self.epsilon / max(self.length, 1)

    @property
    def packs(self) -> bool:
        """Whether one run may attack the images of several few-shot tasks."""
        return self.name in KINDS

    @property
    def family(self) -> str:
        """The attack's name in tables, without its settings."""
        if self.name.startswith(PREFIX):
            return f"{self.name.removeprefix(PREFIX)} (torchattacks)"
        return self._kind.text if self.name in KINDS else self.name

    @property
    def label(self) -> str:
        """The text of the condition, "PGD-10 linf 4.5/255", with settings that differ from the default."""
        return self.describe()

    def describe(self, num_classes: int | None = None) -> str:
        """Return `label`, with the parts of an ensemble that run on fewer than 4 classes."""
        head, _, tail = self.family.partition(" ")
        text = f"{head}-{self.steps}" if self.name.startswith("pgd") or self.steps != self._kind.steps else head
        text += f" {tail}" if tail else ""
        if self.name in ENSEMBLES and num_classes is not None and num_classes < FEW_WAYS:
            text += f" (APGD-CE x{FEW_WAY_RESTARTS}+FAB-T+Square)"
        text += f" {budget_text(self.norm, self.epsilon)}"
        if self._kind.has_step and not math.isclose(self.step, replace(self, step_size=None).step):
            text += f" step {self.step * 255:.4g}/255" if self.norm == "linf" else f" step {self.step:.4g}"
        if self.restarts != self._kind.restarts:
            text += f" {self.restarts} restart{'s' if self.restarts != 1 else ''}"
        if not self.random_start and self.name.startswith("pgd"):
            text += " no random start"
        return text + (f" seed {self.seed}" if self.seed else "")

    def __str__(self) -> str:
        return self.label

    def check_classes(self, num_classes: int) -> None:
        """Raise UserError if the attack's loss is not defined for so few classes."""
        if num_classes < self._kind.classes:
            raise UserError(
                f"attack {self}: its loss needs {self._kind.classes} classes, here are {num_classes}: take apgd_ce, or strong."
            )

    def settings(self) -> dict[str, object]:
        """Return every field, for a protocol's hash."""
        return asdict(self)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, **how: object) -> Tensor:
        """Return the images of `search` on the device of the clean images. The arguments are the arguments of `search`."""
        return self.search(model, images, labels, **how).adversarial.to(images.device)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, **how: Any) -> Outcome:
        """Return the attacked images, and which of them the attack counts as broken. Arguments are as for `_run`."""
        return _run(model, images, labels, [self], **how)


def attack(model: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec, *, num_classes: int) -> Tensor:
    """Return adversarial images within spec.epsilon of `images`.

    The result is a function of spec.seed and the position of each image. The global random state is not changed.

    Args:
        model: Module that maps images to logits (b, num_classes) and normalises them itself. Its mode and its parameters' flags
            are restored afterwards.
        images: Images, float (b, 3, h, w) in [0, 1].
        labels: Integers (b,) in 0..num_classes-1.
        spec: The attack. With epsilon 0 the images are returned.
        num_classes: Number of logits.

    Returns:
        Images, float32 (b, 3, h, w) in [0, 1], on the images' device. An image that is wrong when clean is returned unchanged.
        For an image that withstands the attack, the trial that came closest to another class is returned.

    Raises:
        UserError: For pixels outside [0, 1], labels or logits that do not fit num_classes, logits or gradients that are not
            finite, probabilities in place of logits, a model without a gradient, or fewer classes than the attack needs.
    """
    return spec.perturb(model, images, labels, num_classes=num_classes, keys=[(0, i) for i in range(len(images))])


def robust_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, specs: Sequence[AttackSpec], *, num_classes: int, batch: int = 128
) -> Tensor:
    """Return the worst case over a list of attacks: whether the clean and every attacked image is right, bool (b,).

    The mean of the result is the robust accuracy. The attacked images are evaluated once more, and this answer counts. An image
    that one attack broke is not given to the next attack, so list cheap attacks first.

    Args:
        model: Module as for `attack`.
        images: Images, float (b, 3, h, w) in [0, 1].
        labels: Integers (b,) in 0..num_classes-1.
        specs: Attacks. Without attacks, the result says which clean images are right.
        num_classes: Number of logits.
        batch: Largest number of images in one forward pass.

    Raises:
        UserError: As for `attack`, and for a model that answers differently from call to call.
    """
    keys = [(0, i) for i in range(len(images))]
    outcome = _run(model, images, labels, specs, num_classes=num_classes, keys=keys, batch=batch)
    with evaluating(model), torch.no_grad():
        logits = torch.cat([answers(model, part) for part in outcome.adversarial.split(batch)])
    outcome.lost(logits, _named(specs))
    right = torch.stack([found.argmax(1) == outcome.labels for found in (outcome.logits, logits)])
    return right.all(0).to(images.device)


def _run(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    specs: Sequence[AttackSpec],
    *,
    num_classes: int,
    keys: Sequence[tuple[int, int]],
    batch: int = 128,
    exhaust: bool = False,
) -> Outcome:
    """Run attacks one after the other on the images that are still right.

    keys: Key of each image. The random numbers of the image are a function of it. exhaust: Whether every image is attacked to the
    end, broken or not. This is for images that are evaluated on another model.
    """
    clean = images.detach().float().clone()
    what = _named(specs)
    _check_input(clean, labels, what, num_classes)
    for spec in specs:
        spec.check_classes(num_classes)
    device = next((p.device for p in model.parameters()), clean.device)
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        victim = Victim(model, num_classes, what)
        placed, seeds = (clean.to(device), labels.detach().to(device).long()), [mix_seed(*key) for key in keys]
        outcome = Outcome.start(victim, *placed, seeds, batch, exhaust=exhaust)
        for spec in specs:
            _attack(victim, outcome, spec, batch)
    return outcome


def _named(specs: Sequence[AttackSpec]) -> str:
    return ", ".join(str(spec) for spec in specs) or "none"


def _attack(victim: Victim, outcome: Outcome, spec: AttackSpec, batch: int) -> None:
    if spec.epsilon == 0:
        return
    active = outcome.active
    outcome.forget(active)
    for part in _parts(spec, victim.num_classes):
        rounds, trial = _rounds(part, victim.num_classes), _trial(part)
        for wave in waves(outcome, rounds, batch, f"{part.name} {spec.seed}"):
            trial(victim, wave)
    if bool(active.any()):
        outcome.adversarial[active] = within_budget(
            outcome.clean[active], outcome.adversarial[active], spec.epsilon, spec.norm, spec
        )


def _parts(spec: AttackSpec, num_classes: int) -> Iterator[AttackSpec]:
    """Yield the attacks of an ensemble, or the attack itself."""
    if spec.name not in ENSEMBLES:
        yield spec
        return
    few = num_classes < FEW_WAYS
    yield replace(spec, name="apgd_ce", restarts=max(spec.restarts or 1, FEW_WAY_RESTARTS if few else 1))
    if not few:
        yield replace(spec, name="apgd_t")
    if few or spec.name == "autoattack":
        yield replace(spec, name="fab")
        if spec.norm != "l1":
            yield replace(spec, name="square", steps=QUERIES[spec.name])


def _rounds(spec: AttackSpec, num_classes: int) -> list[Round]:
    """Return the restarts of an attack, for each target class if the attack has targets."""
    restarts = range(spec.restarts or 1)
    if spec.name not in KINDS:
        return [Round(0)]  # with all of its restarts
    if spec.name not in ("apgd_t", "fab"):
        return [Round(restart) for restart in restarts]
    return [Round(restart, rank) for rank in range(1, min(TARGETS, num_classes - 1) + 1) for restart in restarts]


def _trial(spec: AttackSpec) -> Callable[..., None]:
    """Return the function that runs one wave of an attack."""
    budget: dict[str, Any] = {"epsilon": spec.epsilon, "norm": spec.norm}
    by_name: dict[str, Callable[..., None]] = {
        "pgd": partial(pgd, step=spec.step, steps=spec.length, start=spec.random_start),
        "fgsm": partial(pgd, step=spec.epsilon, steps=1, start=False),
        "apgd_ce": partial(apgd, steps=spec.length, loss=cross_entropy),
        "apgd_dlr": partial(apgd, steps=spec.length, loss=dlr),
        "apgd_t": partial(apgd, steps=spec.length, loss=targeted_dlr),
        "fab": partial(fab, steps=spec.length),
        "square": partial(square, queries=spec.length, seed=spec.seed),
    }
    by_name["pgd_paper"] = by_name["pgd"]
    if spec.name in by_name:
        return partial(by_name[spec.name], **budget)
    options: dict[str, Any] = {"steps": spec.length, "seed": spec.seed, "restarts": spec.restarts or 1}
    return partial(foreign, name=spec.name, step=spec.step, **options, **budget)


def _check_input(images: Tensor, labels: Tensor, what: str, num_classes: int) -> None:
    """Raise UserError unless the attack can run on images (b, 3, h, w) in [0, 1] with labels (b,) in 0..num_classes-1."""
    if images.ndim != 4 or not len(images) or labels.shape != images.shape[:1]:
        raise UserError(
            f"attack {what}: images {tuple(images.shape)}, labels {tuple(labels.shape)}: need (b, 3, h, w) and (b,)."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"attack {what}: pixels run from {low:.4g} to {high:.4g}, need [0, 1]: the model must normalise, not the data."
        )
    if num_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        span = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(f"attack {what}: labels {span} for {num_classes} classes: need 0 to {max(num_classes, 2) - 1}.")
