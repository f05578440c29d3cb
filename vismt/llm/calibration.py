"""A forward pass that is watched: what a linear layer gets, for whom it is the same tensor, and where it may end.

Batches are dicts of keyword arguments, tensors of images, or sequences that begin with one of these.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.llm.covariance_files import Sums

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
Watch = Callable[[nn.Module, Tensor], None]


class _Reached(Exception):
    """Raised at the last layer that a pass serves: the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Groups:
    """paths: leader -> itself and the layers that get the same tensor, in forward order. calls: of each in one pass."""

    paths: dict[str, list[str]]
    calls: dict[str, int]


@torch.no_grad()
def shared_inputs(model: nn.Module, found: Mapping[str, nn.Module], batch: Batch) -> Groups:
    """Which layers share an input, seen on the first sample of `batch`; UserError for a layer that gets none."""
    seen: dict[str, list[Tensor]] = {}  # holds the inputs, so that no identity is used twice
    inputs, _, count = arguments(model, batch)
    one = {k: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == count else v for k, v in inputs.items()}
    with _watched(model, {path: lambda _, x, path=path: seen.setdefault(path, []).append(x) for path in found}):
        _forward(model, one)
    missing = [path for path in found if path not in seen]
    if missing:
        raise UserError(f"covariance: '{missing[0]}' gets no input in a forward pass; exclude it.")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, tensors in seen.items():
        groups.setdefault((*map(id, tensors), _geometry(found[path])), []).append(path)
    return Groups(
        {paths[0]: paths for paths in groups.values()}, {path: len(tensors) for path, tensors in seen.items()}
    )


@torch.no_grad()
def add_batch(
    model: nn.Module,
    groups: Groups,
    leaders: Sequence[str],
    sums: Sums,
    inputs: Mapping[str, Any],
    mask: Tensor | None,
    count: int,
) -> None:
    """One forward pass that adds to every leader's sum, sees that its followers get the same tensor, and ends after them."""
    latest: dict[str, weakref.ref] = {}
    leader_of = {path: leader for leader in leaders for path in groups.paths[leader]}
    left = Counter({path: groups.calls[path] for path in leader_of})

    def watch(path: str, module: nn.Module, x: Tensor) -> None:
        leader = leader_of[path]
        if path == leader:
            latest[path] = weakref.ref(x)
            rows, tokens = _normalised(path, _samples(path, module, x, count), mask)
            sums.sums[path].addmm_(rows.T, rows)
            sums.tokens[path] = sums.tokens.get(path, 0) + tokens
        elif leader not in latest or latest[leader]() is not x:
            raise UserError(
                f"covariance: '{path}' and '{leader}' share their input in some samples only; exclude one of them."
            )
        left[path] -= 1
        if not any(left.values()):
            raise _Reached

    with _watched(model, {path: lambda module, x, path=path: watch(path, module, x) for path in leader_of}):
        _forward(model, inputs)
    if any(left.values()):
        path = next(path for path in left if left[path])
        raise UserError(f"covariance: '{path}' gets no input in some batches; exclude it.")


def arguments(model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor | None, int]:
    """Keyword arguments of the forward pass ('' for a positional one), the mask (b, n) as bool, the number of samples."""
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch):
        batch = batch[0]
    weight = next(model.parameters())
    named = dict(batch) if isinstance(batch, Mapping) else {"": batch}
    named.pop("labels", None)
    tensors = [value for value in named.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors or not isinstance(batch, Mapping | Tensor):
        raise UserError(
            f"covariance: a batch is {type(batch).__name__}; give a dict of arguments or a tensor of images."
        )
    moved = {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in named.items()
    }
    mask = moved.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise UserError(f"covariance: the attention mask is {tuple(mask.shape)}; give (samples, tokens).")
    if hasattr(getattr(model, "config", None), "use_cache"):
        moved.setdefault("use_cache", False)
    return moved, None if mask is None else mask.bool(), len(tensors[0])


def _samples(path: str, module: nn.Module, x: Tensor, count: int) -> Tensor:
    """Input of a linear or convolution as (b, n, i)."""
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UserError(
                f"covariance: '{path}' pads by '{module.padding_mode}', {module.padding!r}; only zeros, in pixels."
            )
        return F.unfold(x.float(), module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
    if x.ndim < 2 or x[..., 0].numel() % count:
        seen = f"{tuple(x.shape)} for {count} samples"
        raise UserError(f"covariance: '{path}' gets {seen}, which cannot be told apart; exclude it.")
    return x.reshape(count, -1, x.shape[-1]).float()


def _normalised(path: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """(b, n, i) -> rows (b*n, i), masked tokens zero, every sample over its largest absolute value; the tokens that count."""
    tokens = x.shape[0] * x.shape[1]
    if mask is not None and x.shape[1] == mask.shape[1]:
        x, tokens = x.masked_fill(~mask[..., None], 0), int(mask.sum())
    elif mask is not None and x.shape[1] > 1 and not bool(mask.all()):
        raise UserError(
            f"covariance: '{path}' gets {x.shape[1]} tokens, the attention mask has {mask.shape[1]}; exclude it."
        )
    peak = x.abs().amax((1, 2), keepdim=True)
    if not bool(peak.isfinite().all()):
        raise UserError(f"covariance: '{path}' gets values that are infinite or NaN; look at the data and the weights.")
    return (x / torch.where(peak > 0, peak, 1)).flatten(0, 1), tokens


def _forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One forward pass, up to where a watch says that it is enough."""
    named = {name: value for name, value in inputs.items() if name}
    with suppress(_Reached):
        model(*(value for name, value in inputs.items() if not name), **named)


@contextmanager
def _watched(model: nn.Module, watches: Mapping[str, Watch]) -> Iterator[None]:
    """`watches[path](module, input)` before each call, the model in eval mode; both are undone whatever happens."""
    modes = {module: module.training for module in model.modules()}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, watch=watch: watch(module, inputs[0])
        )
        for path, watch in watches.items()
    ]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    """What, beside its input, decides what a convolution multiplies; nothing for a linear layer."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return tuple(getattr(module, name) for name in names) if isinstance(module, nn.Conv2d) else ()
