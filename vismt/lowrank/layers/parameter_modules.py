"""Parameters that a module reads itself, each made a module: experts in one tensor, and what nn.MultiheadAttention reads.

    owner.gate_up_proj (e, o, i)   ->   owner.gate_up_proj.weight, below a ParameterModule, which a layer can replace

While the owner's forward runs, its attribute is the tensor W + DeltaW that the layer returns. Every implementation of that
forward (a loop over the experts that are hit, batched and grouped products, fused attention) therefore reads the adapted
weight. Each thread has sums of its own. Code that reads the attribute at another time gets the layer, which stands for the same
tensor in any function of torch. For that the owner has a subclass of its class, under the same name, while it is adapted. A
state dict with stock keys can be loaded meanwhile. Encoders of torch.nn read the weights of all their linears in one fused
kernel if no gradient is needed. The subclass of an encoder with a layer in it says that it does not fit that kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn

# parameters of nn.MultiheadAttention
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
# another module reads their items, and they have no forward of their own
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class ParameterModule(nn.Module):
    """A parameter as a module.

    weight: Parameter (o, i), or a stack of matrices (e, o, i), with `transposed` (e, i, o). names: Names of the owner's
    parameters, in order.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool, names: tuple[str, ...]) -> None:
        super().__init__()
        self.weight, self.transposed, self.names = weight, transposed, names

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the stock shape as one matrix (e*o, i) with the rows of all experts."""
        return weight if weight.ndim == 2 else (weight.mT if self.transposed else weight).flatten(0, 1)

    def matrix_shape(self) -> tuple[int, int]:
        """Return the shape of `matrix(weight)`."""
        *stack, rows, columns = self.weight.shape
        if stack and self.transposed:
            rows, columns = columns, rows
        return prod(stack) * rows, columns

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix (e*o, i) in the stock shape, which is the shape of `like`. This is the inverse of `matrix`."""
        if like.ndim == 2:
            return matrix
        stack = rearrange(matrix, "(e o) i -> e o i", e=like.shape[0])
        return stack.mT if self.transposed else stack


def readable_parameters(owner: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that can be modules: stacks of matrices, projections of an attention."""
    if is_attention(owner):
        return [name for name in ATTENTION if owner._parameters.get(name) is not None]
    if isinstance(owner, _CONTAINERS):
        return []
    own = owner.named_parameters(recurse=False)
    return [name for name, parameter in own if parameter.ndim == 3 and min(parameter.shape) > 1]


def declared(owner: nn.Module) -> list[str]:
    """Return the names of all parameters of a module in order, including parameters that are modules now."""
    child: Any
    for child in owner._modules.values():
        if getattr(child, "of_parameter", False):
            stock = child.shell
            return list(stock.names)
    return list(owner._parameters)


def is_attention(module: nn.Module | None) -> bool:
    """Return whether a module computes as nn.MultiheadAttention does, which reads the weight of `out_proj` without calling it."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path. For a parameter, return a ParameterModule outside of the model."""
    owner, name = _owner(model, path)
    parameter = owner._parameters.get(name)
    if parameter is None:
        return model.get_submodule(path)
    # The experts of this layout in transformers declare it.
    return ParameterModule(parameter, bool(getattr(owner, "is_transposed", False)), tuple(owner._parameters))


def to_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Make modules of the parameters among `paths`. Owners that read weights themselves then read the adapted weights."""
    modules = {path: module_at(model, path) for path in paths}
    readers: dict[Any, list[str]] = {}
    for path, module in modules.items():
        owner, name = _owner(model, path)
        if isinstance(module, ParameterModule) and name in owner._parameters:
            del owner._parameters[name]
            owner._modules[name] = module
            readers.setdefault(owner, []).append(name)
        elif is_attention(owner):
            readers.setdefault(owner, []).append(name)
    adapted = set(modules.values())
    encoders = [module for module in model.modules() if isinstance(module, ENCODERS)]
    readers |= {encoder: [] for encoder in encoders if not adapted.isdisjoint(encoder.modules())}
    for reader, names in readers.items():
        stock: Any = type(reader)
        reader.__class__ = _reading(stock, tuple(names))


def to_parameters(model: nn.Module) -> None:
    """Make every such module a parameter again, in the stock order, under its own class. This is the inverse of `to_modules`."""
    for owner in list(model.modules()):
        if isinstance(owner, _Reading):
            owner.__class__ = owner.vismt_reading[0]  # type: ignore[assignment]
        modules = {name: child for name, child in owner._modules.items() if isinstance(child, ParameterModule)}
        for name, child in modules.items():
            del owner._modules[name]
            owner._parameters[name] = child.weight
            present = dict(owner._parameters)
            order = [*(known for known in child.names if known in present), *present]
            owner._parameters.clear()
            owner._parameters.update({known: present[known] for known in order})


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


class _Linear(NamedTuple):
    """What nn.MultiheadAttention reads of `out_proj`."""

    weight: Tensor
    bias: Tensor | None


class _Forwards(threading.local):
    """Sums that the running forwards of this thread have read, by id of the owner and name."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, Any]] = {}


_FORWARDS = _Forwards()


class _Reading(nn.Module):
    """Part of the class of an owner while it is adapted."""

    vismt_reading: tuple[type[nn.Module], tuple[str, ...]]  # arguments of `_reading`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _FORWARDS.sums[id(self)] = {}
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del _FORWARDS.sums[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(protocol)
        return _new, self.vismt_reading, *state[2:]  # a class without a module of its own cannot be pickled

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, child in self._modules.items():
            if getattr(child, "of_parameter", False) and f"{prefix}{name}" in state:
                state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state, prefix, *args)


@cache
def _reading(stock: Any, read: tuple[str, ...]) -> Any:
    """Return the subclass for owners of class `stock` whose forward reads the sums of the children `read`."""
    members: dict[str, Any] = {name: _sum(name) for name in read}
    if issubclass(stock, ENCODERS):  # attributes by which torch chooses the fused kernel
        members |= {
            "activation_relu_or_gelu": property(lambda encoder: 0),
            "use_nested_tensor": property(lambda encoder: False),
        }
    named = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (_Reading, stock), {**named, **members, "vismt_reading": (stock, read)})


def _new(*reading: Any) -> nn.Module:
    cls = _reading(*reading)
    return cls.__new__(cls)


def _sum(name: str) -> property:
    """Return the attribute of a child: its sum while the owner's forward runs in this thread, itself at another time."""

    def read(owner: nn.Module) -> Any:
        sums = _FORWARDS.sums.get(id(owner))
        child: Any = owner._modules[name]
        if sums is None or not getattr(child, "weight_readable", False):
            return child
        if name not in sums:
            sums[name] = child() if child.of_parameter else _Linear(child.adapted_weight(), child.bias)
        return sums[name]

    return property(read)
