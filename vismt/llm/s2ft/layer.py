"""A frozen weight with some rows or columns trained in place: partial back-propagation.

The trained parameter p (slice_values) holds the values, and the weight W follows it. Of y = W x + b only the
gradient of p is formed, an ordinary .grad, and only what it needs is kept:

    dim 1 (columns J): dL/dp = g^T x[:, J]    (o, k), x[:, J] is kept
    dim 0 (rows J):    dL/dp = g[:, J]^T x    (k, i), x is kept            dL/dx = g W

g (n, o) is the gradient at y, x (n, i). Of x[:, J] a copy is kept: a view would hold all of x. The trained values lie in W so:

    permute   J is one range after reordering (structures.py). Rows that follow each other in W's memory share its storage:
              a step on p is a step on W
    index     the order of the units stays
    delta     W stays the stock weight, p is the difference: one more thin product. For FSDP and others that move p

Otherwise p is a tensor of its own, and each forward and state dict writes it into W (k o numbers): columns of W, an fp32 master
of a half-precision W, and J that is not a range. p is contiguous in every mode, because fused and 8-bit optimisers write `numel`
numbers one after the other: on a view of columns they overwrite frozen ones.

Source: S2FT, arXiv 2412.06289. Its package adds a difference and keeps a view of the whole input; its timed
code slices the other axis and passes the gradient around autograd, which loses it under checkpointing and accumulation. Neither
is followed.
Where p is replaced from outside (torch.func.functional_call), the difference to W is added, as in delta mode, and W is left
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.llm.s2ft.structures import Coupling, Structure, UnitBlock, couple, expand, movable
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import AdapterLayer, Finish, LayerSpec, in_autocast, register_module
from vismt.lowrank.svd import working_dtype
from vismt.lowrank.tensors import check_finite

Span = tuple[int, int] | None

MODES = ("permute", "index", "delta")


@dataclass(frozen=True)
class SliceSettings:
    """Settings of a trained slice.

    rank: number of trained rows or columns. dim: 0 for rows (outputs), 1 for columns (inputs). mode: see the header.
    scale, blocks: written to adapter files, not read.
    """

    rank: int
    scale: float
    blocks: tuple[int, ...]
    dim: int
    mode: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a list in a file
        if self.dim not in (0, 1) or self.mode not in MODES:
            raise ValueError(f"dim {shown_value(self.dim)}, mode {shown_value(self.mode)}")


@register_module("slice")
class SliceLinear(AdapterLayer):
    """nn.Linear, or transformers' Conv1D, with `count` trained inputs (dim 1) or outputs (dim 0).

    forward: x (..., i) -> (..., o), in x's dtype (the autocast dtype where autocast is on).
    Parameter slice_values (o, k) or (k, i): fp32 for half-precision weights unless dtype says otherwise; the difference in
    delta mode. Buffers: slice_index (k,) int64, the features, numbered as in the stock model and sorted by where they lie
    here; slice_start, the stock values at them (not in delta mode); slice_order int32, the order of the structure's units
    (permute). Not in the state dict: slice_place, where they lie.
    """

    slice_index: Tensor
    slice_start: Tensor | None
    slice_order: Tensor | None
    slice_place: Tensor

    Settings = SliceSettings
    combine_refusal = "trains rows or columns of the weights, not factors; export_peft writes them as factors"

    def __init__(self, base: nn.Module, count: int, dim: int, mode: str, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(base)
        self.dim, self.mode = dim, mode
        shape = [self.out_features, self.in_features]
        shape[dim] = count
        device = self.weight.device
        self.slice_values = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype or working_dtype(self.weight)))
        self.register_buffer("slice_index", torch.arange(count, device=device))
        self.register_buffer(
            "slice_start", None if mode == "delta" else torch.empty(shape, device=device, dtype=self.weight.dtype)
        )
        self.register_buffer("slice_order", None)
        self.register_buffer("slice_place", torch.arange(count, device=device), persistent=False)
        self.coupling: Coupling | None = None
        self.block: UnitBlock | None = None  # also in the coupling, which refers back and may be half made in a copy
        self.structure: Structure | None = None
        self.applied = False  # whether the update is in the weight
        self.span: tuple[int, int] | None = None  # the range of slice_place where it is one
        self.shares = False  # whether the storage of p is that of W
        self.pointer = 0

    @property
    def not_sharded(self) -> str:
        """Why FSDP cannot train this layer; empty where it can."""
        if self.mode == "delta":
            return ""
        return (
            f"'s2ft' in mode '{self.mode}' trains values that lie in a frozen weight; set adapt.options.mode to delta"
        )

    # ---- the layer as data
    @classmethod
    def build(cls, base: nn.Module, spec: LayerSpec, **how: Any) -> SliceLinear:
        return cls(base, spec.settings.rank, spec.settings.dim, spec.settings.mode, dtype=how.get("dtype"))

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        settings = spec.settings
        values = (settings.rank, spec.shape[1]) if settings.dim == 0 else (spec.shape[0], settings.rank)
        start = {} if settings.mode == "delta" else {"slice_start": values}
        return {"slice_index": (settings.rank,), "slice_values": values, **start}

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
        return str(spec.settings.rank), f"{spec.settings.scale:g}"

    @classmethod
    def prepare(cls, model: nn.Module, specs: Sequence[LayerSpec]) -> Finish | None:
        structures = movable(model, {spec.path: spec.settings.dim for spec in specs if spec.settings.mode == "permute"})
        return partial(couple, model, structures)

    def join(self, coupling: Coupling, block: UnitBlock) -> None:
        """Become one of the layers of a structure; `block` is where its units lie in this weight."""
        self.coupling, self.block, self.structure = coupling, block, coupling.structure
        self.slice_order = torch.arange(coupling.structure.units, dtype=torch.int32, device=self.weight.device)

    @torch.no_grad()
    def choose(self, index: Tensor) -> None:
        """Train the features `index` (k,) int64 from their stock values on; for a layer without an applied update."""
        if self.weight.is_meta:
            return
        self.slice_index.copy_(index)
        if self.slice_start is None:
            self.slice_values.zero_()
        else:
            self.slice_start.copy_(self.matrix(self.weight).index_select(self.dim, self.slice_index))
            self.slice_values.copy_(self.slice_start)

    # ---- where the values lie
    @torch.no_grad()
    def remove_update(self) -> None:
        if self.applied and self.mode != "delta":
            if self.shares:
                self.slice_values.data = self.slice_values.detach().clone()
            self.matrix(self.weight).index_copy_(self.dim, self.slice_place, self.slice_start)
        self.applied = self.shares = False

    def reorder(self, stock: bool) -> None:
        if self.coupling is not None:
            self.coupling.reorder(stock)

    @torch.no_grad()
    def apply_update(self) -> None:
        """Find where the features lie in the order that the weight has now, and put the values there."""
        self.applied = True
        if self.weight.is_meta:
            return
        place = self.slice_index
        if self.structure is not None:
            order = expand(self.slice_order.long(), self.block, self.structure) - self.block.start
            place = self.block.start + order.argsort()[self.slice_index - self.block.start]
        if not bool((place.diff() > 0).all()):  # features and values in the order of the weight can be a range
            ascending = place.argsort()
            place, self.slice_index = place[ascending], self.slice_index[ascending]
            self.slice_values.data = self.slice_values.detach().index_select(self.dim, ascending)
            if self.slice_start is not None:
                self.slice_start = self.slice_start.index_select(self.dim, ascending)
        self.slice_place = place.clone()
        self.span = (int(place[0]), int(place[-1]) + 1) if bool((place.diff() == 1).all()) else None
        if self.mode == "delta":
            return
        # Put the values into the weight; p becomes a view of it where that view is contiguous.
        view = None if self.span is None else take(self.matrix(self.weight.data), self.dim, place, self.span)
        self.shares = view is not None and view.dtype == self.slice_values.dtype and view.is_contiguous()
        if view is None or not self.shares:
            self._write()
        elif view.data_ptr() != self.slice_values.data_ptr():
            view.copy_(self.slice_values)
            self.slice_values.data = view
        self.pointer = self.slice_values.data_ptr()

    @torch.no_grad()
    def _write(self) -> None:
        """Put the values of a parameter with its own storage into the weight."""
        # .data: graphs that keep W need not notice that the same values are written.
        weight = self.matrix(self.weight.data)
        if self.span is None:
            weight.index_copy_(self.dim, self.slice_place, self.slice_values.to(weight.dtype))
        else:
            take(weight, self.dim, self.slice_place, self.span).copy_(self.slice_values)

    def holds(self) -> bool:
        """Return whether the weight follows the parameter: it is not replaced, and shares the storage where it has to."""
        try:
            pointer = self.slice_values.data_ptr()
        except RuntimeError:  # wrapped by torch.func
            return False
        if not self.shares:
            return pointer == self.pointer
        return pointer == take(self.matrix(self.weight), self.dim, self.slice_place, self.span).data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast(x)
        flat, weight, adds = x.reshape(-1, x.shape[-1]), self.matrix(self.weight), False
        values: Tensor = self.slice_values
        if self.mode == "delta":
            adds = True
        elif not torch.compiler.is_compiling() and not self.holds():
            values, adds = values - take(weight, self.dim, self.slice_place, self.span), True
        elif not self.shares:
            self._write()
        keeps = torch.is_grad_enabled() and values.requires_grad
        out, _ = PartialLinear.apply(
            flat, weight, self.bias, values, self.slice_place, self.span, self.dim, adds, keeps
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    # ---- functions of nn.Module that move or copy the tensors one by one
    def _apply(self, fn: Any, recurse: bool = True) -> SliceLinear:
        """Keep the dtype of a master, which is finer than its weight, where the weight stays coarser: model.to(bfloat16)."""
        p = self.slice_values
        counted = self.weight.is_meta
        fine = p.dtype.itemsize > self.weight.dtype.itemsize and not p.is_meta
        values, grad = p.detach(), None if p.grad is None else p.grad.detach()
        super()._apply(fn, recurse)
        if counted and not self.weight.is_meta:
            raise UserError("to_empty: 's2ft' on the meta device has chosen no units; load the weights, then adapt.")
        p = self.slice_values
        if fine and p.dtype != values.dtype and self.weight.dtype.itemsize < values.dtype.itemsize:
            p.grad = None  # it has the cast's dtype
            p.data = values.to(p.device)
            p.grad = None if grad is None else grad.to(p.device)
        if self.applied:
            self.apply_update()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.applied:
            self.apply_update()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.applied and self.mode != "delta" and not self.shares and self.holds():
            self._write()  # a step on p since the last forward has not reached the weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shares and not keep_vars:  # files refuse two tensors of one storage
            destination[f"{prefix}slice_values"] = destination[f"{prefix}slice_values"].clone()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        order = state_dict.get(f"{prefix}slice_order")
        alone = order is not None and self.slice_order is not None and f"{prefix}weight" not in state_dict
        if alone and not torch.equal(order.to(self.slice_order), self.slice_order):
            errors.append(f"{prefix}weight: the state was saved in another order of units and holds no weight.")
            return
        applied = self.applied
        self.remove_update()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if applied:
            self.apply_update()

    # ---- the update
    def tensors(self) -> dict[str, Tensor]:
        """Return the values and the stock values they replace: a difference in fp32 would not add up to the same bits."""
        start = {} if self.slice_start is None else {"slice_start": self.slice_start}
        return {"slice_index": self.slice_index, "slice_values": self.slice_values, **start}

    def check_fill(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        block, index = self.block, tensors["slice_index"]
        if block is not None:
            end = block.start + block.units * block.size
            if int(index.min()) < block.start or int(index.max()) >= end:
                raise UserError(f"{what}.slice_index: rows outside of {block.start} to {end - 1}, those of its units.")
        for name in tensors.keys() - {"slice_index"}:  # they are written into the weight
            check_finite(f"{what}.{name}", tensors[name], self.weight.dtype)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in `tensors` of a layer on the same base, or on another one: then the difference is added."""
        self.choose(tensors["slice_index"].to(self.slice_index.device))
        values = tensors["slice_values"].to(self.slice_values)
        if self.slice_start is not None:
            start = tensors["slice_start"].to(self.slice_start)
            if not torch.equal(start, self.slice_start):
                values = values - start.to(values) + self.slice_start.to(values)
        self.slice_values.copy_(values)

    def low_rank(self) -> LowRank:
        """Return difference (o, k) times the rows J of the identity, or columns J times the difference (k, i): rank k."""
        dtype = torch.promote_types(self.slice_values.dtype, torch.float32)
        delta = self.slice_values.detach().to(dtype)
        delta = delta if self.slice_start is None else delta - self.slice_start.to(dtype)
        features = (self.out_features, self.in_features)[self.dim]
        chosen = F.one_hot(self.slice_index, features).to(dtype)
        return LowRank(delta, chosen) if self.dim == 1 else LowRank(chosen.t(), delta)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the stock module with the trained values in its weight, rounded once; the update is removed before."""
        merged = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        weight = self.matrix(merged)
        values: Tensor = self.slice_values
        if self.slice_start is None:
            dtype = torch.promote_types(values.dtype, torch.float32)
            values = values.to(dtype) + weight.index_select(self.dim, self.slice_index).to(dtype)
        weight.index_copy_(self.dim, self.slice_index, values.to(weight.dtype))
        return self.stock(merged)

    def extra_repr(self) -> str:
        side = ("rows", "columns")[self.dim]
        count = len(self.slice_index)
        return f"{type(self.shell).__name__}({self.in_features}, {self.out_features}), {count} {side}, mode={self.mode}"


def take(tensor: Tensor, dim: int, place: Tensor, span: Span) -> Tensor:
    """Return the features at `place`, or those of a range, as a view."""
    return tensor.index_select(dim, place) if span is None else tensor.narrow(dim, span[0], span[1] - span[0])


class PartialLinear(torch.autograd.Function):
    """(x (n, i), W (o, i), b, values, place (k,), span, dim, adds, keeps) -> y (n, o), picked (n, k) or empty.

    adds: `values` is a difference to W's slice that is not in W yet; otherwise W holds it. keeps: whether to save what the
    gradient of `values` needs. picked = x[:, J] is an output so that the saved tensor stays differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        place: Tensor,
        span: Span,
        dim: int,
        adds: bool,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        out = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        picked = take(x, 1, place, span).clone() if dim == 1 and (keeps or adds) else x.new_empty(0)
        if adds and dim == 1:
            out.addmm_(picked, values.to(dtype).t())
        elif adds:
            out.index_add_(1, place, x @ values.to(dtype).t())
        return out, picked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, values, place, ctx.span, ctx.dim, ctx.adds, keeps = inputs
        ctx.has_bias, ctx.dtype, ctx.shape = bias is not None, x.dtype, x.shape
        ctx.set_materialize_grads(False)
        saved = (output[1] if ctx.dim == 1 else x) if keeps else None
        ctx.save_for_backward(saved, weight, values if ctx.adds else None, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_picked: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, weight, values, place = ctx.saved_tensors
        need_x, _, need_bias, need_values = ctx.needs_input_grad[:4]
        grad_x = grad_bias = grad_values = None
        if grad is not None:
            if need_x:
                grad_x = grad @ weight.to(ctx.dtype)
                if ctx.adds and ctx.dim == 1:
                    grad_x.index_add_(1, place, grad @ values.to(ctx.dtype))
                elif ctx.adds:
                    grad_x.addmm_(take(grad, 1, place, ctx.span), values.to(ctx.dtype))
            if need_values:  # the thin factor comes first, which BLAS runs faster
                grad_values = (saved.t() @ grad).t() if ctx.dim == 1 else take(grad, 1, place, ctx.span).t() @ saved
            grad_bias = grad.sum(0) if need_bias and ctx.has_bias else None
        if need_x and grad_picked is not None and grad_picked.numel():
            grad_x = (grad_picked.new_zeros(ctx.shape) if grad_x is None else grad_x).index_add(1, place, grad_picked)
        return grad_x, None, grad_bias, grad_values, None, None, None, None, None
