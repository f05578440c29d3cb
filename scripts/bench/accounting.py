"""Memory of training a model: weights, gradients, optimiser state, activations kept for the backward pass, and the peak.

    M = weights + gradients + optimiser state + A        with t P of P parameters trained, b bytes a number:
        P b + t P (b + 2 b) + A  for Adam;   A by formula in activations.py

Storages are measured, each once however many tensors lie in it, and in full even when only a view of it is kept: that is
what stays in memory. Parameters and buffers do not count as activations. Not measured: tensors that a custom function keeps
on its context without `save_for_backward`, the inside of a checkpointed region, workspaces of kernels. A peak needs more
than one step: the first one has no optimiser state yet. Code that tests whether a saved tensor is the parameter itself fails
under the hooks, so measure and train in separate passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vismt.base.errors import require_known

STATE_COPIES = {"adamw": 2, "adam": 2, "sgd_momentum": 1, "sgd": 0}


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers, each storage once: a parameter that is a slice of a buffer adds nothing."""
    return _bytes((*model.parameters(), *model.buffers()))


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients that exist now."""
    return _bytes(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def saved_activation_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of all storages that autograd keeps during `forward()`, without parameters and buffers of `model`.

    An input that a layer saves counts. The result of `forward` is kept until the count is done, and nothing is run
    backward, so gradients and module state are unchanged (except for what the forward pass itself changes).
    """
    of_model = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[tuple[str, int], int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in of_model and key not in sizes:
            sizes[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor.detach())
        # Not the tensor: an output that its own node saves would keep the graph and the model alive for ever.

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda nothing: nothing):
        output = forward()
    del output
    return sum(sizes.values())


def kept_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes of the storages that `forward()` creates and that its result keeps alive: what backward needs.

    Counts what hooks on saved tensors keep in place of tensors, too, as `vismt.recompute` and torch.utils.checkpoint do.
    """
    live = _Live()
    with torch.enable_grad(), live:
        output = forward()
    kept = live.now
    del output
    return kept


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the tensors in the optimiser's state (moments, step counters), each storage once."""
    return _bytes(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def optimizer_bytes_formula(parameters: Iterable[Tensor], kind: str) -> int:
    """Return the bytes of the moments for `parameters`: Adam and AdamW keep two copies, SGD with momentum one, plain SGD none.

    Step counters (4 bytes for each tensor with AdamW) are left out.
    """
    require_known("optimiser account: no kind", [kind], STATE_COPIES)
    return STATE_COPIES[kind] * sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def peak_bytes(step: Callable[[], object], steps: int = 2) -> int:
    """Return the most bytes alive at once during the last of `steps` calls, of all storages created since the first.

    step: one whole training step; gradients that it frees or reuses should not exist before. Independent of the
    allocator, the machine and time; workspaces of kernels are not measured.
    """
    live = _Live()
    for _ in range(steps):
        live.peak = live.now
        with live:
            step()
    return live.peak


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have created and that are not freed: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # The storage of an argument (in place, a view) is not new.
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs | self.live:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.live.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, key, size)
        return result

    def _remove(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that tensors lie in."""
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
