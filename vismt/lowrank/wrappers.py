"""Stand-ins for stock containers: what a method adds to a model beside low-rank updates, such as a router in an FFN.

A Part takes the place of a container and keeps its children under their names, so every path and key inside stays what
it was. It may hold the tensors below it in an order of its own; files, merging and undoing see the stock order.
"""

from __future__ import annotations

import copy
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.adapter_layer import HOOKS, Host


class Part(nn.Module, ABC):
    """Base class. A subclass adds its forward and its own tensors, and overrides what differs from the empty answers."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        # The stock container without its children: not a submodule, so it adds no keys and follows no conversion.
        shell = copy.copy(base)
        shell._modules = {}
        self.__dict__["shell"], self.__dict__["stock_children"] = shell, tuple(base._modules)
        for name in HOOKS:  # one table for both, so that hooks fire meanwhile and stay when it is undone
            self.__dict__[name] = base.__dict__[name]
        self._modules.update(base._modules)
        self.training = base.training

    @classmethod
    @abstractmethod
    def check(cls, path: str, base: nn.Module, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of `tensors()` for this base (stock, or carrying such a part); UserError where it cannot carry one."""

    @classmethod
    @abstractmethod
    def around(cls, base: nn.Module, settings: Mapping[str, Any]) -> Part:
        """The part on a checked base, its tensors to be filled."""

    def settings(self) -> dict[str, Any]:
        """What `check` and `around` need, fit for JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its own that an adapter file holds, by name below its path."""
        return {}

    def restore(self, name: str, value: Tensor) -> None:
        """Take one of `tensors()` from a file."""
        self.get_parameter(name).copy_(value)

    def join(self, model: nn.Module, path: str) -> None:
        """Take the place of the stock container."""
        put(model, path, self)

    def need_idle(self, what: str, path: str) -> None:
        """UserError for `what` (merge, export) while the part does more than plain updates do."""

    @classmethod
    def need_idle_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        """The same for a part of which there are `tensors()` alone."""

    def to_stock_order(self) -> None:
        """Put the tensors below in the order of the stock model, in place."""

    def to_own_order(self) -> None:
        """The inverse of `to_stock_order`."""

    def stock(self) -> nn.Module:
        """The stock container with the present children, in stock order."""
        self.to_stock_order()
        self.shell._modules = {name: self._modules[name] for name in self.stock_children}
        self.shell.training = self.training
        return self.shell


class Guest(Part):
    """A part that takes no container's place: a module of its own at a new path of the model, gone with the update.

    `check` and `around` get None as their base, or the same guest.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def join(self, model: nn.Module, path: str) -> None:
        """Become the module `path` of the model."""
        model.add_module(path, self)

    def leave(self, model: nn.Module, path: str) -> None:
        """The inverse of `join`."""
        delattr(model, path)


def take_out(model: nn.Module) -> None:
    """Give every part's stock container back its place; guests leave."""
    for path, part in parts_of(model).items():
        if isinstance(part, Guest):
            part.leave(model, path)
    replace(model, Part, lambda part: part.stock())


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Every part of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Part)}


def described(part: Part) -> dict[str, Any]:
    """A part as data: its type and its settings."""
    return {"type": f"{type(part).__module__}:{type(part).__qualname__}", "settings": part.settings()}


def part_type(name: str, what: str) -> type[Part]:
    """The class that `described` named; only classes of this package are looked up."""
    module, _, attribute = str(name).partition(":")
    found = None
    if re.fullmatch(r"vismt(\.\w+)+", module):
        with suppress(ImportError):
            found = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Part)):
        raise UserError(f"{what}: it needs '{name}', which this version of vismt does not have; use a matching vismt.")
    return found


def need_idle(model: nn.Module, what: str) -> None:
    """UserError where a part or an update still does something that one weight each cannot."""
    for path, module in model.named_modules():
        if isinstance(module, (Part, Host)):
            module.need_idle(what, path)


def to_stock(model: nn.Module) -> None:
    """Every stock weight of the model with its stock values in stock order, what was trained beside it."""
    for part in parts_of(model).values():
        part.to_stock_order()
    hosts = [module for module in model.modules() if isinstance(module, Host)]
    for host in hosts:
        host.lift()
    for host in hosts:
        host.reorder(stock=True)


def to_own(model: nn.Module) -> None:
    """The inverse of `to_stock`."""
    hosts = [module for module in model.modules() if isinstance(module, Host)]
    for host in hosts:
        host.reorder(stock=False)
    for host in hosts:
        host.settle()
    for part in parts_of(model).values():
        part.to_own_order()


@contextmanager
def stock_order(model: nn.Module) -> Iterator[None]:
    """The model's tensors in stock order for the time of the block; not for use between a forward and its backward."""
    try:
        to_stock(model)
        yield
    finally:
        to_own(model)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where another stands, under every name that one has."""
    old = model.get_submodule(path)
    for name in [name for name, found in model.named_modules(remove_duplicate=False) if found is old]:
        _set(model, name, module)


def replace(model: nn.Module, kind: type[nn.Module], stock: Callable[[Any], nn.Module]) -> None:
    """Replace each module of a kind by `stock(module)` under every name it has."""
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)]
    made: dict[int, nn.Module] = {}
    for name, module in found:
        if id(module) not in made:
            made[id(module)] = stock(module)
        _set(model, name, made[id(module)])


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
