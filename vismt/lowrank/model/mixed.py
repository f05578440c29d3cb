"""Several adapters in one batch: layers with the factors of all, of which each sample uses its own.

    y_b = W x_b + c + sum_e g_be (B_e A_e x_b + c_e)        A (e, r, i), B (e, r, o), r the largest rank, c_e of trained biases

g_be is 1 for the adapter of a sample, or the weights of a mixture. Without `adapters_per_sample` it is 1 for all adapters,
which gives the sum of the updates. A forward that lost its block (in another thread, or recomputed in a backward pass) is
refused. Groups of neighbours with the same g are one entry of a batched product, so that a sample costs what its own adapter
costs, however many adapters there are. The attention of a Swin computes on windows, with w rows for each sample, one sample
after the other. The factors are copies with the scale in B, relative to the stock weight (rank 2r with a principal start). A
linear that was trained whole is I (W' - W), or (W' - W) I.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Real
from typing import Any, ClassVar, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.base import AdapterLayer, PlacedWeight, adapter_layers, in_autocast
from vismt.lowrank.layers.gates import PerSample, unwatch_expansion, watch_expansion
from vismt.lowrank.layers.parameter_modules import is_attention, to_modules, to_parameters
from vismt.lowrank.layers.stock_modules import is_conv1d, kind_of, weight_format
from vismt.lowrank.model.modules import attach_all, check_mergeable, detach_all
from vismt.lowrank.model.record import need_record
from vismt.lowrank.update import Update


class MixedLinear(PlacedWeight):
    """nn.Linear or Conv1D with a bank of updates. forward: x (b, ..., i) -> (b, ..., o), in the dtype of x or of autocast.

    The buffers are A (e + 1, r, i), B (e + 1, r, o) and, if a bias was trained, bank_bias (e + 1, o). The last entry is zero,
    for samples without an adapter, whatever values the other entries hold. The buffers are not in the state dict.
    """

    A: Tensor
    B: Tensor
    bank_bias: Tensor | None

    def __init__(self, base: nn.Module, active: ActiveSet, updates: Sequence[Update], windows: bool = False) -> None:
        super().__init__(base)
        self.windows = windows  # whether a sample may have several rows
        self.active, self.chosen = active, False  # chosen: Whether samples had adapters of their own
        count, rank = len(updates) + 1, max([block.rank for update in updates for block in update.blocks], default=1)
        A = self.weight.new_zeros(count, rank, self.in_features)
        B = self.weight.new_zeros(count, rank, self.out_features)
        bias = self.weight.new_zeros(count, self.out_features)
        for number, update in enumerate(updates):
            for block in update.blocks:  # at most one
                plain = block.plain()
                A[number, : plain.rank] = plain.A
                B[number, : plain.rank] = (plain.B * plain.scale).t()
            if update.bias is not None:
                bias[number] = update.bias
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        trained = any(update.bias is not None for update in updates)
        self.register_buffer("bank_bias", bias if trained else None, persistent=False)

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return A (g, r, i), B (g, r, o) and, if there is one, the bias (g, 1, o) of the groups of x (b, ...)."""
        scope = AdaptersPerSample.scope()
        if scope is None:
            if not torch.compiler.is_compiling():
                AdaptersPerSample.refuse_lost(self.active.names, self.chosen)
            return self._pick(None, x)
        self.chosen = True
        choice = scope.choice(self.active.names, len(x), self.windows)
        if torch.compiler.is_compiling():
            return self._pick(choice, x)
        kept = scope.kept.get(self)
        if kept is None or kept[0].dtype != x.dtype or kept[0].device != x.device:
            kept = scope.kept[self] = self._pick(choice, x)
        return kept

    def _pick(self, choice: RowChoice | None, x: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of a choice. None adds all adapters."""

        def of(bank: Tensor, weighted: bool) -> Tensor:
            return bank[None, :-1] if choice is None else choice.of(bank, weighted)

        picked = [of(self.A, False).flatten(1, 2), of(self.B, True).flatten(1, 2)]
        if self.bank_bias is not None:
            picked.append(of(self.bank_bias, True).sum(1, keepdim=True))
        return tuple(tensor.to(x.dtype) for tensor in picked)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast(x)
        A, B, *bias = self.factors(x)
        weight = self.matrix(self.weight).to(x.dtype)
        out = F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        groups = out.view(len(A), -1, out.shape[-1])
        groups.baddbmm_(x.reshape(len(A), -1, x.shape[-1]) @ A.mT, B)
        if bias:
            groups += bias[0]
        return out


class MixedConv2d(MixedLinear):
    """nn.Conv2d (groups = 1) with a bank of updates. The groups of samples become the groups of a grouped convolution.

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
        rows, samples = out.flatten(2), len(out) // groups
        left = repeat(B.to(hidden.dtype), "g r o -> (g b) o r", b=samples)
        rows.baddbmm_(left, rearrange(hidden, "b (g r) h w -> (g b) r (h w)", g=groups))
        if bias:
            rows += repeat(bias[0], "g 1 o -> (g b) o 1", b=samples)
        return out


def mix(model: nn.Module, names: Sequence[str], updates: Sequence[Mapping[str, Update]]) -> None:
    """Put mixed layers into a stock model. `updates` holds the updates of each adapter, by path."""
    active, layers, windows = ActiveSet(names), dict[str, MixedLinear](), []
    for path in dict.fromkeys(path for by_path in updates for path in by_path):
        stock = model.get_submodule(path)
        layer = MixedConv2d if kind_of(stock) == "conv2d" else MixedLinear
        windows.append(hasattr(model.get_submodule(path.rpartition(".")[0]), "window_size"))
        layers[path] = layer(stock, active, [by_path.get(path, Update()) for by_path in updates], windows[-1])
    to_modules(model, layers)
    attach_all(model, layers)
    watch_expansion(model)
    if any(windows):
        model.register_forward_pre_hook(_check_batch, with_kwargs=True)


def unmix(model: nn.Module) -> None:
    """Take the mixed layers out. This is the inverse of `mix`."""
    detach_all(model)
    to_parameters(model)
    unwatch_expansion(model)
    # The hook is recognised by its function, because copies and pickles of a model keep no handle.
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _check_batch]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def _check_batch(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Refuse a batch of the model with another number of samples. Layers that compute on windows cannot see that number."""
    scope = AdaptersPerSample.scope()
    batches = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    if scope is not None and batches and not any(scope.fits(batch) for batch in batches):
        scope.refuse(batches[0])


def updates_of(model: nn.Module, name: str) -> dict[str, Update]:
    """Return the updates of the active adapter, `name`, by module path. Raise UserError if it cannot be mixed."""
    record = need_record(model, "activate")
    check_mergeable(model, "activate")
    for spec in record.layers:
        no_factors = "" if spec.layer.has_factors else "has no factors"
        reason = spec.layer.export_refusal or no_factors or _reason(model, spec.path)
        if reason:
            raise UserError(
                f"activate: '{name}' cannot be mixed: '{record.method}' {reason}; activate only this adapter, by its name."
            )
    updates = {path: Update((layer.low_rank(),)) for path, layer in adapter_layers(model).items()}
    for whole, original in record.also_train.items():
        _add_whole(model, name, whole, original, updates)
    return updates


def _reason(model: nn.Module, path: str) -> str:
    """Return why the module at a path has no mixed layer, or "" if it has one."""
    stock = model.get_submodule(path)
    stock = stock.shell if isinstance(stock, AdapterLayer) else stock
    if weight_format(model.get_submodule(path)) is not None:
        return f"adapts '{path}', whose weight is packed"
    if is_attention(model.get_submodule(path.rpartition(".")[0])):
        return f"adapts '{path}', whose weight nn.MultiheadAttention reads itself"
    kind = kind_of(stock)
    if kind in ("linear", "conv1d") or (kind == "conv2d" and stock.groups == 1):
        return ""
    return f"adapts '{path}' ({type(stock).__name__}), and only linears and convolutions nn.Conv2d without groups are mixed"


def _add_whole(model: nn.Module, adapter: str, name: str, original: Tensor, updates: dict[str, Update]) -> None:
    """Add the change of a parameter that was trained whole. Raise UserError unless it belongs to a linear alone."""
    path, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    uses = [p for _, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    linear = kind_of(module) in ("linear", "conv1d")
    of_linear = leaf in ("weight", "bias") if linear else leaf == "bias" and isinstance(module, AdapterLayer)
    if len(uses) > 1 or not of_linear:
        raise UserError(
            f"activate: '{adapter}' cannot be mixed: it trained '{name}' whole, which is not the weight of one linear; activate "
            "only this adapter, by its name."
        )
    change = parameter.detach() - original.to(parameter.device)
    if leaf == "bias":
        updates[path] = replace(updates.get(path, Update()), bias=change)
    else:
        change = change.t() if is_conv1d(module) else change
        rows, columns = change.shape
        eye = torch.eye(min(rows, columns), device=change.device, dtype=change.dtype)
        block = LowRank(eye, change) if rows <= columns else LowRank(change, eye)
        updates[path] = replace(updates.get(path, Update()), blocks=(block,))


class ActiveSet:
    """Names of adapters that are active together on a model, in the order of its banks."""

    alive: ClassVar[WeakSet[ActiveSet]] = WeakSet()

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.alive.add(self)

    def __reduce__(self) -> tuple[type[ActiveSet], tuple[tuple[str, ...]]]:
        return ActiveSet, (self.names,)  # a copy is also alive


@dataclass(frozen=True)
class RowChoice:
    """Adapters of groups of samples, as numbers of a bank. The last entry of a bank is zero and stands for no adapter.

    index: Tensor int64 (g, e) with e adapters for each group, or None if group n has adapter n alone. weight: Tensor (g, e), or
    None if all weights are 1.
    """

    index: Tensor | None
    weight: Tensor | None

    def of(self, bank: Tensor, weighted: bool) -> Tensor:
        """Return what each group has of a bank (e + 1, ...), as (g, e, ...). With `weighted`, it is multiplied by the mixture."""
        picked = bank[:-1, None] if self.index is None else bank[self.index.to(bank.device)]
        if self.weight is None or not weighted:
            return picked
        weight = self.weight.to(picked)
        return picked * weight.view(*weight.shape, *[1] * (picked.ndim - 2))


def adapters_per_sample(names: Sequence[str | Mapping[str, float] | None]) -> AdaptersPerSample:
    """Use the named adapters for each sample of a batch inside the block: `with vismt.adapters_per_sample(names):`.

    Args:
        names: Entries in the order of the batch, one for each sample: the name of an adapter, None for the base, or a mixture
            {name: weight}. All of these adapters have to be active together, by `vismt.activate(model, [...])` before the
            block.

    Neighbours with the same entry are computed as one product, so batches that are sorted by adapter are the fastest. Gradients
    reach the inputs and not the adapters. Blocks may be nested, and the inner block holds. transformers' `generate` repeats the
    entries as it repeats the samples, for beams and num_return_sequences. If checkpointed parts of a model run again in a
    backward pass after the block, they need use_reentrant=False and context_fn=vismt.llm.recompute_gates.

    Raises:
        UserError: If an entry is of another kind, a name is not active together with the others, or the batch in the forward
            pass has another number of samples.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], name="birds")
        vismt.adapt(model, "lora", targets=["qkv"], name="flowers")
        vismt.activate(model, ["birds", "flowers"])
        images = torch.rand(3, 3, *model.patch_embed.img_size)
        with vismt.adapters_per_sample(["birds", None, {"birds": 0.5, "flowers": 0.5}]):
            logits = model(images)
    """
    return AdaptersPerSample(names)


class AdaptersPerSample(PerSample):
    """The context of `adapters_per_sample`."""

    def __init__(self, names: Sequence[str | Mapping[str, float] | None]) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise UserError(f"adapters_per_sample: {shown_value(names)}; give a list with one entry for each sample.")
        super().__init__()
        entries = [_weights(entry) for entry in names]
        self.samples = len(entries)
        run = math.gcd(*(len(list(same)) for _, same in groupby(entries)))
        self.groups = entries[::run]
        self.choices: dict[tuple[str, ...], RowChoice] = {}
        self.kept: WeakKeyDictionary[nn.Module, tuple[Tensor, ...]] = WeakKeyDictionary()

    opened: ClassVar[dict[int, AdaptersPerSample]] = {}  # running blocks of all threads

    def __enter__(self) -> AdaptersPerSample:
        used = {name: None for group in self.groups for name in group}
        alive = {active.names for active in ActiveSet.alive}
        self.choices = {names: _choice(self.groups, names) for names in alive if used.keys() <= set(names)}
        if not self.choices:
            raise UserError(
                f"adapters_per_sample: no model has {', '.join(map(repr, used)) or 'adapters'} active; call "
                "vismt.activate(model, [names]) with all of the batch first."
            )
        self.opened[id(self)] = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if not self._before:
            del self.opened[id(self)]

    @classmethod
    def refuse_lost(cls, names: tuple[str, ...], used: bool) -> None:
        """Raise UserError for a forward outside of its block, which would add all adapters.

        names: Names of the active adapters. used: Whether the layer had a block before.
        """
        # No public function says whether a backward pass runs. In a release of torch without this one, every forward with
        # gradients is taken for a part of one.
        task = getattr(torch._C, "_current_graph_task_id", None)
        if used and (task() >= 0 if task else torch.is_grad_enabled()):
            raise UserError(
                "forward: a backward pass runs it again and does not see its adapters_per_sample; checkpoint with "
                "use_reentrant=False and context_fn=vismt.llm.recompute_gates."
            )
        if any(names in scope.choices for scope in list(cls.opened.values())):
            raise UserError(
                "forward: adapters_per_sample is in force in another thread or task, and not here; open a block here as well "
                "(an entry {name: 1, ...} adds adapters)."
            )

    def choice(self, names: tuple[str, ...], batch: int, windows: bool) -> RowChoice:
        """Return the choice among `names` for a batch of b rows. Raise UserError if they do not match.

        windows: Whether a sample may have several rows.
        """
        if names not in self.choices:
            raise UserError(
                f"forward: adapters_per_sample does not name the active adapters {', '.join(names)}; activate before the block."
            )
        if not self.fits(batch) and not (windows and batch % self.samples == 0):
            self.refuse(batch)
        return self.choices[names]

    def fits(self, batch: int) -> bool:
        """Return whether there is an entry for each sample of a batch."""
        return batch in (self.samples, self.samples * self.repeats)

    def refuse(self, batch: int) -> NoReturn:
        """Raise UserError for a batch of another number of samples."""
        raise UserError(
            f"forward: adapters_per_sample names adapters for {self.samples} samples, the batch has {batch}; give one entry for "
            "each sample, in its order."
        )


def _weights(entry: str | Mapping[str, float] | None) -> dict[str, float]:
    if entry is None or isinstance(entry, str):
        return {} if entry is None else {entry: 1.0}
    numbers = isinstance(entry, Mapping) and all(isinstance(w, Real) and math.isfinite(w) for w in entry.values())
    if not numbers:
        raise UserError(
            f"adapters_per_sample: {shown_value(entry)}; give a name, None, or a mapping from names to finite weights."
        )
    return {name: float(weight) for name, weight in entry.items() if weight}


def _choice(groups: Sequence[Mapping[str, float]], names: tuple[str, ...]) -> RowChoice:
    if list(groups) == [{name: 1.0} for name in names]:
        return RowChoice(None, None)
    most = max(1, *map(len, groups))
    index, weight = torch.full((len(groups), most), -1), torch.ones(len(groups), most)
    for row, group in enumerate(groups):
        for column, (name, share) in enumerate(group.items()):
            index[row, column], weight[row, column] = names.index(name), share
    return RowChoice(index, weight if bool((weight != 1).any()) else None)
