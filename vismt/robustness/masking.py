"""Does an attack's gradient tell the truth? PGD at growing radii on a few episodes (Athalye et al., arXiv 1802.00420).

Nothing can stay right when 64/255 may be added to every pixel: the images of two classes meet. An attack that leaves the
accuracy above chance there, or that does worse with a larger budget, is blind, and its robust accuracies are not evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from vismt.metatune.protocol import PixelStore, Sampler, Task, run_protocol
from vismt.robustness.attacks import AttackSpec
from vismt.robustness.evaluate import MaskingCheck
from vismt.stats import mean_interval

RADII = (0.0, 1 / 255, 2 / 255, 4.5 / 255, 8 / 255, 16 / 255, 64 / 255)
STEPS = 10
RELATIVE_STEP = (
    2.5 / STEPS
)  # of the radius: the boundary can be reached from any start (Madry et al., arXiv 1706.06083)


def check_episodes(
    proto: Task,
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
    """PGD-10 at the radii (l_inf, in pixel units of [0, 1], 0 is the clean accuracy) on the first `episodes` >= 2 episodes.

    The other arguments are those of `run_protocol`, whose accuracies are judged; n counts episodes.
    """
    spec = AttackSpec(steps=STEPS)
    at = {
        radius: replace(spec, epsilon=radius, step_size=RELATIVE_STEP * radius) for radius in sorted(set(radii) - {0.0})
    }
    found = run_protocol(
        proto,
        pixels,
        sampler,
        episodes=episodes,
        attacks=list(at.values()),
        records=records,
        data=data,
        fingerprint=fingerprint,
        label=label,
    )
    curve = {0.0: found["clean"]} | {radius: found[attack.describe(sampler.min_ways)] for radius, attack in at.items()}
    chance = math.fsum(1 / sampler[index].ways for index in range(episodes)) / episodes
    return judge(curve, chance)


def judge(curve: Mapping[float, Tensor], chance: float, slack: float = 0.02) -> MaskingCheck:
    """The check of accuracies (n,) by radius, from the smallest to the largest; chance in [0, 1].

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
