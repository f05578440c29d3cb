"""Wrappers of stock containers: what a method adds to a model besides adapter layers, such as a router in an FFN.

A ModuleWrapper takes the place of a container and keeps its children under their names, so every path and key inside stays
what it was. It may keep the tensors below it in another order; files, merging and undoing see the stock order.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.base.registry import PLACES, Registry
from vismt.lowrank.layers.base import HOOKS, AdapterLayer
from vismt.lowrank.values import check_factor


class ModuleWrapper(nn.Module, ABC):
    """Base class. A subclass adds its forward and its tensors, and overrides what differs from the empty defaults."""

    name: ClassVar[str]  # in adapter files
    shell: nn.Module
    stock_children: tuple[str, ...]

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.adopt(base)

    def adopt(self, base: nn.Module) -> None:
        """Take the children, hooks and mode of the stock container `base`."""
        # The stock container without its children: not a submodule, so it adds no keys and follows no conversion.
        shell = copy.copy(base)
        shell._modules = {}
        self.__dict__["shell"], self.__dict__["stock_children"] = shell, tuple(base._modules)
        for name in HOOKS:  # shared tables: hooks fire while the module is wrapped and stay when it is undone
            self.__dict__[name] = base.__dict__[name]
        self._modules.update(base._modules)
        self.training = base.training

    def release(self) -> None:
        """Let go of what `adopt` took, which is in the stock container again; the order of the children stays."""
        self.__dict__["shell"] = None
        self._modules.update(dict.fromkeys(self.stock_children))

    @classmethod
    @abstractmethod
    def check(cls, path: str, base: nn.Module | None, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors()` on `base`, a stock container or one that carries such a wrapper.

        Raises UserError where the container cannot carry one.
        """

    @classmethod
    @abstractmethod
    def around(cls, base: nn.Module | None, settings: Mapping[str, Any]) -> ModuleWrapper:
        """Return the wrapper of a checked base, its tensors unset."""

    @classmethod
    def check_tensors(cls, what: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError for values that a wrapper cannot hold; here for all that is not floating and finite.

        tensors: of an adapter file, by name, their shapes and the settings checked by `check`. what: start of messages.
        """
        for name, value in tensors.items():
            check_factor(f"{what}.{name}", value)

    def settings(self) -> dict[str, Any]:
        """Return what `check` and `around` need, as values that JSON can hold."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that an adapter file holds for this wrapper, by name below its path."""
        return {}

    def restore(self, name: str, value: Tensor) -> None:
        """Copy in one of `tensors()` from a file."""
        self.get_parameter(name).copy_(value)

    def attach(self, model: nn.Module, path: str) -> None:
        """Take the place of the stock container."""
        install_module(model, path, self)

    def check_mergeable(self, what: str, path: str) -> None:
        """Raise UserError for `what` (merge, export) while the wrapper does more than plain updates do."""

    @classmethod
    def check_mergeable_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise the same UserError for a wrapper in an adapter file, from its saved `tensors()`."""

    def to_stock_order(self) -> None:
        """Put the tensors below into the order of the stock model, in place."""

    def from_stock_order(self) -> None:
        """Put the tensors below into the order that the wrapper uses: the inverse of `to_stock_order`."""

    def stock(self) -> nn.Module:
        """Return the stock container with the present children, in stock order."""
        self.to_stock_order()
        self.shell._modules = {name: self._modules[name] for name in self.stock_children}
        self.shell.training = self.training
        return self.shell


class AddedModule(ModuleWrapper):
    """A module at a new path of the model that takes no container's place and is removed with the update.

    `check` and `around` get None as their base, or a module of the same class.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def adopt(self, base: nn.Module) -> None:
        """Do nothing: this wrapper has no container."""

    def release(self) -> None:
        """Do nothing: this wrapper has no container."""

    def attach(self, model: nn.Module, path: str) -> None:
        """Become the module `path` of the model."""
        model.add_module(path, self)

    def detach(self, model: nn.Module, path: str) -> None:
        """Leave the model: the inverse of `attach`."""
        delattr(model, path)


WRAPPERS: Registry[type[ModuleWrapper]] = Registry(
    "adapter: no wrapper",
    PLACES["wrappers"],
    # Files of earlier versions name the class.
    {"vismt.multitask.moefied:MoEfiedMlp": "moefied_ffn", "vismt.llm.ilora:InstanceGate": "instance_gate"},
)


def register_wrapper(name: str) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that registers a ModuleWrapper class as `name`, the name that adapter files use."""

    def decorate(wrapper: type[Any]) -> type[Any]:
        wrapper.name = name
        return WRAPPERS.add(name, wrapper)

    return decorate


def uninstall(model: nn.Module) -> None:
    """Put every stock container back in its place and remove added modules."""
    for path, wrapper in wrappers_of(model).items():
        if isinstance(wrapper, AddedModule):
            wrapper.detach(model, path)
    replace(model, ModuleWrapper, lambda wrapper: wrapper.stock())


def wrappers_of(model: nn.Module) -> dict[str, ModuleWrapper]:
    """Return every wrapper of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ModuleWrapper)}


def described(wrapper: ModuleWrapper) -> dict[str, Any]:
    """Return a wrapper as data: its type and its settings."""
    return {"type": wrapper.name, "settings": wrapper.settings()}


def wrapper_type(name: str, what: str) -> type[ModuleWrapper]:
    """Return the class that `described` named. what: start of the error for an unknown one."""
    if name not in WRAPPERS:
        raise UserError(f"{what}: it needs '{name}', which this version of vismt does not have; use a matching vismt.")
    return WRAPPERS[name]


def check_mergeable(model: nn.Module, what: str) -> None:
    """Raise UserError where a wrapper or an update does what one weight each cannot hold."""
    for path, module in model.named_modules():
        if isinstance(module, (ModuleWrapper, AdapterLayer)):
            module.check_mergeable(what, path)


def is_mergeable(model: nn.Module) -> bool:
    """Return whether `merge` keeps the function that the model computes now."""
    try:
        check_mergeable(model, "merge")
    except UserError:
        return False
    return True


def to_stock(model: nn.Module) -> None:
    """Put every stock weight back to its stock values in stock order; the trained values are kept apart."""
    for wrapper in wrappers_of(model).values():
        wrapper.to_stock_order()
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer.remove_update()
    for layer in layers:
        layer.reorder(stock=True)


def from_stock(model: nn.Module) -> None:
    """Apply every update again: the inverse of `to_stock`."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer.reorder(stock=False)
    for layer in layers:
        layer.apply_update()
    for wrapper in wrappers_of(model).values():
        wrapper.from_stock_order()


@contextmanager
def stock_order(model: nn.Module) -> Iterator[None]:
    """Keep the model's tensors in stock order inside the block; not for use between a forward and its backward."""
    try:
        to_stock(model)
        yield
    finally:
        from_stock(model)


def install_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where another stands, under every name that the other has."""
    old = model.get_submodule(path)
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is old]
    for name in names:
        _set(model, name, module)


def replace(model: nn.Module, kind: type[nn.Module], stock: Callable[[Any], nn.Module]) -> None:
    """Replace each module of class `kind` by `stock(module)` under every name it has."""
    matches = [
        (name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)
    ]
    replacements: dict[int, nn.Module] = {}
    for name, module in matches:
        if id(module) not in replacements:
            replacements[id(module)] = stock(module)
        _set(model, name, replacements[id(module)])


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
