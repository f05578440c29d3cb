"""Several adapters in one batch: layers with the factors of all, of which each sample uses its own.

    y_b = W x_b + c + sum_e g_be (B_e A_e x_b + c_e)        A (e, r, i), B (e, r, o), r the largest rank, c_e of trained biases

g_be is 1 for a sample's adapter, a mixture, or 1 for all where `adapters_per_sample` is not in force: the sum of the updates.
A forward that lost its block (another thread, recomputation in a backward pass) is refused.
Groups of neighbours with the same g are one entry of a batched product: every sample costs what its own adapter costs,
whatever their number. The factors are copies with the scale in B, relative to the stock weight (rank 2r with a principal
start); a linear that was trained whole is I (W' - W), or (W' - W) I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.adapter_choice import Choice, Together, adapters_per_sample
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import AdapterLayer, adapter_layers
from vismt.lowrank.layers.packed_weights import packing
from vismt.lowrank.layers.parameters import hold, is_attention, release
from vismt.lowrank.layers.wrappers import check_mergeable, install_module, replace, stock_order
from vismt.lowrank.model.inject import unwatch_saving, watch_saving
from vismt.lowrank.model.parked import park, put_back
from vismt.lowrank.model.record import SHELF, need_record
from vismt.lowrank.model.targets import is_conv1d, kind_of
from vismt.lowrank.per_sample import unwatch_expansion, watch_expansion
from vismt.lowrank.stand_in import StandIn


@dataclass
class Update:
    """What an adapter adds to one module. bias: (o,)."""

    low_rank: LowRank | None = None
    bias: Tensor | None = None


class MixedLinear(StandIn):
    """nn.Linear or Conv1D with a bank of updates. forward: x (b, ..., i) -> (b, ..., o), in x's dtype or autocast's.

    Buffers A (e + 1, r, i), B (e + 1, r, o), and bank_bias (e + 1, o) where a bias was trained, the last entry zero for samples
    without an adapter, whatever values the others hold; not in the state dict.
    """

    A: Tensor
    B: Tensor
    bank_bias: Tensor | None

    def __init__(self, base: nn.Module, together: Together, updates: Sequence[Update]) -> None:
        super().__init__(base)
        self.together, self.chosen = together, False  # chosen: whether samples had adapters of their own
        count, rank = len(updates) + 1, max([u.low_rank.rank for u in updates if u.low_rank is not None], default=1)
        A = self.weight.new_zeros(count, rank, self.in_features)
        B = self.weight.new_zeros(count, rank, self.out_features)
        bias = self.weight.new_zeros(count, self.out_features)
        for number, update in enumerate(updates):
            if update.low_rank is not None:
                plain = update.low_rank.plain()
                A[number, : plain.rank] = plain.R
                B[number, : plain.rank] = (plain.L * plain.scale).t()
            if update.bias is not None:
                bias[number] = update.bias
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        trained = any(update.bias is not None for update in updates)
        self.register_buffer("bank_bias", bias if trained else None, persistent=False)

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return A (g, r, i), B (g, r, o) and, where there is one, the bias (g, 1, o) of the groups of x (b, ...)."""
        scope = adapters_per_sample.scope()
        if scope is None:
            if not torch.compiler.is_compiling():
                adapters_per_sample.refuse_lost(self.together.names, self.chosen)
            return self._pick(None, x)
        self.chosen = True
        choice = scope.choice(self.together.names, len(x))
        if torch.compiler.is_compiling():
            return self._pick(choice, x)
        kept = scope.kept.get(self)
        if kept is None or kept[0].dtype != x.dtype or kept[0].device != x.device:
            kept = scope.kept[self] = self._pick(choice, x)
        return kept

    def _pick(self, choice: Choice | None, x: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of a choice; None adds all."""

        def of(bank: Tensor, weighted: bool) -> Tensor:
            return bank[None, :-1] if choice is None else choice.of(bank, weighted)

        picked = [of(self.A, False).flatten(1, 2), of(self.B, True).flatten(1, 2)]
        if self.bank_bias is not None:
            picked.append(of(self.bank_bias, True).sum(1, keepdim=True))
        return tuple(tensor.to(x.dtype) for tensor in picked)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        A, B, *bias = self.factors(x)
        weight = self.matrix(self.weight).to(x.dtype)
        out = F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        groups = out.view(len(A), -1, out.shape[-1])
        groups.baddbmm_(x.reshape(len(A), -1, x.shape[-1]) @ A.mT, B)
        if bias:
            groups += bias[0]
        return out


class MixedConv2d(MixedLinear):
    """nn.Conv2d (groups = 1) with a bank of updates: the groups of samples are those of a grouped convolution.

    forward: x (b, c, h, w) -> (b, o, h', w').
    """

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.shell
        out = conv._conv_forward(x, self.weight, self.bias)
        A, B, *bias = self.factors(out)
        groups, (height, width) = len(A), conv.kernel_size
        kernel = rearrange(A, "g r (c h w) -> (g r) c h w", h=height, w=width)
        stacked = rearrange(x, "(g b) c h w -> b (g c) h w", g=groups)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            stacked, padding = F.pad(stacked, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        hidden = F.conv2d(stacked, kernel.to(stacked.dtype), None, conv.stride, padding, conv.dilation, groups)
        update = F.conv2d(hidden, rearrange(B, "g r o -> (g o) r 1 1").to(hidden.dtype), groups=groups)
        if bias:
            update = update + rearrange(bias[0], "g 1 o -> (g o) 1 1").to(update.dtype)
        return out + rearrange(update, "b (g o) h w -> (g b) o h w", g=groups)


def mixed_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are active together."""
    shelf: Any = model._modules.get(SHELF)
    return shelf.mixed if shelf is not None else ()


def mix(model: nn.Module, names: Sequence[str]) -> None:
    """Let parked adapters of a model without active ones be active together; UserError where one cannot."""
    updates = [_updates_of(model, name) for name in names]
    together, layers = Together(names), {}
    for path in dict.fromkeys(path for by_path in updates for path in by_path):
        stock = model.get_submodule(path)
        layer = MixedConv2d if kind_of(stock) == "conv2d" else MixedLinear
        layers[path] = layer(stock, together, [by_path.get(path, Update()) for by_path in updates])
    hold(model, layers)
    for path, mixed in layers.items():
        install_module(model, path, mixed)
    model._modules[SHELF].mixed = tuple(names)
    watch_expansion(model)
    watch_saving(model)


def unmix(model: nn.Module) -> None:
    """Put the stock modules back: the inverse of `mix`."""
    replace(model, MixedLinear, lambda layer: layer.restored())
    release(model)
    model._modules[SHELF].mixed = ()
    unwatch_expansion(model)
    unwatch_saving(model)


def _updates_of(model: nn.Module, name: str) -> dict[str, Update]:
    """Return the updates of a parked adapter by module path."""
    put_back(model, name)
    try:
        record = need_record(model, "activate")
        check_mergeable(model, "activate")
        for spec in record.sites:
            reason = (
                spec.layer.not_exported
                or ("" if spec.layer.has_factors else "has no factors")
                or _reason(model, spec.path)
            )
            if reason:
                raise UserError(
                    f"activate: '{name}' cannot be mixed: '{record.method}' {reason}; activate it alone, by its name."
                )
        with stock_order(model):
            updates = {path: Update(layer.low_rank()) for path, layer in adapter_layers(model).items()}
            for whole, original in record.also_train.items():
                _add_whole(model, name, whole, original, updates)
        return updates
    finally:
        park(model)


def _reason(model: nn.Module, path: str) -> str:
    """Return why the module at a path has no mixed layer, "" where it has one."""
    stock: Any = model.get_submodule(path)
    stock = stock.shell if isinstance(stock, StandIn) else stock
    if packing(model.get_submodule(path)) is not None:
        return f"adapts '{path}', whose weight is packed"
    if is_attention(model.get_submodule(path.rpartition(".")[0])):
        return f"adapts '{path}', whose weight nn.MultiheadAttention reads itself"
    kind = kind_of(stock)
    if kind in ("linear", "conv1d") or (kind == "conv2d" and stock.groups == 1):
        return ""
    return f"adapts '{path}' ({type(stock).__name__}), and only linears and convolutions nn.Conv2d without groups are mixed"


def _add_whole(model: nn.Module, adapter: str, name: str, original: Tensor, updates: dict[str, Update]) -> None:
    """Add the change of a parameter that was trained whole; UserError where it is not one of a linear alone."""
    path, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    uses = [p for _, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    linear = kind_of(module) in ("linear", "conv1d")
    if len(uses) > 1 or not (
        (linear and leaf == "weight") or ((linear or isinstance(module, AdapterLayer)) and leaf == "bias")
    ):
        raise UserError(
            f"activate: '{adapter}' cannot be mixed: it trained '{name}' whole, which only a linear of its own can; activate it "
            "alone, by its name."
        )
    change = parameter.detach() - original.to(parameter.device)
    update = updates.setdefault(path, Update())
    if leaf == "bias":
        update.bias = change
    else:
        change = change.t() if is_conv1d(module) else change
        rows, columns = change.shape
        eye = torch.eye(min(rows, columns), device=change.device, dtype=change.dtype)
        update.low_rank = LowRank(eye, change) if rows <= columns else LowRank(change, eye)
