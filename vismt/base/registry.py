"""Tables of objects by name. Modules fill a table when they are imported, which happens when a name is first looked up.

Installed packages add names by entry points (`with_entry_points`). A user's own module adds them when it is imported
(`import_own`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from vismt.base.errors import GONE, UserError, near, shown_value

T = TypeVar("T")
# What registries of the core find in packages above the core, by kind. vismt/__init__.py fills this table, since it runs first.
PLACES: dict[str, dict[str, str]] = {}


def with_entry_points(group: str, places: Mapping[str, str]) -> dict[str, str]:
    """Return `places` with the modules that installed packages name as entry points of `group`. vismt's own names stay."""
    return {**{point.name: point.value for point in entry_points(group=group)}, **places}


def import_own(module: str, what: str) -> ModuleType:
    """Import a module of a user or of another package. The working folder is on the path meanwhile.

    Raise UserError, which begins with `what`, if the module cannot be imported.
    """
    if module.startswith("vismt."):
        return importlib.import_module(module)
    with working_folder_on_path():
        importlib.invalidate_caches()  # the file may be newer than the listing of the folder
        try:
            return importlib.import_module(module)
        except (Exception, SystemExit) as error:
            advice = ""
            if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
                advice = ": run in the folder that contains it, or add that folder to PYTHONPATH"
            raise UserError(f"{what}: cannot import '{module}' ({first_line(error)}){advice}.") from error


@contextmanager
def working_folder_on_path() -> Iterator[None]:
    """Let imports in the block find the modules of the working folder. The command `vismt` itself leaves it out."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error from foreign code."""
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message}"


class Registry(Mapping[str, T]):
    """A mapping from names to objects that files register. Iterates in alphabetical order.

    Args:
        unknown: Start of the error for an unknown name, for example "adapt: no method".
        places: Modules that register each name. A module is imported only when its name is looked up. A place "prefix:" belongs
            to a family.

    Raises:
        UserError: If `registry[name]` gets an unknown name. The message lists similar names.

    Example:
        >>> SHAPES = Registry("shape: no shape", {"circle": "project.shapes.round"})
        >>> @SHAPES.register("circle")
        ... class Circle: ...
    """

    def __init__(self, unknown: str, places: Mapping[str, str] | None = None) -> None:
        self._unknown = unknown
        self._places = dict(places or {})
        self._items: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates as `name`."""
        return partial(self.add, name)

    def add(self, name: str, item: T) -> T:
        """Register `item` as `name`, replacing an earlier item, and return it."""
        self._items[name] = item
        return item

    def family(self, prefix: str, make: Callable[[str], T]) -> None:
        """Register objects named "prefix:rest". `make(rest)` makes an object when it is asked for. Iterating leaves them out."""
        self._families[prefix] = make

    def hint(self, name: str) -> str:
        """Return a hint for an unknown name: what to do without it, the family that has it, or similar names."""
        if name in GONE:
            return f" {GONE[name]}"
        for prefix, make in self.families.items():
            try:
                make(name)
            except UserError:
                continue
            return f" It is '{prefix}:{name}'."
        return near(name, self)

    @property
    def families(self) -> dict[str, Callable[[str], T]]:
        """Functions that make the objects of each family, by prefix."""
        for name in self._places:
            if name.endswith(":") and name[:-1] not in self._families:
                importlib.import_module(self._places[name])
        return self._families

    def __getitem__(self, name: str) -> T:
        prefix, colon, rest = str(name).partition(":")
        if colon and prefix in self.families:
            return self.families[prefix](rest)
        if name not in self:
            raise UserError(f"{self._unknown} {shown_value(str(name))}.{self.hint(str(name))}")
        if name not in self._items:
            module = import_own(self._places[name], f"{self._unknown} '{name}'")
            if name not in self._items:
                raise UserError(f"{self._unknown} '{name}': the module '{module.__name__}' does not register it.")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        prefix, colon, _ = name.partition(":")
        return name in {*self} or (bool(colon) and prefix in self.families)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items.keys() | {name for name in self._places if not name.endswith(":")}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def get(self, name: str, default: object = None) -> Any:
        known = name in self
        return self[name] if known else default
