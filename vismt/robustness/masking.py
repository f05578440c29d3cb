"""Does an attack's gradient tell the truth? The attack at growing radii (Athalye et al., arXiv 1802.00420).

Nothing can stay right when 64/255 may be added to every pixel: the images of two classes meet. An attack that leaves the
accuracy above chance there, or that does worse with a larger budget, is blind, and its robust accuracies are not evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.metatune.protocol import FewShotModel, PixelStore, Sampler, run_protocol
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.evaluate import RepeatableBatches, evaluate_classifier
from vismt.stats import mean_interval

RADII = (0.0, 1 / 255, 2 / 255, 4.5 / 255, 8 / 255, 16 / 255, 64 / 255)
STEPS = 10
# Of the radius: the boundary can be reached from any start (Madry et al., arXiv 1706.06083).
RELATIVE_STEP = 2.5 / STEPS
SLACK = 0.02  # the accuracy may rise by this much from one radius to the next


@dataclass(frozen=True)
class MaskingCheck:
    """Accuracy by radius over n images (episodes), and whether it behaves as under an attack with honest gradients.

    monotone: no increase from one radius to the next beyond noise. reaches_chance: at the largest radius the accuracy is
    not significantly above chance. Where either fails, the robust accuracy of this attack is not evidence.
    """

    epsilons: tuple[float, ...]
    accuracies: tuple[float, ...]
    chance: float
    n: int
    monotone: bool
    reaches_chance: bool

    @property
    def passed(self) -> bool:
        return self.monotone and self.reaches_chance

    def verdict(self) -> str:
        """Return "pass", or "FAIL: " and what is wrong."""
        faults = []
        if not self.monotone:
            rises = [later - earlier for earlier, later in pairwise(self.accuracies)]
            at = rises.index(max(rises))
            faults.append(f"rises from {self._point(at)} to {self._point(at + 1)}")
        if not self.reaches_chance:
            faults.append(f"still {self._point(-1)}, chance is {100 * self.chance:.1f} %")
        return f"FAIL: {'; '.join(faults)}" if faults else "pass"

    def _point(self, index: int) -> str:
        return f"{100 * self.accuracies[index]:.1f} % at {255 * self.epsilons[index]:.3g}/255"


def check_masking(
    model: nn.Module,
    batches: RepeatableBatches,
    spec: AttackSpec,
    *,
    num_classes: int,
    epsilons: Sequence[float] | None = None,
    slack: float = SLACK,
) -> MaskingCheck:
    """Run an attack on a classifier at growing radii, with one pass of clean and attacked predictions for each radius.

    Args:
        model: As for `evaluate_classifier`.
        batches: As for `evaluate_classifier`, iterated once for each radius.
        spec: The attack. Its step keeps its ratio to the radius.
        num_classes: Number of logits.
        epsilons: Radii; by default 0, half, once and twice the attack's, and 64/255. In l2 pass others: 64/255 is small.
        slack: Rise of the accuracy from one radius to the next that counts as noise.

    Returns:
        The check; n counts images.
    """
    default = (0.0, spec.epsilon / 2, spec.epsilon, 2 * spec.epsilon, 64 / 255)
    radii = sorted(set(default if epsilons is None else epsilons))
    rows = []
    for radius in radii:
        step = None if spec.step_size is None else spec.step_size * radius / spec.epsilon
        at_radius = replace(spec, epsilon=radius, step_size=step or None)
        rows.append(evaluate_classifier(model, batches, [at_radius], num_classes=num_classes, label=str(at_radius))[1])
    values = tuple(row.value for row in rows)
    return MaskingCheck(
        tuple(radii),
        values,
        1 / num_classes,
        rows[-1].n,
        monotone=all(later <= earlier + slack for earlier, later in pairwise(values)),
        reaches_chance=rows[-1].low <= 1 / num_classes,
    )


def check_episodes(
    proto: FewShotModel,
    pixels: PixelStore,
    sampler: Sampler,
    *,
    episodes: int = 10,
    radii: Sequence[float] = RADII,
    records: Path | None = None,
    data: str = "data",
    fingerprint: str = "",
    label: str | None = None,
) -> MaskingCheck:
    """Run PGD-10 at `radii` on the first `episodes` >= 2 episodes of the few-shot protocol.

    radii: l_inf, in pixel units of [0, 1]; 0 is the clean accuracy. The other arguments are those of `run_protocol`; n of
    the returned check counts episodes.
    """
    spec = AttackSpec(steps=STEPS)
    attacks = {
        radius: replace(spec, epsilon=radius, step_size=RELATIVE_STEP * radius) for radius in sorted(set(radii) - {0.0})
    }
    accuracies = run_protocol(
        proto,
        pixels,
        sampler,
        episodes=episodes,
        attacks=list(attacks.values()),
        records=records,
        data=data,
        fingerprint=fingerprint,
        label=label,
    )
    curve = {0.0: accuracies["clean"]}
    curve |= {radius: accuracies[attack.describe(sampler.min_ways)] for radius, attack in attacks.items()}
    chance = math.fsum(1 / sampler[index].ways for index in range(episodes)) / episodes
    return judge_curve(curve, chance)


def judge_curve(curve: Mapping[float, Tensor], chance: float, slack: float = SLACK) -> MaskingCheck:
    """Judge accuracies (n,) by radius, from the smallest radius to the largest; chance is in [0, 1].

    From one radius to the next the mean may rise by `slack`, or by no more than the half width of the 95 % interval of
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
        monotone=all(rise <= max(slack, width) for rise, width in rises),
        reaches_chance=last - half <= chance,
    )
