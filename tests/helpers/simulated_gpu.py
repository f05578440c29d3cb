"""A GPU for tests where there is none: tensors that say cuda:0, are of one memory of their own and compute on the CPU.

    with simulated_gpu():
        model.to("cuda")(images.to("cuda")).sum().backward()

A tensor of the GPU holds a tensor of the CPU. Autograd takes it for one of the CPU, and `device` answers what Python code asks.
An operator on tensors of the GPU runs on what they hold, and what it returns is on the GPU. What a GPU refuses is refused:
tensors of two devices in one operator, arrays of NumPy from the GPU, generators of another device. Autocast of "cuda" is that of
the CPU. Kernels and their rounding, memory, streams and several GPUs are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import accelerate.state
import torch
from accelerate import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ANSWERS = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
    **{"device_count": 1, "current_device": 0, "get_device_name": "simulated", "get_device_capability": (9, 0)},
    **dict.fromkeys(("synchronize", "empty_cache", "set_device", "_lazy_init", "manual_seed", "manual_seed_all")),
    **{"reset_peak_memory_stats": None, "max_memory_allocated": 2**20},
    **{"get_rng_state": torch.empty(0, dtype=torch.uint8), "set_rng_state": None, "get_rng_state_all": []},
}


class OnGpu(Tensor):
    """A tensor of the GPU. held: its values, on the CPU."""

    held: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        about = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **about, device=held.device)
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        """Do nothing: `__new__` does it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})

    def __repr__(self, **options: object) -> str:
        return f"OnGpu({self.held})"

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return moved(self, *args, **kwargs)

    def cpu(self, *options: object) -> Tensor:
        return moved(self, "cpu")

    def cuda(self, *options: object) -> Tensor:
        return self

    def item(self) -> Any:
        return self.held.detach().item()

    def tolist(self) -> Any:
        return self.held.detach().tolist()

    def numpy(self, *options: object) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    __array__ = numpy


class Move(torch.autograd.Function):
    """Copies a tensor to a device and type, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.before = tensor.device, tensor.dtype
        values = (tensor.held if isinstance(tensor, OnGpu) else tensor).to(dtype, copy=True)
        return OnGpu(values) if device == GPU else values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return moved(gradient, *ctx.before), None, None


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `tensor.to(...)`."""
    device, dtype = tensor.device, tensor.dtype
    for part in (*args, kwargs.get("device"), kwargs.get("dtype")):
        if isinstance(part, Tensor):
            device, dtype = part.device, part.dtype
        elif isinstance(part, torch.dtype):
            dtype = part
        elif isinstance(part, str | torch.device):
            device = torch.device(part)
    device = GPU if device.type == "cuda" else device
    stays = (device, dtype) == (tensor.device, tensor.dtype) and not kwargs.get("copy")
    return tensor if stays else Move.apply(tensor, device, dtype)


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def leaves(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments of a call, and those in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def each(change: Callable[[Any], Any], value: Any) -> Any:
    return [change(part) for part in value] if isinstance(value, list | tuple) else change(value)


def held(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, OnGpu) else value


def operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the held tensors; what it makes is on the GPU where its tensors are or `device` says so."""
    given = list(leaves(args, kwargs))
    ours = {id(leaf.held): leaf for leaf in given if isinstance(leaf, OnGpu)}
    others = [leaf for leaf in given if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu)]
    # A factory in code of torch names the device as that code sees it, the CPU.
    made_on_gpu = bool(ours) or on_gpu(kwargs.get("device")) or (Calls.inside and not others)
    if not made_on_gpu:
        return func(*args, **kwargs)
    mixed = func is aten.copy_.default or (func in INDEXING and isinstance(args[0], OnGpu))
    if ours and not mixed and any(other.dim() for other in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu ({func})")
    if any(isinstance(leaf, torch.Generator) for leaf in given):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnGpu):
            return value
        return ours[id(value)] if id(value) in ours else OnGpu(value)  # the same where it was changed in place

    found = func(*(each(held, value) for value in args), **{name: each(held, value) for name, value in kwargs.items()})
    return args[0] if func is aten.copy_.default else each(placed, found)


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Notes whether the call of torch that runs has a tensor of the GPU: what its code makes is then there, too."""

    inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.to, Tensor.cuda):
            return moved(*args, **kwargs) if func is Tensor.to else moved(args[0], GPU)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and on_gpu(kwargs.get("device")):
            return moved(func(*args, **{**kwargs, "device": None}), GPU)
        before, Calls.inside = Calls.inside, any(isinstance(leaf, OnGpu) for leaf in leaves(args, kwargs))
        try:
            return func(*args, **kwargs)
        finally:
            Calls.inside = before


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Let torch and accelerate find the simulated GPU inside the block."""
    autocast = torch.autocast.__init__
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *args, answer=answer, **options: answer))
        patches = {
            "is_autocast_enabled": lambda *device: enabled("cpu"),
            "get_autocast_dtype": lambda device: dtype("cpu"),
        }
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(torch, name, patch))
        # accelerate 1.16 asks torch's build for the accelerator, which is none. Earlier versions do not have the function.
        found = mock.patch.object(
            accelerate.state, "get_torch_accelerator_backend", lambda: ("cuda", torch.cuda), create=True
        )
        stack.enter_context(found)
        as_cpu = mock.patch.object(
            torch.autocast,
            "__init__",
            lambda self, device_type, *args, **options: autocast(self, "cpu", *args, **options),
        )
        stack.enter_context(as_cpu)
        stack.enter_context(mock.patch.dict(PartialState._shared_state, clear=True))
        torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same object
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(Calls())
        stack.enter_context(Operators())
        yield
