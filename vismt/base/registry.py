"""Objects by name: a table that modules fill when they are imported, each when its name is first looked up."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from vismt.base.errors import require_known

T = TypeVar("T")
# What registries of the core find in packages above it, by kind: vismt/__init__.py writes them down, since it runs first.
PLACES: dict[str, dict[str, str]] = {}


class Registry(Mapping[str, T]):
    """A mapping from names to objects that files register. Iterates in alphabetical order.

    Args:
        unknown: start of the error for an unknown name, for example "adapt: no method".
        places: the module that registers each name; it is imported when the name is looked up, not earlier. A place
            "prefix:" is that of a family.
        aliases: the present name of each old one.

    Raises:
        UserError: on `registry[name]` for an unknown name; it lists the near names.

    Example:
        >>> SHAPES = Registry("shape: no shape", {"circle": "project.shapes.round"})
        >>> @SHAPES.register("circle")
        ... class Circle: ...
    """

    def __init__(
        self, unknown: str, places: Mapping[str, str] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self._unknown = unknown
        self._places = dict(places or {})
        self._aliases = dict(aliases or {})
        self._items: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Return a decorator that registers what it decorates as `name`."""

        def decorate(item: T) -> T:
            return self.add(name, item)

        return decorate

    def add(self, name: str, item: T) -> T:
        """Register `item` as `name`, in place of an earlier one, and return it."""
        self._items[name] = item
        return item

    def family(self, prefix: str, make: Callable[[str], T]) -> None:
        """Register objects named "prefix:rest", made by `make(rest)` when one is asked for; iterating leaves them out."""
        self._families[prefix] = make

    @property
    def families(self) -> dict[str, Callable[[str], T]]:
        """What makes the objects of each family, by prefix."""
        for name in self._places:
            if name.endswith(":") and name[:-1] not in self._families:
                importlib.import_module(self._places[name])
        return self._families

    def __getitem__(self, name: str) -> T:
        name = self._aliases.get(name, name)
        prefix, colon, rest = str(name).partition(":")
        if colon and prefix in self.families:
            return self.families[prefix](rest)
        require_known(self._unknown, [name], self)
        if name not in self._items:
            importlib.import_module(self._places[name])
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        prefix, colon, _ = name.partition(":")
        return name in self._aliases or name in {*self} or (bool(colon) and prefix in self.families)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items.keys() | {name for name in self._places if not name.endswith(":")}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the object registered as `name`, or `default`."""
        known = name in self
        return self[name] if known else default
