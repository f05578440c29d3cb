"""Interleaved timing: every candidate once a round, in rotating order, and ratios within a round.

The clock is the CPU time of the process on one intra-op thread, which other processes do not add to; with CUDA it is the
wall clock around a synchronised call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vismt.base import console
from vismt.lowrank.contexts import one_thread

SAVED, PEAK = "saved activations", "peak memory"  # kinds of bytes


@dataclass(frozen=True)
class Comparison:
    """A ratio that a benchmark is run for: of `name` to `base`, below 1 where `name` takes less.

    what: "time", or the kind of bytes that were counted. ratio, low, high: median, smallest and largest of the rounds; equal
    where bytes are counted once. target: the largest ratio to reach, None without one.
    """

    what: str
    name: str
    base: str
    ratio: float
    low: float
    high: float
    target: float | None = None

    def __str__(self) -> str:
        aim = "" if self.target is None else f", target at most {self.target:.2f}"
        return f"{self.what} of {self.name} / {self.base}: {self.ratio:.3f} ({self.low:.3f}..{self.high:.3f}){aim}"


def compare_bytes(what: str, sizes: Mapping[str, int], name: str, base: str, target: float | None = None) -> Comparison:
    """Return the ratio of two counts of bytes."""
    share = sizes[name] / sizes[base]
    return Comparison(what, name, base, share, share, share, target)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round by candidate."""

    seconds: dict[str, list[float]]

    def compare(self, name: str, base: str, target: float | None = None) -> Comparison:
        return Comparison("time", name, base, *self.ratio(name, base), target)

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Return the median, smallest and largest ratio of `name` to `base` over the rounds."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base])]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Ratios:
    """What a bench finds: the timing of several candidates and, by kind, the bytes that each takes; `str` gives the table.

    targets: (candidate, base, largest ratio of times to reach or None).
    sizes: bytes by candidate, by kind. size_targets: (kind, candidate, base, largest ratio to reach).
    """

    title: str
    timing: Timing
    targets: Sequence[tuple[str, str, float | None]]
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    size_targets: Sequence[tuple[str, str, str, float]] = ()

    def __str__(self) -> str:
        width = max(map(len, self.timing.seconds)) + 2
        bases = list(dict.fromkeys(target[1] for target in self.targets))
        heads = ["CPU seconds", *(f"vs {base}" for base in bases), *(f"{kind}, MB" for kind in self.sizes)]
        lines = [self.title, f"{'':<{width}}" + "".join(f"{head:>{len(head) + 2}}" for head in heads)]
        for name, seconds in self.timing.seconds.items():
            cells = [f"{statistics.median(seconds):.4f}"]
            cells += [f"{self.timing.ratio(name, base)[0]:.3f}" for base in bases]
            cells += [f"{sizes[name] / 1e6:.1f}" for sizes in self.sizes.values()]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>{len(head) + 2}}" for cell, head in zip(cells, heads)))
        return "\n".join([*lines, *map(str, self.comparisons())])

    def comparisons(self) -> list[Comparison]:
        """Return the ratios that have a target."""
        times = [self.timing.compare(*target) for target in self.targets]
        return [*times, *(compare_bytes(kind, self.sizes[kind], *target) for kind, *target in self.size_targets)]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    label: str,
    device: torch.device | None = None,
    warmup: int = 1,
) -> Timing:
    """Time every candidate `rounds` times after `warmup` rounds that are not counted."""
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with one_thread():
        for turn in console.track(range(warmup + rounds), "bench", label):
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:
                elapsed = _clock(candidates[name], device)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    return Timing(seconds)


def _clock(call: Callable[[], object], device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start
