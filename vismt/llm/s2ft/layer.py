"""A frozen weight with a trained change of some of its rows or columns.

    dim 1 (columns J): y = W x + b + P x[J]        dL/dP = g x[J]^T   (o, k), keeps a copy of x[J]
    dim 0 (rows J):    y = W x + b, y[J] += P x    dL/dP = g[J] x^T   (k, i), keeps x

g is the gradient at y. P (slice_values) starts at zero, and W keeps its values. A copy of x[J] is kept because a view would
hold all of x. W + P in the columns J has the function and the gradient of the paper (S2FT, arXiv 2412.06289), which trains W_J
itself. Weight decay differs. It pulls P to zero, and so the weights back to the base. In the paper it pulls the weights
themselves to zero. The package of the paper adds P as well, and keeps a view of the whole input. The code that the paper timed
slices the other axis and passes the gradient around autograd, which loses it under checkpointing and accumulation. Neither is
followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import AdapterLayer, LayerSpec, in_autocast, register_module
from vismt.lowrank.layers.fused import PositionalFunction
from vismt.lowrank.svd import working_dtype


@dataclass(frozen=True)
class SliceSettings:
    """Settings of a trained slice.

    rank: Number of trained rows or columns. dim: 0 for rows (outputs), 1 for columns (inputs). scale, blocks, mode: Settings in
    files of earlier versions. They are not kept.
    """

    rank: int
    dim: int
    scale: float | None = None
    blocks: tuple[int, ...] = ()
    mode: str = ""

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise ValueError(f"dim {shown_value(self.dim)}")
        for name, unset in {"scale": None, "blocks": (), "mode": ""}.items():
            object.__setattr__(self, name, unset)


@register_module("slice")
class SliceLinear(AdapterLayer):
    """nn.Linear, or transformers' Conv1D, with `count` trained inputs (dim 1) or outputs (dim 0).

    forward: x (..., i) -> (..., o), in the dtype of x, or of autocast if it is on. The parameter slice_values (o, k) or (k, i)
    is the change P, in fp32 for half-precision weights unless dtype says otherwise. The buffer slice_index (k,) int64 holds the
    features J.
    """

    slice_index: Tensor

    Settings = SliceSettings
    combine_refusal = "trains rows or columns of the weights, not factors; export_peft writes them as factors"

    def __init__(self, base: nn.Module, count: int, dim: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(base)
        self.dim = dim
        shape = [self.out_features, self.in_features]
        shape[dim] = count
        device = self.weight.device
        self.slice_values = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype or working_dtype(self.weight)))
        self.register_buffer("slice_index", torch.arange(count, device=device))

    # ---- the layer as data
    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> SliceLinear:
        return cls(base, spec.settings.rank, spec.settings.dim, dtype=dtype)

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        settings = spec.settings
        values = (settings.rank, spec.shape[1]) if settings.dim == 0 else (spec.shape[0], settings.rank)
        return {"slice_values": values, "slice_index": (settings.rank,)}

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shape of the stock values. Earlier files hold them, with trained values instead of the change."""
        return {"slice_start": cls.tensor_shapes(spec)["slice_values"]}

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        settings = spec.settings
        if not 1 <= settings.rank <= spec.shape[settings.dim] or spec.kind == "conv2d":
            raise ValueError(f"rank {settings.rank} on dim {settings.dim} of a {spec.kind} {spec.shape}")

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        index, features = tensors["slice_index"], spec.shape[spec.settings.dim]
        if index.dtype != torch.int64 or len(index.unique()) < len(index):
            raise UserError(f"{what}.slice_index: {index.dtype}; it must be int64, each row or column once.")
        if int(index.min()) < 0 or int(index.max()) >= features:
            wrong = next(number for number in index.tolist() if not 0 <= number < features)
            raise UserError(f"{what}.slice_index: it names {wrong}; the weight has 0 to {features - 1}.")
        super().check_tensors(what, spec, {name: value for name, value in tensors.items() if name != "slice_index"})

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        return spec.settings.rank * spec.shape[1 - spec.settings.dim]

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        return str(spec.settings.rank), "1"

    # ---- the update
    def tensors(self) -> dict[str, Tensor]:
        return {"slice_values": self.slice_values, "slice_index": self.slice_index}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in the change and its features. For an earlier file, the change is the difference of its values."""
        change = tensors["slice_values"]
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        if "slice_start" in tensors:
            change = change - tensors["slice_start"].to(change)
        self.slice_index.copy_(tensors["slice_index"])
        self.slice_values.copy_(change)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast(x)
        flat, weight = x.reshape(-1, x.shape[-1]), self.matrix(self.weight)
        if self.weight.requires_grad and torch.is_grad_enabled():  # the user trains the weight beside the change
            changed = weight.index_add(self.dim, self.slice_index, self.slice_values.to(weight.dtype))
            return F.linear(x, changed.to(x.dtype), self.bias)
        out, _ = SlicedLinear.apply(flat, weight, self.bias, self.slice_values, self.slice_index, self.dim)
        return out.view(*x.shape[:-1], out.shape[-1])

    def low_rank(self) -> LowRank:
        """Return the change as factors of rank k.

        They are P (o, k) times the rows J of the identity, or the columns J of the identity times P (k, i).
        """
        dtype = torch.promote_types(self.slice_values.dtype, torch.float32)
        change = self.slice_values.detach().to(dtype)
        chosen = F.one_hot(self.slice_index, (self.out_features, self.in_features)[self.dim]).to(dtype)
        return LowRank(change, chosen) if self.dim == 1 else LowRank(chosen.t(), change)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the stock module with the change in its weight, summed in fp32 (fp64 for fp64) and rounded once."""
        merged = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        matrix = self.matrix(merged)
        dtype = torch.promote_types(self.slice_values.dtype, torch.float32)
        total = matrix.index_select(self.dim, self.slice_index).to(dtype) + self.slice_values
        matrix.index_copy_(self.dim, self.slice_index, total.to(matrix.dtype))
        return self.stock(merged)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SliceLinear:
        """Keep the dtype of a change that is finer than its weight, if the weight stays coarser (model.to(bfloat16))."""
        change, empty = self.slice_values, self.weight.is_meta
        fine = change.dtype.itemsize > self.weight.dtype.itemsize and not empty
        values, grad = change.detach(), None if change.grad is None else change.grad.detach()
        super()._apply(fn, recurse)
        if empty and not self.weight.is_meta:
            raise UserError("to_empty: 's2ft' on the meta device has chosen no units; load the weights, then adapt.")
        change = self.slice_values
        if fine and change.dtype != values.dtype and self.weight.dtype.itemsize < values.dtype.itemsize:
            change.grad = None  # a gradient has the dtype of its parameter
            change.data = values.to(change.device)
            change.grad = None if grad is None else grad.to(change.device)
        return self

    def extra_repr(self) -> str:
        side, count = ("rows", "columns")[self.dim], len(self.slice_index)
        return f"{type(self.shell).__name__}({self.in_features}, {self.out_features}), {count} {side}"


class SlicedLinear(PositionalFunction):
    """Function (x (n, i), W (o, i), b, P, J (k,), dim) -> y (n, o), x[:, J] (n, k). The second output is empty for rows.

    x[:, J] is an output so that the tensor that backward keeps is still differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor, index: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if dim == 0:
            return out.index_add_(1, index, x @ change.to(dtype).t()), x.new_empty(0)
        picked = x.index_select(1, index)
        return out.addmm_(picked, change.to(dtype).t()), picked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, change, index, ctx.dim = inputs
        ctx.has_bias, ctx.dtype, ctx.shape = bias is not None, x.dtype, x.shape
        ctx.set_materialize_grads(False)
        kept = output[1] if ctx.dim == 1 else x
        ctx.save_for_backward(kept if change.requires_grad else None, weight, change, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_picked: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight, change, index = ctx.saved_tensors
        need_x, _, need_bias, need_change = ctx.needs_input_grad[:4]
        grad_x = grad_bias = grad_change = None
        if grad is not None:
            at_rows = grad if ctx.dim == 1 else grad.index_select(1, index)
            if need_x:
                grad_x = grad @ weight.to(ctx.dtype)
                if ctx.dim == 1:
                    grad_x.index_add_(1, index, grad @ change.to(ctx.dtype))
                else:
                    grad_x.addmm_(at_rows, change.to(ctx.dtype))
            if need_change:  # BLAS is faster with the thin factor first
                grad_change = (kept.t() @ grad).t() if ctx.dim == 1 else at_rows.t() @ kept
            grad_bias = grad.sum(0) if need_bias and ctx.has_bias else None
        if need_x and grad_picked is not None and grad_picked.numel():
            grad_x = (grad_picked.new_zeros(ctx.shape) if grad_x is None else grad_x).index_add(1, index, grad_picked)
        return grad_x, None, grad_bias, grad_change, None, None
