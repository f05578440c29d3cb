"""Parameters that a module reads itself, each made a module: experts in one tensor, and what nn.MultiheadAttention reads.

    owner.gate_up_proj (e, o, i)   ->   owner.gate_up_proj.weight, below a ParameterModule, which a layer can replace

While the owner's forward runs, its attribute is the tensor W + DeltaW that the layer returns. Every implementation of that
forward (a loop over the experts that are hit, batched and grouped products, fused attention) therefore reads the adapted
weight. Code that reads the attribute at another time gets the layer, which stands for the same tensor in any function of torch.
A state dict with stock keys can be loaded meanwhile. Encoders of torch.nn read the weights of all their linears in one fused
kernel if no gradient is needed. That kernel is switched off while an encoder with a layer in it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
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
    owners = {}
    modules = {path: module_at(model, path) for path in paths}
    for path, module in modules.items():
        owner, name = _owner(model, path)
        if isinstance(module, ParameterModule) and name in owner._parameters:
            del owner._parameters[name]
            owner._modules[name] = module
            owners[id(owner)] = owner
        elif is_attention(owner):
            owners[id(owner)] = owner
    for owner in owners.values():
        owner.register_forward_pre_hook(_read)
        owner.register_forward_hook(_drop, always_call=True)
        owner.register_load_state_dict_pre_hook(_accept_stock_keys)
    adapted = {id(module) for module in modules.values()}
    for module in model.modules():
        if isinstance(module, ENCODERS) and any(id(inner) in adapted for inner in module.modules()):
            module.register_forward_pre_hook(_without_kernel)
            module.register_forward_hook(_with_kernel, always_call=True)


def to_parameters(model: nn.Module) -> None:
    """Make every such module a parameter again, in the stock order, and leave no hook. This is the inverse of `to_modules`."""
    ours = (_read, _drop, _accept_stock_keys, _without_kernel, _with_kernel)
    for owner in list(model.modules()):
        modules = {name: child for name, child in owner._modules.items() if isinstance(child, ParameterModule)}
        for name, child in modules.items():
            del owner._modules[name]
            owner._parameters[name] = child.weight
            present = dict(owner._parameters)
            order = [*(known for known in child.names if known in present), *present]
            owner._parameters.clear()
            owner._parameters.update({known: present[known] for known in order})
        # Hooks are recognised by their functions, because copies and pickles of a module keep no handles of hooks.
        for table in (owner._forward_pre_hooks, owner._forward_hooks, owner._load_state_dict_pre_hooks):
            for key in [key for key, hook in table.items() if getattr(hook, "hook", hook) in ours]:
                del table[key]
                owner._forward_hooks_always_called.pop(key, None)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _read(owner: nn.Module, args: object) -> None:
    child: Any
    for name, child in owner._modules.items():
        if getattr(child, "of_parameter", False):
            owner.__dict__[name] = child()
        elif getattr(child, "weight_readable", False):
            child.__dict__["weight"] = child.adapted_weight()


def _drop(owner: nn.Module, args: object, output: object) -> None:
    for name, child in owner._modules.items():
        owner.__dict__.pop(name, None)
        if child is not None:
            child.__dict__.pop("weight", None)


def _accept_stock_keys(owner: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, child in owner._modules.items():
        if getattr(child, "of_parameter", False) and f"{prefix}{name}" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}")


def _without_kernel(encoder: nn.Module, args: object) -> None:
    if not torch.compiler.is_compiling():  # compiled code cannot call this, and a hook is enough for it
        encoder.__dict__["fused_kernel"] = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)


def _with_kernel(encoder: nn.Module, args: object, output: object) -> None:
    if "fused_kernel" in encoder.__dict__:
        torch.backends.mha.set_fastpath_enabled(encoder.__dict__.pop("fused_kernel"))
