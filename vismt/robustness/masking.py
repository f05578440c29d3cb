"""Checks that an attack is strong enough to measure robustness (Athalye et al., arXiv 1802.00420; Carlini et al., 1902.06705).

Growing radii. No model can stay right if 64/255 may be added to every pixel, because the images of two classes then meet. In l2
and l1 the last radius is the norm of such a change, 64/255 sqrt(n) and 64/255 n for images of n numbers. An attack follows
misleading gradients if it leaves the accuracy above chance there, or does worse with a larger budget.

Reach. An attack whose steps cannot cross the ball from one side to the other depends on its start.

Gap. PGD minus `strong` on the same images. PGD may be weak although the gradients are honest. Only a stronger attack shows this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.norm_balls import size_of_all
from vismt.metatune.protocol.episode_runner import FewShotModel, PixelStore, Sampler
from vismt.metatune.protocol.protocol import run_protocol
from vismt.robustness.attacks.attacks import AttackSpec, radius_text
from vismt.robustness.evaluate import RepeatableBatches, evaluate_classifier
from vismt.uncertainty.intervals import mean_interval

_LARGEST = 64 / 255  # change of every pixel
RADII = (0.0, 1 / 255, 2 / 255, 4.5 / 255, 8 / 255, 16 / 255, _LARGEST)
CROSSING = 2.0  # radii that the steps must add up to
SLACK = 0.02  # the accuracy may rise by this much from one radius to the next


@dataclass(frozen=True)
class MaskingCheck:
    """Accuracy by radius over n images (episodes), and whether it behaves as under an attack with honest gradients.

    The accuracy under this attack does not measure robustness if monotone, reaches_chance or reach fails.

    monotone: Whether the accuracy does not rise from one radius to the next beyond noise. reaches_chance: Whether the accuracy
    at the largest radius is not significantly above chance. reach: Sum of the attack's steps over the radius. None for attacks
    that choose their own steps. gap: Accuracy under the attack minus accuracy under `strong`, at the attack's own radius
    `gap_at`. None if it was not measured. norm: Norm of the radii.
    """

    epsilons: tuple[float, ...]
    accuracies: tuple[float, ...]
    chance: float
    n: int
    monotone: bool
    reaches_chance: bool
    reach: float | None = None
    gap: float | None = None
    gap_at: float | None = None
    norm: str = "linf"

    @property
    def crosses(self) -> bool:
        """Whether the steps can cross the ball."""
        return self.reach is None or self.reach >= CROSSING

    @property
    def passed(self) -> bool:
        return self.monotone and self.reaches_chance and self.crosses

    def verdict(self) -> str:
        """Return "pass", or "FAIL: " and what is wrong, and after it the gap to `strong` if it was measured."""
        faults = []
        if not self.monotone:
            rises = [later - earlier for earlier, later in pairwise(self.accuracies)]
            at = rises.index(max(rises))
            faults.append(f"rises from {self._point(at)} to {self._point(at + 1)}")
        if not self.reaches_chance:
            faults.append(f"still {self._point(-1)}, chance is {100 * self.chance:.1f} %")
        if not self.crosses:
            faults.append(f"its steps add up to {self.reach:.3g} radii, and crossing the ball takes {CROSSING:.3g}")
        text = f"FAIL: {'; '.join(faults)}" if faults else "pass"
        if self.gap is None or self.gap_at is None:
            return text
        gap = f"{round(100 * self.gap, 1) + 0.0:+.1f} points against strong"
        return f"{text}; {gap} at {radius_text(self.norm, self.gap_at)}"

    def _point(self, index: int) -> str:
        return f"{100 * self.accuracies[index]:.1f} % at {radius_text(self.norm, self.epsilons[index])}"


def check_masking(
    model: nn.Module,
    batches: RepeatableBatches,
    spec: AttackSpec,
    *,
    num_classes: int,
    epsilons: Sequence[float] | None = None,
    **options: Any,
) -> MaskingCheck:
    """Run an attack on a classifier at growing radii, and `strong` at the attack's own radius.

    Args:
        model: Model as for `evaluate_classifier`.
        batches: Batches as for `evaluate_classifier`.
        spec: Attack to run. Its step keeps its ratio to the radius.
        num_classes: Number of logits.
        epsilons: Radii. By default 0, half of the attack's radius, the radius, its double, and the norm of a change of every
            pixel by 64/255.
        **options: Further options of `evaluate_classifier`, such as a file of records.

    Returns:
        The check, in which n counts images.
    """
    if epsilons is None:
        whole = size_of_all(next(iter(batches))[0], spec.norm)
        epsilons = (0.0, spec.epsilon / 2, spec.epsilon, min(2 * spec.epsilon, whole), _LARGEST * whole)
    radii = sorted(set(epsilons))

    def at(radius: float) -> AttackSpec:
        scaled = spec.step_size * radius / spec.epsilon if spec.step_size and spec.epsilon else None
        return replace(spec, epsilon=radius, step_size=scaled or None)

    attacks, strong = [at(radius) for radius in radii], _strong(spec)
    by_text = {attack.describe(num_classes): attack for attack in (*attacks, spec, strong)}
    table = evaluate_classifier(model, batches, [*by_text.values()], num_classes=num_classes, **options)
    found = dict(zip(by_text, table[1:], strict=True))
    rows = [found[attack.describe(num_classes)] for attack in attacks]
    values = tuple(row.value for row in rows)
    return MaskingCheck(
        tuple(radii),
        values,
        1 / num_classes,
        rows[-1].n,
        monotone=all(later <= earlier + SLACK for earlier, later in pairwise(values)),
        reaches_chance=rows[-1].low <= 1 / num_classes,
        reach=_reach(spec),
        gap=found[spec.describe(num_classes)].value - found[strong.describe(num_classes)].value,
        gap_at=spec.epsilon,
        norm=spec.norm,
    )


def _strong(spec: AttackSpec) -> AttackSpec:
    return AttackSpec("strong", spec.epsilon, norm=spec.norm, seed=spec.seed)


def _reach(spec: AttackSpec) -> float | None:
    """Return the sum of the steps over the radius, for PGD."""
    return spec.step * spec.length / spec.epsilon if spec.name in ("pgd", "pgd_paper") and spec.epsilon else None


def check_episodes(
    proto: FewShotModel, pixels: PixelStore, sampler: Sampler, *, radii: Sequence[float] = RADII, **options: Any
) -> MaskingCheck:
    """Run PGD-10 at `radii`, and `strong` at the default radius, on the first `episodes` (10) of the protocol.

    In the returned check, n counts episodes. radii: Radii in l_inf, in pixel units of [0, 1]. 0 gives the clean accuracy. The
    other arguments are arguments of `run_protocol`.
    """
    spec = AttackSpec()
    attacks = {radius: replace(spec, epsilon=radius) for radius in sorted(set(radii) - {0.0} | {spec.epsilon})}
    strong, ways = _strong(spec), sampler.min_ways
    options = {"episodes": 10, **options, "attacks": [*attacks.values(), strong]}
    accuracies = run_protocol(proto, pixels, sampler, **options)
    curve = {0.0: accuracies["clean"]}
    curve |= {radius: accuracies[attack.describe(ways)] for radius, attack in attacks.items() if radius in radii}
    count = len(accuracies["clean"])
    chance = math.fsum(1 / sampler[index].ways for index in range(count)) / count
    pgd, stronger = (accuracies[attack.describe(ways)] for attack in (attacks[spec.epsilon], strong))
    gap = float((pgd - stronger).mean())
    return replace(judge_curve(curve, chance), reach=_reach(spec), gap=gap, gap_at=spec.epsilon)


def judge_curve(curve: Mapping[float, Tensor], chance: float) -> MaskingCheck:
    """Judge accuracies (n,) by radius, from the smallest radius to the largest. chance: Accuracy of guessing in [0, 1].

    From one radius to the next the mean may rise by SLACK, or by no more than the half width of the 95 % interval of
    the rise. At the largest radius the interval must reach chance or lie below it.
    """
    radii = sorted(curve)
    values = [torch.as_tensor(curve[radius], dtype=torch.float64) for radius in radii]
    rises = [mean_interval(later - earlier) for earlier, later in pairwise(values)]
    last, half = mean_interval(values[-1])
    return MaskingCheck(
        tuple(radii),
        tuple(float(value.mean()) for value in values),
        chance,
        len(values[0]),
        monotone=all(rise <= max(SLACK, width) for rise, width in rises),
        reaches_chance=last - half <= chance,
    )
