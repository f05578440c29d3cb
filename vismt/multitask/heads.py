"""Heads of dense prediction on the maps of a backbone: a list of taps (b, d, r, c) -> logits (b, channels, R, C).

The taps of a plain ViT have one width and one grid. The stages of a hierarchical model differ in both, from fine to coarse, and
need no resampling to several scales.

"linear"     1x1 convolution of the last tap, at the taps' grid: the weakest head, a linear probe of the features "conv"
the last tap, bilinear x4 -> 3x3 convolution + norm + GELU -> 1x1; InvPT's ConvHead (arXiv 2203.07997) "segformer"  a linear
layer for each tap, resized to the finest grid and concatenated, 1x1, of equal grids bilinear x4 ->
             norm + GELU -> 1x1 (SegFormer, arXiv 2105.15203)
"dpt"        four taps, taps of equal grids resampled to x4, x2, x1 and x1/2, fused from coarse to fine by residual units ->
             the finest grid (Ranftl et al., arXiv 2103.13413). Left out: the readout of the class token, different widths
             for the scales, the 1x1 after each fusion, and the last doubling, so that on a ViT all heads but "linear" end at
             the same resolution

Tasks of whole images always use the pooled head (`make_pooled_head`). Its logits (b, channels) are linear in the mean of the
last tap's patch tokens, including tokens of padding. The class token is not part of the maps and not used.

Grids may have any shape. If halving an odd grid has lost a row, the finer map sets the size. The caller resizes logits to the
size of the labels by `resize_logits`, before any argmax and before normals are normalised.

The default norm is GroupNorm. Dense training runs at about two images a GPU, where BatchNorm's statistics are noise. Images
without labels for a task would change BatchNorm's running statistics, and evaluation would compute another function than
training. "batch" is the norm of InvPT's and SegFormer's code, for comparisons at a large batch.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known
from vismt.base.registry import Registry
from vismt.config.typed import arguments

_NORMS = ("group", "batch")
_GROUPS = 32  # largest number of groups


class Head(nn.Module, ABC):
    """Base class of all heads: checks the taps.

    Args:
        widths: Width d of each tap, from shallow to deep.
        channels: Number of channels of the output.
    """

    predict: nn.Module

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.widths, self.channels = tuple(widths), channels
        if not self.widths:
            raise UserError("head: no tap; give the width of each tap.")
        for what, value in (("channels", channels), *(("width", width) for width in self.widths)):
            need_whole(f"head: {what}", value)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Return logits (b, channels, R, C). `PooledHead` returns (b, channels).

        Args:
            taps: Maps (b, d, r, c). Maps of equal widths have the same grid r x c.

        Raises:
            UserError: If the number of taps, a width or a grid is wrong.
        """
        shapes = [tuple(tap.shape) for tap in taps]
        if any(len(shape) != 4 for shape in shapes) or tuple(shape[1] for shape in shapes) != self.widths:
            raise UserError(f"head: taps {shapes}, needed maps (b, d, rows, columns) of widths {list(self.widths)}.")
        if not self.pyramid and len({shape[-2:] for shape in shapes}) > 1:
            raise UserError(f"head: taps {shapes} are of different grids; taps of one width have the same grid.")
        return self.decode(list(taps))

    @property
    def pyramid(self) -> bool:
        """Whether the taps are stages of a hierarchical model, each with its own width and grid."""
        return len(set(self.widths)) > 1

    @abstractmethod
    def decode(self, taps: list[Tensor]) -> Tensor:
        """Return the logits of taps whose shapes were checked."""

    def start_at(self, value: float) -> None:
        """Set the bias of the last layer, so that an untrained head gives values around this value."""
        *_, bias = self.predict.parameters()
        nn.init.constant_(bias, value)


MAP_HEADS: Registry[type[Head]] = Registry("head: no head")


@MAP_HEADS.register("linear")
class PointwiseHead(Head):
    """The head "linear": a 1x1 convolution at the taps' grid."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.predict = nn.Conv2d(self.widths[-1], channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(taps[-1])


@MAP_HEADS.register("conv")
class ConvHead(Head):
    """The head "conv".

    Args:
        widths: Width d of each tap. The last tap is used.
        channels: Number of channels of the output.
        hidden: Width of the hidden map. None for the width of the tap.
        scale: Factor of the bilinear upsampling.
        norm: "group" or "batch".
    """

    def __init__(
        self, widths: Sequence[int], channels: int, *, hidden: int | None = None, scale: int = 4, norm: str = "group"
    ) -> None:
        super().__init__(widths, channels)
        hidden = self.widths[-1] if hidden is None else need_whole("conv: hidden", hidden)
        self.scale = need_whole("conv: scale", scale)
        self.fuse = nn.Conv2d(self.widths[-1], hidden, 3, padding=1, bias=False)
        self.norm = make_norm("conv", norm, hidden)
        self.predict = nn.Conv2d(hidden, channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(F.gelu(self.norm(self.fuse(enlarge(taps[-1], self.scale)))))


@MAP_HEADS.register("segformer")
class SegFormerHead(Head):
    """The head "segformer", on any number of taps.

    Args:
        widths: Width d of each tap.
        channels: Number of channels of the output.
        hidden: Width of each projected tap and of the fused map.
        scale: Factor of the bilinear upsampling of the finest grid. None stands for 4, and for 1 with stages.
        norm: "group" or "batch".
    """

    def __init__(
        self, widths: Sequence[int], channels: int, *, hidden: int = 256, scale: int | None = None, norm: str = "group"
    ) -> None:
        super().__init__(widths, channels)
        need_whole("segformer: hidden", hidden)
        scale = (1 if self.pyramid else 4) if scale is None else scale
        self.scale = need_whole("segformer: scale", scale)
        self.project = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in self.widths)
        self.fuse = nn.Conv2d(len(self.widths) * hidden, hidden, 1, bias=False)
        self.norm = make_norm("segformer", norm, hidden)
        self.predict = nn.Conv2d(hidden, channels, 1)

    def decode(self, taps: list[Tensor]) -> Tensor:
        finest = max((tap.shape[-2:] for tap in taps), key=math.prod)
        maps = [resize_logits(project(tap), finest) for project, tap in zip(self.project, taps)]
        # A 1x1 convolution and bilinear upsampling commute. Fusing on the small grid gives the same at a fraction of
        # the cost.
        return self.predict(F.gelu(self.norm(enlarge(self.fuse(torch.cat(maps, 1)), self.scale))))


@MAP_HEADS.register("dpt")
class DptHead(Head):
    """The head "dpt", on four taps from shallow to deep.

    Args:
        widths: Width d of each of the four taps.
        channels: Number of channels of the output.
        hidden: Width of all maps, an even number.
    """

    def __init__(self, widths: Sequence[int], channels: int, *, hidden: int = 256) -> None:
        super().__init__(widths, channels)
        if len(self.widths) != 4:
            raise UserError(f"dpt: {len(self.widths)} taps; it fuses four: name four blocks, from shallow to deep.")
        if need_whole("dpt: hidden", hidden) % 2:
            raise UserError(f"dpt: hidden {hidden}; it must be even.")
        self.project = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in self.widths)
        scales: list[nn.Module] = [nn.Identity() for _ in self.widths]
        if not self.pyramid:
            scales[0] = nn.ConvTranspose2d(hidden, hidden, 4, stride=4)
            scales[1] = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
            scales[3] = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1)
        self.resample = nn.ModuleList(scales)
        self.lateral = nn.ModuleList(ResidualUnit(hidden) for _ in range(3))
        self.refine = nn.ModuleList(ResidualUnit(hidden) for _ in range(4))
        self.predict = nn.Sequential(
            nn.Conv2d(hidden, hidden // 2, 3, padding=1), nn.GELU(), nn.Conv2d(hidden // 2, channels, 1)
        )

    def decode(self, taps: list[Tensor]) -> Tensor:
        maps = [resample(project(tap)) for project, resample, tap in zip(self.project, self.resample, taps)]
        fused = self.refine[3](maps[3])
        for level in (2, 1, 0):
            fused = resize_logits(fused, maps[level].shape[-2:])
            fused = self.refine[level](fused + self.lateral[level](maps[level]))
        return self.predict(fused)


class PooledHead(Head):
    """Logits (b, channels) of whole images by a linear layer on the mean of the last tap over its grid."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__(widths, channels)
        self.predict = nn.Linear(self.widths[-1], channels)

    def decode(self, taps: list[Tensor]) -> Tensor:
        return self.predict(taps[-1].mean((-2, -1)))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))) with 3x3 convolutions of equal width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, width, r, c) to the same shape."""
        return x + self.second(F.relu(self.first(F.relu(x))))


HeadType = TypeVar("HeadType", bound=Head)


def make_map_head(name: str, widths: Sequence[int], channels: int, *, seed: int = 0, **options: Any) -> Head:
    """Return a new head for maps.

    Args:
        name: Name of the head, a key of `MAP_HEADS`.
        widths: Width of each tap, from shallow to deep.
        channels: Number of channels of the output.
        seed: Seed of the start values. The state of the global generator does not change.
        options: Options of the head's class.

    Raises:
        UserError: If a head or option is unknown, or a value is out of range.
    """
    check_map_head(name, options)
    return _initialised(partial(MAP_HEADS[name], **options), widths, channels, seed)


def make_pooled_head(widths: Sequence[int], channels: int, *, seed: int = 0) -> PooledHead:
    """Return a new head for a task of whole images. Arguments are as for `make_map_head`."""
    return _initialised(PooledHead, widths, channels, seed)


def _initialised(head: Callable[..., HeadType], widths: Sequence[int], channels: int, seed: int) -> HeadType:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return head(widths, channels)


def check_map_head(name: str, options: Mapping[str, object]) -> None:
    """Raise UserError for an unknown head or option, and for an option of another type."""
    parameters = inspect.signature(MAP_HEADS[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    require_known(f"head: '{name}' has no option", options, known)
    arguments(MAP_HEADS[name], options, "head", "options")


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits (b, channels, R, C) to (b, channels, h, w), bilinear with align_corners=False."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def enlarge(map: Tensor, scale: int) -> Tensor:
    """Upsample a map to `scale` times its grid, bilinear."""
    return resize_logits(map, [scale * side for side in map.shape[-2:]])


def make_norm(head: str, norm: str, width: int) -> nn.Module:
    """Return GroupNorm with the largest number of groups, at most 32, that divides `width`, or BatchNorm."""
    require_known(f"{head}: norm", [norm], _NORMS)
    return nn.GroupNorm(math.gcd(width, _GROUPS), width) if norm == "group" else nn.BatchNorm2d(width)
