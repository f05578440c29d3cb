"""The adapter modules of a model together: put in place and taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterModule, Finish, LayerSpec, adapter_modules


def prepare_modules(model: nn.Module, specs: Sequence[LayerSpec]) -> Finish:
    """Check specs on the stock model as a whole. Return a function that takes the placed modules by path."""
    kinds = dict.fromkeys(spec.layer for spec in specs)
    functions = [kind.prepare(model, [spec for spec in specs if spec.layer is kind]) for kind in kinds]

    def finish(modules: Mapping[str, AdapterModule]) -> None:
        for function in functions:
            if function is not None:
                function(modules)

    return finish


def attach_modules(
    model: nn.Module, specs: Sequence[LayerSpec], make: Callable[[LayerSpec, nn.Module | None], AdapterModule]
) -> dict[str, AdapterModule]:
    """Attach what `make(spec, base)` returns for each spec, and return it by path.

    base: Module at the path, None for a new path. Layers come first, so that a container has them when it is wrapped.
    """
    placed: dict[str, AdapterModule] = {}
    for of_weights in (True, False):
        bases = dict(model.named_modules())
        modules = {s.path: make(s, bases.get(s.path)) for s in specs if s.has_weight is of_weights}
        attach_all(model, modules)
        placed |= modules
    return placed


def attach_all(model: nn.Module, modules: Mapping[str, AdapterModule]) -> None:
    """Put each module at its path, under every name that the module there has."""
    names: dict[int, list[str]] = {}
    paths: dict[str, int] = {}
    for name, module in model.named_modules(remove_duplicate=False) if modules else ():
        names.setdefault(id(module), []).append(name)
        paths[name] = id(module)
    for path, module in modules.items():
        module.attach(model, names[paths[path]] if path in paths else [path])


def detach_all(model: nn.Module, merged: Mapping[str, nn.Module] | None = None) -> None:
    """Put every stock module back, under every name of its adapter module. Remove modules at new paths.

    merged: Modules that replace the stock modules, by path.
    """
    stock: dict[int, nn.Module | None] = {}
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if not isinstance(module, AdapterModule):
            continue
        if id(module) not in stock:
            stock[id(module)] = merged[name] if merged and name in merged else module.detach(model)
        parent, _, leaf = name.rpartition(".")
        replacement = stock[id(module)]
        if replacement is None:
            delattr(model.get_submodule(parent), leaf)
        else:
            setattr(model.get_submodule(parent), leaf, replacement)


def check_mergeable(model: nn.Module, what: str) -> None:
    """Raise UserError if an adapter module does something that the stock weights cannot hold."""
    for path, module in adapter_modules(model).items():
        module.check_mergeable(what, path)
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise UserError(f"{what}: '{path}' is pruned; call torch.nn.utils.prune.remove on its weight first.")


def is_mergeable(model: nn.Module) -> bool:
    """Return whether `merge` keeps the function that the model computes now."""
    try:
        check_mergeable(model, "merge")
    except UserError:
        return False
    return True
