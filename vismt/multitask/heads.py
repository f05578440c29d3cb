"""Heads of dense prediction on the maps of a plain ViT: a list of taps (b, d, r, c) -> logits (b, channels, R, C).

"linear"     1x1 convolution of the last tap, at the taps' grid: the weakest, which shows what the features hold
"conv"       the last tap, bilinear x4 -> 3x3 convolution + norm + GELU -> 1x1; InvPT's ConvHead (arXiv 2203.07997)
"segformer"  a linear layer for each tap, concatenated, 1x1, bilinear x4 -> norm + GELU -> 1x1 (SegFormer, arXiv 2105.15203)
"dpt"        four taps brought to x4, x2, x1 and x1/2 of the grid, fused from coarse to fine by residual units -> x4 (Ranftl et
             al., arXiv 2103.13413). Left out: the class token's way into the maps, one width for each scale, the 1x1
             after each fusion, and the last doubling, so that all heads but "linear" end at one resolution

A task that says one thing of the whole image has a head of its own, whatever is chosen for the others (`make_pooled_head`): its
logits (b, channels) are linear in the mean of the last tap's patch tokens, those of padding among them; the class token, which
no map holds, is not used.

Grids are of any shape; where halving an odd one has lost a row, the finer map sets the size. The caller brings logits to the
size of the labels by `resize_logits`, before any argmax and before normals are normalised.

Norm: GroupNorm by default. Dense training runs at two images a GPU or so, where BatchNorm's statistics are noise; images
without labels for a task move its running statistics, and evaluation is another function than training. "batch" is what
InvPT's and SegFormer's code has, for comparisons at a large batch.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError, near, require_known

NORMS = ("group", "batch")
GROUPS = 32  # at most


class Head(nn.Module, ABC):
    """Base: checks the taps. widths: d of each tap, coarse features last. channels: of the output."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.widths, self.channels = tuple(widths), channels
        if not self.widths:
            raise UserError("head: no tap: give the width of each.")
        for what, value in (("channels", channels), *(("width", width) for width in self.widths)):
            positive("head", what, value)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Logits (b, channels, R, C), of `PooledHead` (b, channels). taps: (b, d, r, c) each, of one grid.

        UserError for other numbers, widths and grids.
        """
        seen = [tuple(tap.shape) for tap in taps]
        if any(len(shape) != 4 for shape in seen) or tuple(shape[1] for shape in seen) != self.widths:
            raise UserError(f"head: taps {seen}, needed maps (b, d, rows, columns) of widths {list(self.widths)}.")
        if len({shape[-2:] for shape in seen}) > 1:
            raise UserError(f"head: taps {seen} are of different grids; a plain ViT has one.")
        return self.decode(list(taps))

    @abstractmethod
    def decode(self, taps: list[Tensor]) -> Tensor:
        """The head itself, on taps of the right shapes."""


class LinearHead(Head):
    """ "linear", at the taps' grid."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.predict = nn.Conv2d(self.widths[-1], channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(taps[-1])


class ConvHead(Head):
    """ "conv". hidden: width between, None for the tap's. scale: of the bilinear upsampling. norm: "group" or "batch"."""

    def __init__(
        self,
        widths: Sequence[int],
        channels: int,
        *,
        hidden: int | None = None,
        scale: int = 4,
        norm: str = "group",
    ) -> None:
        super().__init__(widths, channels)
        hidden = self.widths[-1] if hidden is None else positive("conv", "hidden", hidden)
        self.scale = positive("conv", "scale", scale)
        self.fuse = nn.Conv2d(self.widths[-1], hidden, 3, padding=1, bias=False)
        self.norm = make_norm("conv", norm, hidden)
        self.predict = nn.Conv2d(hidden, channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(F.gelu(self.norm(self.fuse(enlarge(taps[-1], self.scale)))))


class SegFormerHead(Head):
    """ "segformer", of any number of taps. hidden: width for each tap and after fusion. scale, norm: as in `ConvHead`."""

    def __init__(
        self,
        widths: Sequence[int],
        channels: int,
        *,
        hidden: int = 256,
        scale: int = 4,
        norm: str = "group",
    ) -> None:
        super().__init__(widths, channels)
        positive("segformer", "hidden", hidden)
        self.scale = positive("segformer", "scale", scale)
        self.project = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in self.widths)
        self.fuse = nn.Conv2d(len(self.widths) * hidden, hidden, 1, bias=False)
        self.norm = make_norm("segformer", norm, hidden)
        self.predict = nn.Conv2d(hidden, channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        maps = [project(tap) for project, tap in zip(self.project, taps)]
        # A 1x1 convolution and bilinear enlargement commute: fused on the small grid, the same at a fraction of the work.
        return self.predict(F.gelu(self.norm(enlarge(self.fuse(torch.cat(maps, 1)), self.scale))))


class DptHead(Head):
    """ "dpt", of four taps from the shallowest to the deepest. hidden: width of all maps, even."""

    def __init__(self, widths: Sequence[int], channels: int, *, hidden: int = 256) -> None:
        super().__init__(widths, channels)
        if len(self.widths) != 4:
            raise UserError(f"dpt: {len(self.widths)} taps; it fuses four: name four blocks, from shallow to deep.")
        if positive("dpt", "hidden", hidden) % 2:
            raise UserError(f"dpt: hidden {hidden}; it must be even.")
        self.project = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in self.widths)
        self.resample = nn.ModuleList(
            [
                nn.ConvTranspose2d(hidden, hidden, 4, stride=4),
                nn.ConvTranspose2d(hidden, hidden, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            ]
        )
        self.lateral = nn.ModuleList(ResidualUnit(hidden) for _ in range(3))
        self.refine = nn.ModuleList(ResidualUnit(hidden) for _ in range(4))
        self.predict = nn.Sequential(
            nn.Conv2d(hidden, hidden // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden // 2, channels, 1),
        )

    def decode(self, taps: list[Tensor]) -> Tensor:
        maps = [resample(project(tap)) for project, resample, tap in zip(self.project, self.resample, taps)]
        fused = self.refine[3](maps[3])
        for level in (2, 1, 0):
            fused = resize_logits(fused, maps[level].shape[-2:])
            fused = self.refine[level](fused + self.lateral[level](maps[level]))
        return self.predict(fused)


class PooledHead(Head):
    """Logits (b, channels) of whole images: a linear layer on the mean of the last tap over its grid."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.predict = nn.Linear(self.widths[-1], channels)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(taps[-1].mean((-2, -1)))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3, at one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, r, c) -> the same shape."""
        return x + self.second(F.relu(self.first(F.relu(x))))


Made = TypeVar("Made", bound=Head)
HEADS: dict[str, type[Head]] = {"linear": LinearHead, "conv": ConvHead, "dpt": DptHead, "segformer": SegFormerHead}


def make_head(name: str, widths: Sequence[int], channels: int, *, seed: int = 0, **options: Any) -> Head:
    """The head `name` on taps of these widths. seed: of the start values; the global generator is left alone.

    Raises UserError for an unknown head or option, and values that do not fit.
    """
    check_head(name, options)
    return _drawn(partial(HEADS[name], **options), widths, channels, seed)


def make_pooled_head(widths: Sequence[int], channels: int, *, seed: int = 0) -> PooledHead:
    """The head of a task of whole images on taps of these widths, its start values drawn as those of `make_head`."""
    return _drawn(PooledHead, widths, channels, seed)


def _drawn(kind: Callable[..., Made], widths: Sequence[int], channels: int, seed: int) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(widths, channels)


def check_head(name: str, options: Iterable[str]) -> None:
    """UserError for an unknown head or option."""
    require_known("head: no head", [name], HEADS)
    require_known(f"head: '{name}' has no option", options, head_options(HEADS[name]))


def head_options(kind: type[Head]) -> list[str]:
    """Names of a head's options beside the seed."""
    parameters = inspect.signature(kind).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(b, channels, R, C) -> (b, channels, h, w), bilinear between the centres of pixels (align_corners=False)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def enlarge(map: Tensor, scale: int) -> Tensor:
    """A map at `scale` times its grid, bilinear."""
    return resize_logits(map, [scale * side for side in map.shape[-2:]])


def make_norm(head: str, norm: str, width: int) -> nn.Module:
    """GroupNorm with the most groups, at most 32, that divide `width`, or BatchNorm."""
    if norm not in NORMS:
        raise UserError(f"{head}: norm '{norm}'.{near(str(norm), NORMS)}")
    return nn.GroupNorm(math.gcd(width, GROUPS), width) if norm == "group" else nn.BatchNorm2d(width)


def positive(head: str, option: str, value: Any) -> int:
    """value; UserError unless it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{head}: {option} {value!r}; it must be a whole number, at least 1.")
    return value
