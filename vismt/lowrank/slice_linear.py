"""A frozen weight of which some rows or columns are trained in place: partial back-propagation.

The trained parameter p (slice_values) is what counts, and the weight W follows it; the gradients are partial.py's.

    permute   J is one range after reordering (coupling.py): p shares W's storage, a step on p is a step on W
    index     p holds the values, and each forward and state dict writes them into W (k o numbers); so it is, too, where p
              is an fp32 master of a half-precision W, and where groups of heads keep J from being one range
    delta     W stays the stock weight, p is the difference: one thin product more. For FSDP and others that move p

Source: S2FT, arXiv 2412.06289. Its package adds a difference and keeps a view of the whole input; that is not followed.
Where p is replaced from outside (torch.func.functional_call), the difference to W is added, as in delta mode, and W is left
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.lowrank.adapter_layer import Host
from vismt.lowrank.factors import LowRank
from vismt.lowrank.permutation import Coupling, expand
from vismt.lowrank.slice_autograd import PartialLinear, take
from vismt.lowrank.structures import Block, Structure

MODES = ("permute", "index", "delta")


class SlicedLinear(Host):
    """nn.Linear, or transformers' Conv1D, of which `count` inputs (dim 1) or outputs (dim 0) are trained.

    forward: x (..., i) -> (..., o), in x's dtype (the autocast dtype where autocast is on).
    Parameter slice_values (o, k) or (k, i): fp32 for half-precision weights unless dtype says otherwise; the difference in
    delta mode. Buffers: slice_index (k,) int64, the features, numbered as in the stock model and sorted as they lie here;
    slice_start, the stock values at them (not in delta mode); slice_order int32, the order of the structure's units
    (permute). Not in the state dict: slice_place, where they lie.
    """

    def __init__(self, base: nn.Module, count: int, dim: int, mode: str, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(base)
        self.dim, self.mode = dim, mode
        shape = [self.out_features, self.in_features]
        shape[dim] = count
        device, own = self.weight.device, self.weight.dtype
        kind = dtype or (torch.float32 if own in (torch.bfloat16, torch.float16) else own)
        self.slice_values = nn.Parameter(torch.zeros(shape, device=device, dtype=kind))
        self.register_buffer("slice_index", torch.arange(count, device=device))
        self.register_buffer("slice_start", None if mode == "delta" else torch.empty(shape, device=device, dtype=own))
        self.register_buffer("slice_order", None)
        self.register_buffer("slice_place", torch.arange(count, device=device), persistent=False)
        self.coupling: Coupling | None = None
        self.block: Block | None = None  # beside the coupling, which refers back and may be half made in a copy
        self.structure: Structure | None = None
        # settled: the update is in its place. span: the range of slice_place, if it is one. shares: p's storage is W's.
        self.settled, self.span, self.shares, self.pointer = False, None, False, 0

    def join(self, coupling: Coupling, block: Block) -> None:
        """Be one of the hosts of a structure; `block` is where its units lie in this weight."""
        self.coupling, self.block, self.structure = coupling, block, coupling.structure
        self.slice_order = torch.arange(coupling.structure.units, dtype=torch.int32, device=self.weight.device)

    @torch.no_grad()
    def choose(self, index: Tensor) -> None:
        """Train the features `index` (k,) int64 from their stock values on; for a host that is not settled."""
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
    def lift(self) -> None:
        if self.settled and self.mode != "delta":
            self.slice_values.data = self.slice_values.detach().clone()
            self.matrix(self.weight).index_copy_(self.dim, self.slice_place, self.slice_start)
        self.settled = self.shares = False

    def reorder(self, stock: bool) -> None:
        if self.coupling is not None:
            self.coupling.reorder(stock)

    @torch.no_grad()
    def settle(self) -> None:
        """Find the features in the order that the weight has now, and put the values there."""
        self.settled = True
        if self.weight.is_meta:
            return
        place = self._places()
        if not bool(
            (place.diff() > 0).all()
        ):  # only together with their values in the order of the weight are they a range
            order = place.argsort()
            place, self.slice_index = place[order], self.slice_index[order]
            self.slice_values.data = self.slice_values.detach().index_select(self.dim, order)
            if self.slice_start is not None:
                self.slice_start = self.slice_start.index_select(self.dim, order)
        self.slice_place = place.clone()
        self.span = (int(place[0]), int(place[-1]) + 1) if bool((place.diff() == 1).all()) else None
        if self.mode != "delta":
            self._write(shares=self.span is not None and self.slice_values.dtype == self.weight.dtype)

    def _places(self) -> Tensor:
        """Where the features lie in the present order of the weight, (k,) int64."""
        if self.structure is None:
            return self.slice_index
        order = expand(self.slice_order.long(), self.block, self.structure) - self.block.start
        return self.block.start + order.argsort()[self.slice_index - self.block.start]

    @torch.no_grad()
    def _write(self, shares: bool) -> None:
        """Put the values into the weight, and with `shares` let them be one."""
        weight = self.matrix(
            self.weight.data
        )  # .data: graphs that keep W need not hear that the same values are written
        if shares:
            view = take(weight, self.dim, self.slice_place, self.span)
            if view.data_ptr() != self.slice_values.data_ptr() or view.stride() != self.slice_values.stride():
                view.copy_(self.slice_values)
                self.slice_values.data = view
        else:
            weight.index_copy_(self.dim, self.slice_place, self.slice_values.to(weight.dtype))
        self.shares, self.pointer = shares, self.slice_values.data_ptr()

    def holds(self) -> bool:
        """Whether the parameter is the one that the weight follows: not replaced, and of one storage where it has to be."""
        try:
            pointer = self.slice_values.data_ptr()
        except RuntimeError:  # wrapped by torch.func
            return False
        if not self.shares:
            return pointer == self.pointer
        return pointer == take(self.matrix(self.weight), self.dim, self.slice_place, self.span).data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat, weight, values, adds = x.reshape(-1, x.shape[-1]), self.matrix(self.weight), self.slice_values, False
        if self.mode == "delta":
            adds = True
        elif not torch.compiler.is_compiling() and not self.holds():
            values, adds = values - take(weight, self.dim, self.slice_place, self.span), True
        elif not self.shares:
            self._write(shares=False)
        keeps = torch.is_grad_enabled() and values.requires_grad
        out, _ = PartialLinear.apply(
            flat, weight, self.bias, values, self.slice_place, self.span, self.dim, adds, keeps
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    # ---- what moves or copies the tensors one by one
    def _apply(self, fn: Any, recurse: bool = True) -> SlicedLinear:
        """A master, which is finer than its weight, stays as it is where the weight stays coarser: model.to(bfloat16)."""
        p = self.slice_values
        fine = p.dtype.itemsize > self.weight.dtype.itemsize and not p.is_meta
        values, grad = p.detach(), None if p.grad is None else p.grad.detach()
        super()._apply(fn, recurse)
        p = self.slice_values
        if fine and p.dtype != values.dtype and self.weight.dtype.itemsize < values.dtype.itemsize:
            p.grad = None  # of the cast's dtype, which the values are not to have
            p.data = values.to(p.device)
            p.grad = None if grad is None else grad.to(p.device)
        if self.settled:
            self.settle()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.settled:
            self.settle()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.settled and self.mode != "delta" and not self.shares and self.holds():
            self._write(shares=False)  # a step on p since the last forward has not reached the weight
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
        settled = self.settled
        self.lift()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if settled:
            self.settle()

    # ---- what the core asks of a host
    def factors(self) -> dict[str, Tensor]:
        """Values and the stock values they replace: a difference in fp32 would not add up to the same bits."""
        start = {} if self.slice_start is None else {"slice_start": self.slice_start}
        return {"slice_index": self.slice_index, "slice_values": self.slice_values, **start}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `factors` of the same base, or of another one: then the difference is taken."""
        self.choose(tensors["slice_index"].to(self.slice_index.device))
        values = tensors["slice_values"].to(self.slice_values)
        if self.slice_start is not None:
            start = tensors["slice_start"].to(self.slice_start)
            if not torch.equal(start, self.slice_start):
                values = values - start.to(values) + self.slice_start.to(values)
        self.slice_values.copy_(values)

    def low_rank(self) -> LowRank:
        """The difference (o, k) times the rows J of the identity, or the columns J times the difference (k, i): rank k."""
        kind = torch.promote_types(self.slice_values.dtype, torch.float32)
        delta = self.slice_values.detach().to(kind)
        delta = delta if self.slice_start is None else delta - self.slice_start.to(kind)
        features = (self.out_features, self.in_features)[self.dim]
        chosen = F.one_hot(self.slice_index, features).to(kind)
        return LowRank(delta, chosen) if self.dim == 1 else LowRank(chosen.t(), delta)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The stock module with the trained values in, in place, rounded once to the weight's dtype; for a lifted host."""
        weight, values = self.matrix(self.weight), self.slice_values
        if self.slice_start is None:
            kind = torch.promote_types(values.dtype, torch.float32)
            values = values.to(kind) + weight.index_select(self.dim, self.slice_index).to(kind)
        weight.index_copy_(self.dim, self.slice_index, values.to(weight.dtype))
        return self._stock(self.weight)

    def extra_repr(self) -> str:
        side = ("rows", "columns")[self.dim]
        count = len(self.slice_index)
        return f"{type(self.shell).__name__}({self.in_features}, {self.out_features}), {count} {side}, mode={self.mode}"
