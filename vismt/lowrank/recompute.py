"""Save memory in the backward pass: outputs of cheap operations are recomputed from tensors that are kept anyway.

    with vismt.recompute(model):
        loss = model(batch)
    loss.backward()                 # inside or outside of the block

A norm keeps its input for its own gradient, and the linear after it keeps the norm's output. An activation and the linear after
it do the same. A gated MLP keeps silu(g), u and their product. Inside the block, a saved tensor that an operation of `CHEAP`
returned is replaced by that call. Unpacking repeats the call on the same values, so gradients are equal bit for bit. A call
replaces its output only if its inputs are kept anyway or are smaller, so memory never grows. What the inputs are computed from
counts too, as in cast(norm(x)).

A TorchFunctionMode sees the operations of modules of any library. Tensors are recognised by storage and version. An operation
with random numbers is not in `CHEAP`, and an operation that works in place returns its input, so the outputs of both are stored
as usual. Under torch.utils.checkpoint the inner hooks belong to the checkpoint, and nothing is recomputed twice. torch.func's
gradients refuse hooks on saved tensors, and torch.compile recomputes cheap operations by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from vismt.base.errors import UserError

# Operations of one pass over their output, without random numbers. Casts lead from the residual stream into an autocast linear.
CHEAP = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.gelu, F.silu, torch.mul, Tensor.mul}
CHEAP |= {Tensor.to, Tensor.type_as, Tensor.float, Tensor.bfloat16, Tensor.half}


@contextmanager
def recompute(model: nn.Module) -> Iterator[None]:
    """Recompute outputs of cheap operations in the backward pass instead of keeping them, inside the block.

    Cheap operations are LayerNorm, RMSNorm, GELU, SiLU and products.

    Args:
        model: Model that is trained, with or without adapters, of any library. It is not changed.

    The backward pass may run inside the block or after it, and more than once. Like autograd, it raises RuntimeError if a
    tensor that it needs was changed in place since the forward pass.

    Raises:
        UserError: If torch.compile has compiled the model.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"])
        images = torch.rand(2, 3, *model.patch_embed.img_size)
        with vismt.recompute(model):
            loss = model(images).square().mean()
        loss.backward()
    """
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise UserError("recompute: torch.compile recomputes cheap operations by itself; use one of the two.")
    calls = _Calls()
    with calls, saved_tensors_hooks(calls.pack, lambda kept: kept.value()):
        yield


class _Kept:
    """A tensor in memory, which may not change in place.

    missing: Number of bytes if nothing else keeps the tensor, otherwise 0.
    """

    __slots__ = ("__weakref__", "missing", "tensor", "version")

    def __init__(self, tensor: Tensor, missing: int = 0) -> None:
        self.tensor, self.version, self.missing = tensor, tensor._version, missing

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"recompute: a tensor {tuple(self.tensor.shape)} that the backward pass needs was changed in place after the "
                f"forward pass (version {self.tensor._version}, needed {self.version})."
            )
        return self.tensor


class _Call:
    """A call of a cheap operation that can be repeated.

    missing: Number of bytes of its inputs that nothing else keeps. uses: How often a backward pass asks for the output. The
    output stays from the first time to the last, so that the norm before q, k and v is repeated once.
    """

    def __init__(
        self, function: Callable[..., Tensor], args: list[object], options: dict[str, object], device: str
    ) -> None:
        self.function, self.args, self.options = function, args, options
        self.device, self.autocast = device, torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if self.autocast else None
        self.parts = [arg for arg in (*args, *options.values()) if isinstance(arg, _Kept | _View)]
        self.missing = sum(part.missing for part in self.parts)
        self.uses = self.served = 0
        self.output: Tensor | None = None

    def value(self) -> Tensor:
        output = self.output
        if output is None:
            args = [_value(arg) for arg in self.args]
            options = {name: _value(option) for name, option in self.options.items()}
            with torch.no_grad(), torch.autocast(self.device, self.dtype, self.autocast, cache_enabled=False):
                output = self.function(*args, **options)
        self.served = (self.served + 1) % self.uses
        self.output = output if self.served else None
        return output

    def use(self) -> Iterator[_Kept]:
        """Count one more use. The first time, yield every tensor that is kept for the call."""
        self.uses += 1
        for part in self.parts if self.uses == 1 else ():
            if isinstance(part, _View):
                yield from part.call.use()
            else:
                yield part


class _View:
    """A tensor in the storage of a call's output."""

    __slots__ = ("call", "geometry")

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.call = call
        self.geometry = tensor.shape, tensor.stride(), tensor.storage_offset()

    @property
    def missing(self) -> int:
        return self.call.missing

    def value(self) -> Tensor:
        return self.call.value().as_strided(*self.geometry)


def _value(arg: object) -> object:
    return arg.value() if isinstance(arg, _Kept | _View) else arg


class _Calls(TorchFunctionMode):
    """The calls whose outputs are alive, and what is kept for the backward pass, both by storage.

    outputs: Entries (the output, its version, the call). A freed storage can be used again, so entries end with their tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[weakref.ref[Tensor], int, _Call]] = {}
        self.kept: dict[int, weakref.ref[_Kept]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CHEAP and args and out is not args[0] and out.requires_grad:
            self._record(func, args, kwargs or {}, out)
        return out

    def pack(self, tensor: Tensor) -> _Kept | _View:
        """Return what is kept in place of a saved tensor."""
        storage = _storage(tensor)
        view = self._computed(storage, tensor)
        if view is None or self._is_kept(storage):
            # The output is kept without its graph. An output that its own node saves would otherwise keep the graph
            # alive for ever.
            return self._keep(storage, _Kept(tensor.detach()))
        for part in view.call.use():
            self._keep(_storage(part.tensor), part)
        return view

    def _record(
        self, function: Callable[..., Tensor], args: tuple[object, ...], options: dict[str, object], out: Tensor
    ) -> None:
        """Record the call that returned `out` if it may replace `out`."""
        storage = _storage(out)
        for arg in (*args, *options.values()):
            if isinstance(arg, Tensor) and (_storage(arg) == storage or arg.device != out.device):
                return
        parts = [self._part(arg) if isinstance(arg, Tensor) else arg for arg in args]
        named = {name: self._part(arg) if isinstance(arg, Tensor) else arg for name, arg in options.items()}
        call = _Call(function, parts, named, out.device.type)
        if call.missing < out.untyped_storage().nbytes():
            reference = weakref.ref(out, lambda gone: self._forget(storage, gone))
            self.outputs[storage] = reference, out._version, call

    def _forget(self, storage: int, gone: weakref.ref[Tensor]) -> None:
        entry = self.outputs.get(storage)
        if entry is not None and entry[0] is gone:
            del self.outputs[storage]

    def _part(self, tensor: Tensor) -> _Kept | _View:
        """Return what a call needs for its input `tensor`."""
        storage = _storage(tensor)
        if self._is_kept(storage) or isinstance(tensor, nn.Parameter):
            return _Kept(tensor.detach())
        view = self._computed(storage, tensor)
        return _Kept(tensor.detach(), tensor.untyped_storage().nbytes()) if view is None else view

    def _computed(self, storage: int, tensor: Tensor) -> _View | None:
        """Return a tensor as a view of a call's output. Return None for another tensor, and after a change in place."""
        entry = self.outputs.get(storage)
        if entry is None or entry[1] != tensor._version:
            return None
        out = entry[0]()
        return None if out is None or out.dtype != tensor.dtype else _View(entry[2], tensor)

    def _is_kept(self, storage: int) -> bool:
        reference = self.kept.get(storage)
        return reference is not None and reference() is not None

    def _keep(self, storage: int, kept: _Kept) -> _Kept:
        if not self._is_kept(storage):
            self.kept[storage] = weakref.ref(kept)
        return kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
