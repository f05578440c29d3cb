"""The linears of an FFN with a LoRA pair for each of K experts of hidden units, the form of EMTAL's equations 6 and 7.

    fc1: unit h      u_h = W_h x + b_h + s B_h A_e x           e the expert of unit h;  A_e (r, d), B_h (1, r)
    fc2:             y = W v + b + s sum_e B_e A_e v_e         v_e the units of expert e;  A_e (r, H / K), B_e (d, r)

fc1 holds lora_A (K r, d) and lora_B (H, r). fc2 holds lora_A (r, H) and lora_B (d, K r). Each has r (K d + H) numbers, as many
as one shared pair of rank r (K d + H) / (d + H). `expert`, int64 (H,), is the expert of each unit. As one matrix an update has
rank up to K r, and it is computed in this way. Zhong et al., NeurIPS 2024, arXiv 2501.06884. The released code has a shared
pair instead (method.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.lowrank.layers.base import LayerSpec, register_module, spec_of
from vismt.lowrank.layers.forms import LowRankLinear
from vismt.lowrank.layers.low_rank import LayerOptions, LowRankLayer, LowRankSettings
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.tensors import check_factor

if TYPE_CHECKING:
    from typing_extensions import Unpack

SIDES = {"fc1": "out", "fc2": "in"}  # linear -> which of its features are hidden units


@dataclass(frozen=True)
class ExpertSettings(LowRankSettings):
    """Settings of pairs for each expert.

    rank: Rank K r of all pairs. n_experts: Number K of experts. side: Side of the hidden units, "out" or "in".
    """

    n_experts: int = 1
    side: str = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in SIDES.values() or self.n_experts < 1 or self.rank % self.n_experts or len(self.blocks) > 1:
            raise ValueError(f"{self.n_experts} experts of side {shown_value(self.side)} for rank {self.rank}")


@register_module("expert_pairs")
class ExpertPairs(LowRankLinear):
    """A linear layer with a pair of factors for each expert of its hidden units."""

    expert: Tensor
    Settings = ExpertSettings
    weight_readable = False

    def __init__(
        self, base: nn.Module, rank: int, scale: float, *, n_experts: int, side: str, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__(base, rank, scale, **options)
        self.n_experts, self.side = n_experts, side
        own, matrix = rank // n_experts, self.matrix(self.weight)
        if side == "out":
            self.lora_B = nn.Parameter(self.lora_B.new_empty(matrix.shape[0], own))
        else:
            self.lora_A = nn.Parameter(self.lora_A.new_empty(own, matrix.shape[1]))
        units = matrix.shape[0 if side == "out" else 1]
        self.register_buffer("expert", torch.arange(units, device=self.weight.device) // max(1, units // n_experts))

    @classmethod
    def plan(
        cls, path: str, module: nn.Module, rank: int, alpha: float | None, *, n_experts: int = 1, **options: Any
    ) -> LayerSpec:
        """Return the spec of fc1 or fc2, with as many parameters as a shared pair of `rank` has.

        Other linears get the spec of LoRA.
        """
        side = SIDES.get(path.rpartition(".")[2])
        if side is None:
            return LowRankLayer.plan(path, module, rank, alpha, **options)
        units, width = matrix_shape(module) if side == "out" else matrix_shape(module)[::-1]
        own = rank * (units + width) / (n_experts * width + units)
        if own < 1 or own % 1:
            raise UserError(
                f"emtal: pairs 'expert': the parameters of a shared pair of rank {rank} of '{path}' give each of {n_experts} "
                f"experts a rank of {own:.3g}, needed a whole number; change rank or n_experts."
            )
        shared = LowRankLayer.plan(path, module, rank, alpha, **options).settings
        settings = ExpertSettings(n_experts * int(own), shared.scale, shared.blocks, n_experts=n_experts, side=side)
        return spec_of(path, module, cls, settings)

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> ExpertPairs:
        own = spec.settings
        how = cls._options(own)
        return cls(base, dropout=dropout, dtype=dtype, n_experts=own.n_experts, side=own.side, **how)

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        super().check_settings(spec)
        units = spec.shape[0 if spec.settings.side == "out" else 1]
        if units % spec.settings.n_experts:
            raise ValueError(f"{spec.settings.n_experts} experts of {units} units")

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        settings, (outputs, inputs) = spec.settings, spec.shape
        own, out = settings.rank // settings.n_experts, settings.side == "out"
        return {
            "lora_A": (settings.rank if out else own, inputs),
            "lora_B": (outputs, own if out else settings.rank),
            "expert": (outputs if out else inputs,),
        }

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {}

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        for name in ("lora_A", "lora_B"):
            check_factor(f"{what}.{name}", tensors[name])
        expert, count = tensors["expert"], spec.settings.n_experts
        whole = expert.dtype == torch.int64 and int(expert.min()) >= 0 and int(expert.max()) < count
        if not whole or len(set(expert.bincount(minlength=count).tolist())) > 1:
            raise UserError(f"{what}.expert: it must be int64 and give each of {count} experts as many units.")

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        shapes = cls.tensor_shapes(spec)
        return sum(shapes[name][0] * shapes[name][1] for name in ("lora_A", "lora_B"))

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        settings = spec.settings
        return f"{settings.n_experts} x {settings.rank // settings.n_experts}", f"{settings.scale:g}"

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor, offset: bool) -> None:
        """Copy in what each unit needs of A (K r, i) and B (o, K r)."""
        out = self.side == "out"
        super().set_factors(A if out else self._own(A.t()).t(), self._own(B) if out else B, offset)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "expert": self.expert}

    def left(self) -> Tensor:
        return self._spread(self.lora_B) if self.side == "out" else self.lora_B

    def right(self) -> Tensor:
        return self.lora_A if self.side == "out" else self._spread(self.lora_A.t()).t()

    def _spread(self, rows: Tensor) -> Tensor:
        """Return the rows (H, K r) of factors (H, r) of the units.

        They are zero except in the r columns of each unit's expert.
        """
        member = F.one_hot(self.expert, self.n_experts).to(rows.dtype)
        return rearrange(member[:, :, None] * rows[:, None], "h e r -> h (e r)")

    def _own(self, rows: Tensor) -> Tensor:
        """Return the r columns of each unit's expert, (H, r), of rows (H, K r)."""
        by_expert = rearrange(rows, "h (e r) -> h e r", e=self.n_experts)
        return by_expert[torch.arange(len(rows), device=rows.device), self.expert]
