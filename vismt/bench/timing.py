"""Interleaved timing: every candidate once a round, in rotating order, and ratios within a round.

The clock is the CPU time of the process on one intra-op thread, which other processes do not add to; with CUDA it is the
wall clock around a synchronised call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vismt import console
from vismt.lowrank.threads import one_thread


@dataclass(frozen=True)
class Timing:
    """Seconds of each round by candidate."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Return the median, smallest and largest ratio of `name` to `base` over the rounds."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base])]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Ratios:
    """Timing of several candidates; `str` gives the table. targets: (candidate, base, largest ratio to reach)."""

    title: str
    timing: Timing
    targets: Sequence[tuple[str, str, float]]
    unit: str = "CPU seconds"

    def __str__(self) -> str:
        lines = [self.title, f"{'':<22}{self.unit:>12}"]
        lines += [f"{name:<22}{statistics.median(rounds):>12.4f}" for name, rounds in self.timing.seconds.items()]
        for name, base, target in self.targets:
            median, low, high = self.timing.ratio(name, base)
            lines.append(f"{name} / {base}: {median:.3f} ({low:.3f}..{high:.3f}), target at most {target:.2f}")
        return "\n".join(lines)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    label: str,
    device: torch.device | None = None,
    warmup: int = 1,
    wall: bool = False,
) -> Timing:
    """Time every candidate `rounds` times after `warmup` rounds that are not counted.

    wall: by the wall clock on a CPU, too, for candidates that run in other processes.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with one_thread():
        for turn in console.track(range(warmup + rounds), "bench", label):
            for name in _rotated(names, turn):
                elapsed = _clock(candidates[name], device, time.perf_counter if wall else time.process_time)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    return Timing(seconds)


def _rotated(names: Sequence[str], turn: int) -> list[str]:
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def _clock(call: Callable[[], object], device: torch.device | None, clock: Callable[[], float]) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = clock()
    call()
    return clock() - start
