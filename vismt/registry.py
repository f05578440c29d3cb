"""Objects by name: a table that files fill when they are imported, with near names in its error."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from vismt.errors import require_known

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping from names to objects that files register. Iterates in alphabetical order.

    Args:
        unknown: start of the error for an unknown name, for example "adapt: no method".
        files: dotted names of modules that register objects; they are imported on the first look-up, not earlier.

    Raises:
        UserError: on `registry[name]` for an unknown name; it lists the near names.

    Example:
        >>> SHAPES = Registry("shape: no shape", files=["project.shapes.round"])
        >>> @SHAPES.register("circle")
        ... class Circle: ...
    """

    def __init__(self, unknown: str, files: Sequence[str] = ()) -> None:
        self._unknown = unknown
        self._files = tuple(files)
        self._items: dict[str, T] = {}
        self.families: dict[str, Callable[[str], T]] = {}

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
        self.families[prefix] = make

    def __getitem__(self, name: str) -> T:
        items = self._loaded()
        prefix, colon, rest = str(name).partition(":")
        if colon and prefix in self.families:
            return self.families[prefix](rest)
        require_known(self._unknown, [name], items)
        return items[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        prefix, colon, _ = name.partition(":")
        return name in self._loaded() or (bool(colon) and prefix in self.families)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())

    def get(self, name: str, default: Any = None) -> Any:
        """Return the object registered as `name`, or `default`."""
        known = name in self
        return self[name] if known else default

    def _loaded(self) -> dict[str, T]:
        for path in self._files:
            importlib.import_module(path)
        return self._items
