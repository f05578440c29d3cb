"""Layers with a low-rank update: a frozen weight and its factors.

    y = W x + b + s * (B C A x - B0 A0 x)        W (o, i), A (r, i), B (o, r); A0, B0 only after a principal start

A linear runs one fused forward and backward (fused.py). A fused projection (timm's qkv) may carry one factor pair for each
output block. A then stacks the A of the blocks, and row block j of B is multiplied with hidden block j. A method may have a
core C, (r, r) or a diagonal (r,). The core is multiplied into B before the tokens arrive, which costs O(o r^2) for any number
of tokens. Gates of rank groups, one row for each sample (iLoRA), scale the hidden product. They cost one r-wide multiplication
for each token, and no output for each expert.

Sources: LoRA, arXiv 2106.09685; the block form follows the per-projection factors of AMT (NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.base.registry import Registry
from vismt.lowrank.factors import LowRank, times_core
from vismt.lowrank.layers.base import AdapterLayer, LayerSpec, register_module, spec_of
from vismt.lowrank.layers.gates import fixed_gates, gated, sample_gates
from vismt.lowrank.layers.parameter_modules import ParameterModule
from vismt.lowrank.layers.stock_modules import STOCK_KINDS, matrix_shape, weight_format
from vismt.lowrank.svd import working_dtype

CORES = ("", "full", "diagonal")
# The form of a low-rank layer for each kind of stock module (stock_modules.py), and for a prequantized weight.
FORMS: Registry[type[LowRankLayer]] = Registry(
    "low-rank layer: no form for", dict.fromkeys((*STOCK_KINDS, "conv1d", "prequantized"), "vismt.lowrank.layers.forms")
)


@dataclass(frozen=True)
class LowRankSettings:
    """Settings of a low-rank update.

    rank: Rank of each block. scale: Factor s. blocks: Numbers of output rows, one for each factor pair. core: "full" or
    "diagonal" for a trained core between the factors of each block, "" for no core. experts: Number of rank groups that gates
    weigh for each sample.
    """

    rank: int
    scale: float
    blocks: tuple[int, ...]
    core: str = ""
    experts: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a file has a list
        if self.rank < 1 or min(self.blocks, default=0) < 1:
            raise ValueError(f"rank {self.rank}, blocks {self.blocks}")
        if self.core not in CORES:
            raise ValueError(f"core {shown_value(self.core)}")
        if self.experts is not None and not (self.experts > 0 and self.rank % self.experts == 0):
            raise ValueError(f"{shown_value(self.experts)} experts for rank {self.rank}")

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the stacked cores of all blocks. Empty without a core."""
        rows = len(self.blocks) * self.rank
        return {"": (), "full": (rows, self.rank), "diagonal": (rows,)}[self.core]


class LayerOptions(TypedDict, total=False):
    """Options of the constructor of a low-rank layer."""

    blocks: tuple[int, ...] | None
    dropout: float
    dtype: torch.dtype | None
    core: tuple[int, ...]
    experts: int | None


class LayerArguments(TypedDict):
    """Arguments of the constructor that follow from the settings."""

    rank: int
    scale: float
    blocks: tuple[int, ...]
    core: tuple[int, ...]
    experts: int | None


@register_module("low_rank")
class LowRankLayer(AdapterLayer):
    """Base class of the layers with a low-rank update.

    The parameters lora_A (g*r, i), lora_B (o, r) and, with a core, lora_C (g*r, r) or (g*r,) are new. The buffers lora_A0 and
    lora_B0 hold a principal start. With `experts` e, the rank consists of e groups in a row, which `instance_gates` gates.
    """

    Settings = LowRankSettings
    takes_prequantized = True
    weight_readable = True

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        *,
        blocks: tuple[int, ...] | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        core: tuple[int, ...] = (),
        experts: int | None = None,
    ) -> None:
        super().__init__(base)
        self.experts = experts
        self.rank, self.scale, self.dropout = rank, scale, dropout
        out_features, in_features = matrix_shape(base)
        self.blocks = blocks or (out_features,)
        empty = partial(torch.empty, device=self.weight.device, dtype=dtype or working_dtype(self.weight))
        self.lora_A = nn.Parameter(empty(len(self.blocks) * rank, in_features))
        self.lora_B = nn.Parameter(empty(out_features, rank))
        self.lora_C = nn.Parameter(empty(core).zero_()) if core else None
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)

    # ---- the layer as data
    @classmethod
    def plan(
        cls,
        path: str,
        module: nn.Module,
        rank: int,
        alpha: float | None,
        *,
        rslora: bool = False,
        clamp_rank: bool = False,
        split_qkv: bool = False,
        experts: int | None = None,
        **settings: Any,
    ) -> LayerSpec:
        """Return the spec of one module. Rank, scale and blocks follow from the options of `inject`.

        settings: Further fields of `Settings`.

        Raise UserError for a rank that does not fit.
        """
        out_features, in_features = matrix_shape(module)
        blocks = output_blocks(path, module, split_qkv)
        largest = min(*blocks, in_features)
        if rank > largest:
            if not clamp_rank:
                raise UserError(
                    f"adapt.rank: {rank} for '{path}' ({out_features} x {in_features}) is larger than {largest}. "
                    "Lower it, give rank_pattern, or set clamp_rank=True."
                )
            rank = largest
        if experts is not None and isinstance(module, nn.Embedding):
            raise UserError(
                f"adapt.targets: '{path}' is an embedding, which gates of samples do not weigh; exclude it."
            )
        if experts is not None and rank % experts:
            raise UserError(
                f"adapt.n_experts: {experts} experts cannot share the rank {rank} of '{path}' evenly; give a rank that is "
                f"a multiple of {experts}, or other n_experts."
            )
        numerator = float(rank if alpha is None else alpha) * (experts or 1)
        scale = numerator / (rank**0.5 if rslora else rank)
        return spec_of(path, module, cls, cls.Settings(rank, scale, blocks, experts=experts, **settings))

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> LowRankLayer:
        own = spec.kind in ("embedding", "parameter")
        layer = FORMS["prequantized" if not own and weight_format(base) is not None else spec.kind]
        return layer(base, dropout=dropout, dtype=dtype, **cls._options(spec.settings))

    @staticmethod
    def _options(settings: LowRankSettings) -> LayerArguments:
        """Return the arguments of the constructor."""
        return {
            "rank": settings.rank,
            "scale": settings.scale,
            "blocks": settings.blocks,
            "core": settings.core_shape,
            "experts": settings.experts,
        }

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        if sum(spec.settings.blocks) != spec.shape[0]:
            raise ValueError(f"blocks {spec.settings.blocks} of {spec.shape[0]} outputs")

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        settings, (rows, columns) = spec.settings, spec.shape
        shapes = {"lora_A": (len(settings.blocks) * settings.rank, columns), "lora_B": (rows, settings.rank)}
        return shapes | ({"lora_C": settings.core_shape} if settings.core else {})

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        shapes = cls.tensor_shapes(spec)
        return {"lora_A0": shapes["lora_A"], "lora_B0": shapes["lora_B"]}

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        settings = spec.settings
        core = prod(settings.core_shape) if settings.core else 0
        return settings.rank * (spec.shape[0] + len(settings.blocks) * spec.shape[1]) + core

    @classmethod
    def factor_rank(cls, spec: LayerSpec) -> int:
        return spec.settings.rank

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        settings = spec.settings
        count = len(settings.blocks)
        return f"{count} x {settings.rank}" if count > 1 else str(settings.rank), f"{settings.scale:g}"

    @classmethod
    def shape_mismatch(cls, spec: LayerSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> str:
        name = "lora_B" if shape[1] == spec.shape[1] else "lora_A"
        saved = tuple(tensors[f"{spec.path}.{name}"].shape)
        needed = (saved[0], shape[1]) if name == "lora_A" else (shape[0], saved[1])
        return f"{spec.path}.{name}: saved {saved}, needed {needed}"

    # ---- the update
    @property
    def frozen(self) -> Tensor:
        """Values that the update is added to, in the shape of the weight."""
        return self.weight

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        """Copy A (g*r, i) and B (o, r) in. With `offset` they are also kept as the start that is subtracted."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        if offset:
            self.lora_A0, self.lora_B0 = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def start_more(self, init: Callable[..., tuple[Tensor, Tensor]], generator: torch.Generator) -> None:
        """Fill further pairs of factors, if the layer has any, with the initialiser and generator of the first pair."""

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("lora_A", "lora_B", "lora_C", "lora_A0", "lora_B0")}
        return {name: value for name, value in named.items() if value is not None}

    def left(self) -> Tensor:
        """Return B C (o, r), block by block: the factor of the hidden product. Without a core this is B itself."""
        if self.lora_C is None:
            return self.lora_B
        cores = self.lora_C.chunk(len(self.blocks))
        return torch.cat([times_core(b, c) for b, c in zip(self.lora_B.split(self.blocks, 0), cores)])

    def right(self) -> Tensor:
        """Return the factor (g*r, i) that makes the hidden product."""
        return self.lora_A

    def gate(self, x: Tensor) -> Tensor | None:
        """Return the gates in force for the hidden channels of the samples of x (b, ...), as (b or 1, g*r) in the dtype of x."""
        if self.experts is None:
            return None
        gates = sample_gates(x.shape[0], self.experts).to(x.device, x.dtype)
        return repeat(gates, "b e -> b (g e r)", g=len(self.blocks), r=self.rank // self.experts)

    def check_mergeable(self, what: str, path: str) -> None:
        if self.experts is not None:
            fixed_gates(what, self.experts)

    def left_with_gates(self) -> Tensor:
        """Return `left()` times the one row of gates that a single weight can hold."""
        if self.experts is None:
            return self.left()
        left = self.left().to(torch.promote_types(self.lora_B.dtype, torch.float32))
        return left * repeat(fixed_gates("merge", self.experts).to(left), "e -> (e r)", r=self.rank // self.experts)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy factors in.

        A start that the layer lacks is created. A start of the layer is dropped if the factors come without one.
        """
        own = self.tensors()
        if "lora_A" in tensors and "lora_A0" not in tensors:
            self._buffers["lora_A0"] = self._buffers["lora_B0"] = None
        for name, value in tensors.items():
            if name in ("lora_A0", "lora_B0"):
                like = self.lora_A if name == "lora_A0" else self.lora_B
                setattr(self, name, value.to(device=like.device, dtype=like.dtype))
            else:
                own[name].copy_(value)

    def low_rank(self) -> LowRank:
        """Return the whole update relative to the stock weight as one LowRank.

        Its rank is r, 2r with a start, and g times that with g blocks.
        """
        A, B = self.right().detach(), self._block_diagonal(self.left_with_gates().detach())
        if self.lora_A0 is not None:
            A = torch.cat([A, self.lora_A0])
            B = torch.cat([B, -self._block_diagonal(self.lora_B0)], 1)
        return LowRank(B, A, scale=self.scale)

    def change_of(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return the product of x (n, i) with the update, (n, o), without the scale. Dropout acts on the trained factors."""

        def product(x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None = None) -> Tensor:
            hidden = gated(x @ A.to(x.dtype).t(), gate)
            pairs = zip(hidden.chunk(len(self.blocks), 1), B.to(x.dtype).split(self.blocks, 0))
            return torch.cat([h @ b.t() for h, b in pairs], 1)

        change = product(F.dropout(x, self.dropout, self.training), self.right(), self.left(), gate)
        return change if self.lora_A0 is None else change - product(x, self.lora_A0, self.lora_B0)

    def _block_diagonal(self, B: Tensor) -> Tensor:
        return B if len(self.blocks) == 1 else torch.block_diag(*B.split(self.blocks, 0))

    def adapted_weight(self) -> Tensor:
        """Return W + DeltaW in the stock shape and dtype. Gradients reach the factors."""
        rows = rearrange(self.matrix(self.weight), "(g o) i -> g o i", g=len(self.blocks))
        return self.stored(self.add_update(rows).flatten(0, 1))

    def add_update(self, W: Tensor) -> Tensor:
        """Return W (g, o, i), split into blocks of one height, plus the update in the dtype of W."""
        pairs = [(self.scale, self.left(), self.right())]
        if self.lora_A0 is not None:
            pairs.append((-self.scale, self.lora_B0, self.lora_A0))
        with torch.autocast(W.device.type, enabled=False):
            for scale, B, A in pairs:
                left = rearrange(B.to(W.dtype), "(g o) r -> g o r", g=len(self.blocks))
                right = rearrange(A.to(W.dtype), "(g r) i -> g r i", g=len(self.blocks))
                W = torch.baddbmm(W, left, right, alpha=scale)
        return W

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the stock module with W + DeltaW.

        The sum is made in fp32 (fp64 for fp64) and rounded once to the weight's dtype.
        """
        dtype = working_dtype(self.weight)
        total = self.matrix(self.frozen).to(dtype, copy=True)
        for start in (False, True):
            A, B = (self.lora_A0, self.lora_B0) if start else (self.right(), self.left_with_gates())
            if A is None:
                continue
            left, right = B.to(dtype).split(self.blocks, 0), A.to(dtype).chunk(len(self.blocks))
            for rows, b, a in zip(total.split(self.blocks, 0), left, right):
                rows.addmm_(b, a, alpha=-self.scale if start else self.scale)
        weight = torch.empty_like(self.weight)
        weight.copy_(self.stored(total))
        return self.stock(nn.Parameter(weight, requires_grad=self.weight.requires_grad))

    def extra_repr(self) -> str:
        stock = f"{type(self.shell).__name__}({self.lora_A.shape[1]}, {self.lora_B.shape[0]})"
        start = ", start kept" if self.lora_A0 is not None else ""
        return f"{stock}, rank={self.rank}, scale={self.scale:g}{start}"


def output_blocks(path: str, module: nn.Module, split_qkv: bool) -> tuple[int, ...]:
    """Return the number of output rows of each factor pair.

    A stack has one pair for each matrix. With `split_qkv`, a fused projection (timm's qkv, in_proj_weight of
    nn.MultiheadAttention) has three pairs of equal height. Any other weight has one pair.
    """
    rows = matrix_shape(module)[0]
    fused = split_qkv and path.split(".")[-1] in ("qkv", "in_proj_weight") and rows % 3 == 0
    stacked = module.weight.shape[0] if isinstance(module, ParameterModule) and module.weight.ndim == 3 else 1
    count = 3 if fused else stacked
    return (rows // count,) * count
