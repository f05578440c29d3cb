"""An observed forward pass: record the inputs of linear layers, group layers that share an input, stop after the last one.

Batches are dicts of keyword arguments, tensors of images, or sequences that begin with one of these.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, shown_value
from vismt.llm.corda.files import CovarianceSums
from vismt.lowrank.contexts import evaluating

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
Observer = Callable[[str, nn.Module, Tensor], None]


class _PassComplete(Exception):
    """Raised at the last observed layer: the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Groups:
    """Layers grouped by shared input.

    paths: leader -> the leader and the layers that receive the same tensor, in forward order. calls: path -> number of
    calls of the layer in one forward pass.
    """

    paths: dict[str, list[str]]
    calls: dict[str, int]


@torch.no_grad()
def shared_inputs(model: nn.Module, targets: Mapping[str, nn.Module], batch: Batch) -> Groups:
    """Group the target layers that share an input, observed on the first sample of `batch`.

    Raises UserError for a layer that receives no input.
    """
    inputs_by_path: dict[str, list[Tensor]] = {}  # keeps the inputs alive, so that no id is used twice
    inputs, _, count = arguments(model, batch)
    first_sample = {
        name: value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in inputs.items()
    }

    def record(path: str, module: nn.Module, x: Tensor) -> None:
        inputs_by_path.setdefault(path, []).append(x)

    _observe(model, first_sample, targets, record)
    missing = [path for path in targets if path not in inputs_by_path]
    if missing:
        raise UserError(f"covariance: '{missing[0]}' gets no input in a forward pass; exclude it.")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, tensors in inputs_by_path.items():
        module = targets[path]
        geometry: tuple[Any, ...] = ()  # what, with the input, determines the patches of a convolution
        if isinstance(module, nn.Conv2d):
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        groups.setdefault((*map(id, tensors), geometry), []).append(path)
    return Groups(
        paths={paths[0]: paths for paths in groups.values()},
        calls={path: len(tensors) for path, tensors in inputs_by_path.items()},
    )


@torch.no_grad()
def add_batch(
    model: nn.Module,
    groups: Groups,
    leaders: Sequence[str],
    sums: CovarianceSums,
    inputs: Mapping[str, Any],
    mask: Tensor | None,
    count: int,
) -> None:
    """Run one forward pass, add X^T X to the sum of every leader, and stop after the last layer of their groups.

    inputs, mask, count: as returned by `arguments`. Raises UserError where a layer no longer receives the tensor of its
    leader, or receives none.
    """
    latest_input: dict[str, weakref.ref] = {}
    leader_of = {path: leader for leader in leaders for path in groups.paths[leader]}
    calls_left = Counter({path: groups.calls[path] for path in leader_of})

    def accumulate(path: str, module: nn.Module, x: Tensor) -> None:
        leader = leader_of[path]
        if path == leader:
            latest_input[path] = weakref.ref(x)
            rows, tokens = _normalised(path, module, x, mask, count)
            sums.sums[path].addmm_(rows.T, rows)
            sums.tokens[path] = sums.tokens.get(path, 0) + tokens
        elif leader not in latest_input or latest_input[leader]() is not x:
            raise UserError(
                f"covariance: '{path}' and '{leader}' share their input in some samples only; exclude one of them."
            )
        calls_left[path] -= 1
        if not any(calls_left.values()):
            raise _PassComplete

    _observe(model, inputs, leader_of, accumulate)
    if any(calls_left.values()):
        path = next(path for path in calls_left if calls_left[path])
        raise UserError(f"covariance: '{path}' gets no input in some batches; exclude it.")


def arguments(model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Tensor | None, int]:
    """Return the arguments of the forward pass, the attention mask (b, n) bool or None, and the number of samples.

    Arguments are moved to the device and dtype of the model; the key '' marks a positional one. Labels are left out.
    """
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


def _normalised(path: str, module: nn.Module, x: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, int]:
    """Return the input of a linear layer or a convolution as rows (b*n, i) fp32, and the number of valid tokens.

    Masked tokens are set to zero and every sample is divided by its largest absolute value.
    """
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UserError(
                f"covariance: '{path}' pads by '{module.padding_mode}', {shown_value(module.padding)}; only zeros, in pixels."
            )
        patches = F.unfold(x.float(), module.kernel_size, module.dilation, module.padding, module.stride)
        x = patches.transpose(1, 2)
    elif x.ndim < 2 or x[..., 0].numel() % count:
        shape = f"{tuple(x.shape)} for {count} samples"
        raise UserError(f"covariance: '{path}' gets {shape}, which does not split into samples; exclude it.")
    else:
        x = x.reshape(count, -1, x.shape[-1]).float()
    tokens = x.shape[0] * x.shape[1]
    if mask is not None and x.shape[1] == mask.shape[1]:
        x = x.masked_fill(~mask[..., None], 0)
        tokens = int(mask.sum())
    elif mask is not None and x.shape[1] > 1 and not bool(mask.all()):
        raise UserError(
            f"covariance: '{path}' gets {x.shape[1]} tokens, the attention mask has {mask.shape[1]}; exclude it."
        )
    peak = x.abs().amax((1, 2), keepdim=True)
    if not bool(peak.isfinite().all()):
        raise UserError(f"covariance: '{path}' gets infinite values or NaN; look at the data and the weights.")
    return (x / torch.where(peak > 0, peak, 1)).flatten(0, 1), tokens


def _observe(model: nn.Module, inputs: Mapping[str, Any], paths: Iterable[str], observer: Observer) -> None:
    """Run one forward pass in eval mode, `observer` before each call of a module at `paths`; _PassComplete ends it early."""

    def hook(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer(path, module, inputs[0])

    named = {name: value for name, value in inputs.items() if name}
    with ExitStack() as stack, evaluating(model), suppress(_PassComplete):
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(hook, path)).remove)
        model(*(value for name, value in inputs.items() if not name), **named)
