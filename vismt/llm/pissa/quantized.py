"""Adapter layers on 4-bit values of W minus the start of the update (QPiSSA, QLoRA). W is kept beside them.

    y = Q x + b + s B A x        Q = grid(W - s B0 A0), A0 and B0 the start as it is stored (LoRA's B0 = 0), grid one of GRIDS

NF4 (QLoRA, arXiv 2305.14314) stores 16 levels and the largest absolute value of each run of 64:

    q = |block|_max * level[nearest(w / |block|_max)]

The levels are quantiles of a standard normal, scaled to [-1, 1]: eight below zero, zero, and seven above. Blocks run over the
matrix row by row, and the last block may be shorter. A value that is a level stays, so quantising twice changes nothing.
bitsandbytes stores the same without its quantised block maxima ("double quantisation"), with which the second rounding would
move the weights again. Its own kernels are the grid "bitsandbytes". They find a level to fp32, so a tie may fall the other way,
and they get whole blocks as rows here (0.50.2 on a CPU gives other values for rows of other lengths).

Q is a function of W, A0 and B0, and a frozen parameter of W's dtype beside W. An adapter file carries the start, so a layer on
the original W computes the same Q again. The arithmetic before the rounding is in fp64, so that the order of a BLAS's sums does
not decide which level is nearer. Relative to W the update has no low rank. It can be merged but not exported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import LayerSpec, register_module
from vismt.lowrank.layers.forms import LowRankConv, LowRankLinear
from vismt.lowrank.layers.low_rank import LayerOptions, LowRankLayer, LowRankSettings
from vismt.lowrank.layers.stock_modules import LINEAR
from vismt.lowrank.model.inject import LayerChoice
from vismt.lowrank.svd import double, working_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

GRIDS = ("nf4", "bitsandbytes")
_BLOCK = 64
# From the released code: the outermost quantile, the mean of 1 - 1/30 and 1 - 1/32.
OUTERMOST = 0.9677083

_MERGE = "against the original weights its update is not a pair of factors; merge the model and save it whole"


@dataclass(frozen=True)
class QuantizedSettings(LowRankSettings):
    """Settings of a low-rank update on a quantised weight.

    grid: Name of the grid, one of GRIDS.
    """

    grid: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid not in GRIDS:
            raise ValueError(f"grid {shown_value(self.grid)}")


@register_module("quantized")
class QuantizedLayer(LowRankLayer):
    """Base class of the layers on Q, whose values lie on `grid`.

    The buffers start_A (g*r, i) and start_B (o, r) hold what was subtracted from W before the rounding. The parameter
    `quantized` holds Q in W's shape. It is None until the start is set.
    """

    start_A: Tensor
    start_B: Tensor
    quantized: nn.Parameter | None

    Settings = QuantizedSettings
    export_refusal = f"lies on quantised weights; {_MERGE}"
    combine_refusal = export_refusal
    has_factors = False
    takes_prequantized = weight_readable = False

    def __init__(self, base: nn.Module, rank: int, scale: float, *, grid: str, **options: Unpack[LayerOptions]) -> None:
        super().__init__(base, rank, scale, **options)
        self.grid = grid
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))
        # It is not a buffer, because DistributedDataParallel would send it from process to process in every step.
        self.register_parameter("quantized", None)

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> QuantizedLayer:
        if spec.kind == "embedding":
            raise UserError(f"adapt.quantize: '{spec.path}' is an embedding, which stays whole; exclude it.")
        layer = QuantizedLinear if spec.kind in LINEAR else QuantizedConv
        return layer(base, dropout=dropout, dtype=dtype, grid=spec.settings.grid, **cls._options(spec.settings))

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        shapes = super().tensor_shapes(spec)
        return {**shapes, "start_A": shapes["lora_A"], "start_B": shapes["lora_B"]}

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        super().set_factors(A, B, offset)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)
        self.quantize()

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "start_A": self.start_A, "start_B": self.start_B}

    def low_rank(self) -> LowRank:
        raise UserError(f"adapter on quantised weights: {_MERGE}.")

    @property
    def frozen(self) -> Tensor:
        return self.weight if self.quantized is None else self.quantized

    @torch.no_grad()
    def quantize(self) -> None:
        """Compute Q from the present weight and start."""
        W = self.weight
        if W.is_meta:
            return
        start = LowRank(self._block_diagonal(double(self.start_B)), double(self.start_A), scale=self.scale)
        rest = (double(self.matrix(W)) - start.delta()).to(W.device, working_dtype(W))
        self.quantized = nn.Parameter(self.stored(on_grid(rest, self.grid)).to(W.dtype), requires_grad=False)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        super().fill(tensors)
        self.quantize()

    def adopt(self, base: nn.Module | None) -> None:
        super().adopt(base)
        if self._parameters.get("quantized") is not None:  # the model may have been cast while this layer was shelved
            self.quantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        dtype = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != dtype:
            self.quantize()  # a reader of the adapter's file does the same with the weight in this dtype
        return self


class QuantizedLinear(QuantizedLayer, LowRankLinear):
    """nn.Linear or Conv1D on a quantised weight."""


class QuantizedConv(QuantizedLayer, LowRankConv):
    """A convolution on a quantised weight."""


def quantized_layer(model: nn.Module, grid: str | None) -> LayerChoice:
    """Return the arguments of `inject` for layers on weights quantised to `grid`. Return {} for None.

    Raise UserError for an unknown grid, a missing bitsandbytes, and a model without values.
    """
    if grid is None:
        return {}
    require_known("adapt.quantize: no grid", [grid], GRIDS)
    if grid == "bitsandbytes":
        need_bitsandbytes()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("adapt.quantize: the model lies on the meta device without values; load its weights.")
    return {"layer": QuantizedLayer, "settings": {"grid": grid}}


def levels() -> Tensor:
    """Return the 16 levels, fp64, ascending from -1 to 1."""
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, dtype=torch.float64)[:-1])
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()


def nf4(matrix: Tensor) -> Tensor:
    """Return the nearest values that NF4 can store, in the shape, dtype and on the device of `matrix` (fp32 or fp64)."""
    blocks = _blocks(matrix)
    grid = levels().to(matrix.device, matrix.dtype)
    peak = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / torch.where(peak > 0, peak, 1), (grid[1:] + grid[:-1]) / 2)
    return _matrix(grid[codes] * peak, matrix)


def on_grid(matrix: Tensor, grid: str) -> Tensor:
    """Return the nearest values of a grid of GRIDS, as `nf4` does.

    Raise UserError if bitsandbytes is needed and not installed.
    """
    if grid == "nf4":
        return nf4(matrix)
    functional = need_bitsandbytes()
    packed, state = functional.quantize_4bit(_blocks(matrix).float(), blocksize=_BLOCK, quant_type="nf4")
    return _matrix(functional.dequantize_4bit(packed, state), matrix)


def need_bitsandbytes() -> ModuleType:
    """Return the functions of bitsandbytes. Raise UserError if it is not installed."""
    try:
        return importlib.import_module("bitsandbytes").functional
    except ImportError as error:
        raise UserError(
            f"adapt.quantize: 'bitsandbytes' is not installed ({error}): pip install bitsandbytes, or take quantize='nf4', "
            "which has the same levels."
        ) from error


def _blocks(matrix: Tensor) -> Tensor:
    flat = matrix.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)


def _matrix(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten()[: like.numel()].view(like.shape).to(like.dtype)
