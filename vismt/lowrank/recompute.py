"""Keep less for the backward pass: outputs of cheap operations are recomputed from tensors that are kept anyway.

    with vismt.recompute(model):
        loss = model(batch)
    loss.backward()                 # inside or outside of the block

A norm keeps its input for its own gradient, and the linear after it keeps the norm's output; an activation and the linear
after it likewise, and a gated MLP keeps silu(g), u and their product. Inside the block, a saved tensor that an operation of
`CHEAP` returned is replaced by that call, and unpacking repeats it on the same values: gradients are equal bit for bit. A
call takes the place of its output only where what it needs is kept anyway or is smaller, so that memory never grows; what
its inputs are computed from counts too, as in cast(norm(x)).

Operations are seen through a TorchFunctionMode, modules of any library alike; tensors are recognised by storage and
version. An operation with random numbers is not in `CHEAP`, and one that works in place returns its input, so both are
stored as ever. Under torch.utils.checkpoint the inner hooks are those of the checkpoint, and nothing is recomputed twice.
torch.func's gradients refuse hooks on saved tensors, and torch.compile recomputes cheap operations by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from vismt.errors import UserError

# Operations of one pass over their output, without random numbers. Casts: from the residual stream into an autocast linear.
CHEAP = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.gelu, F.silu, torch.mul, Tensor.mul}
CHEAP |= {Tensor.to, Tensor.type_as, Tensor.float, Tensor.bfloat16, Tensor.half}


@contextmanager
def recompute(model: nn.Module) -> Iterator[None]:
    """Inside the block, do not keep outputs of cheap operations for the backward pass: LayerNorm, RMSNorm, GELU, SiLU, products.

    Args:
        model: the model that is trained, with or without adapters, of any library; it is not changed.

    The backward pass may run inside the block or after it, and more than once. It raises RuntimeError where a tensor that it
    needs was changed in place since the forward pass, as autograd does.

    Raises:
        UserError: a model that torch.compile has compiled.
    """
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise UserError("recompute: torch.compile recomputes cheap operations by itself; use one of the two.")
    calls = _Calls()
    with calls, saved_tensors_hooks(calls.pack, lambda kept: kept.value()):
        yield


class _Kept:
    """A tensor in memory, which may not change in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"recompute: a tensor {tuple(self.tensor.shape)} that the backward pass needs was changed in place after the "
                f"forward pass (version {self.tensor._version}, needed {self.version})."
            )
        return self.tensor


class _Call:
    """A call of a cheap operation that can be repeated.

    missing: bytes of its inputs that nothing else keeps. uses: how often a backward pass asks for the output, which stays
    from the first time to the last: the norm before q, k and v is repeated once.
    """

    def __init__(self, function: Any, args: list[Any], options: dict[str, Any], device: str) -> None:
        self.function, self.args, self.options = function, args, options
        self.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        self.device = device
        self.missing = self.uses = self.served = 0
        self.output: Tensor | None = None

    def value(self) -> Tensor:
        output = self._repeat() if self.output is None else self.output
        self.served = (self.served + 1) % self.uses
        self.output = output if self.served else None
        return output

    def _repeat(self) -> Tensor:
        args = [_value(arg) for arg in self.args]
        options = {name: _value(option) for name, option in self.options.items()}
        with torch.no_grad(), torch.autocast(self.device, cache_enabled=False, **self.autocast):
            return self.function(*args, **options)

    def use(self) -> Iterator[_Kept]:
        """Count one more use, also of the calls before; yield every tensor that is kept for it."""
        self.uses += 1
        for arg in (*self.args, *self.options.values()):
            if isinstance(arg, _Kept):
                yield arg
            elif isinstance(arg, _View) and self.uses == 1:
                yield from arg.call.use()


class _View:
    """A tensor in the storage of a call's output."""

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.call = call
        self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()

    def value(self) -> Tensor:
        return self.call.value().as_strided(*self.geometry)


def _value(arg: Any) -> Any:
    return arg.value() if isinstance(arg, _Kept | _View) else arg


class _Calls(TorchFunctionMode):
    """The calls whose outputs are alive, and the storages that are kept for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        # By storage: the output of a call while it is alive, its version, and the call.
        self.outputs: dict[int, tuple[weakref.ref[Tensor], int, _Call]] = {}
        self.kept: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in CHEAP and out.requires_grad:
            self._record(func, args, kwargs, out)
        return out

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """Return what is kept in place of a saved tensor."""
        view = self._computed(tensor)
        if view is None or _storage(tensor) in self.kept:
            return self._keep(_Kept(tensor))
        for part in view.call.use():
            self._keep(part)
        return view

    def _record(self, function: Any, args: tuple[Any, ...], options: dict[str, Any], out: Tensor) -> None:
        """Note the call that returned `out` where it may take the place of `out`."""
        inputs = [arg for arg in (*args, *options.values()) if isinstance(arg, Tensor)]
        storage = _storage(out)
        if any(_storage(arg) == storage or arg.device != out.device for arg in inputs):
            return
        parts = {id(arg): self._part(arg) for arg in inputs}
        call = _Call(
            function,
            [parts[id(arg)][0] if isinstance(arg, Tensor) else arg for arg in args],
            {name: parts[id(arg)][0] if isinstance(arg, Tensor) else arg for name, arg in options.items()},
            out.device.type,
        )
        call.missing = sum(size for _, size in parts.values())
        if call.missing < out.untyped_storage().nbytes():
            reference = weakref.ref(out, lambda gone: self._forget(self.outputs, storage, gone))
            self.outputs[storage] = reference, out._version, call

    def _part(self, tensor: Tensor) -> tuple[_Kept | _View, int]:
        """Return what a call needs for its input `tensor`, and the bytes of it that nothing else keeps."""
        if _storage(tensor) not in self.kept:
            view = self._computed(tensor)
            if view is not None:
                return view, view.call.missing
            if not isinstance(tensor, nn.Parameter):
                return _Kept(tensor.detach()), tensor.untyped_storage().nbytes()
        return _Kept(tensor.detach()), 0

    def _computed(self, tensor: Tensor) -> _View | None:
        """Return a tensor as a view of a call's output; None for another tensor, and after a change in place."""
        reference, version, call = self.outputs.get(_storage(tensor), (None, 0, None))
        out = None if reference is None else reference()
        if out is None or call is None or out.dtype != tensor.dtype or tensor._version != version:
            return None
        return _View(call, tensor)

    def _keep(self, kept: _Kept) -> _Kept:
        storage = _storage(kept.tensor)
        if storage not in self.kept:
            self.kept[storage] = weakref.ref(kept.tensor, lambda gone: self._forget(self.kept, storage, gone))
        return kept

    @staticmethod
    def _forget(entries: dict[int, Any], storage: int, gone: Any) -> None:
        entry = entries.get(storage)
        if entry is gone or (isinstance(entry, tuple) and entry[0] is gone):
            del entries[storage]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
