"""Public names of a package, each imported from its module when it is first used, and docstrings as data.

A package lists its names once, as imports under `if TYPE_CHECKING:`, which type checkers and editors read. "as" with the same
name makes them public. `exports` sets `__all__` and returns the `__getattr__` and `__dir__` that do these imports on demand, so
that importing a package loads nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vismt.base.errors import GONE, UserError


def exports(package: str, *, classes: bool = True) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package for the names that it imports under `if TYPE_CHECKING:`.

    classes: Whether `__all__` includes classes. `help` of the package shows every special method of a class in `__all__`.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf8"))
    imports = [
        node
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    ]
    places = {alias.name: str(node.module) for node in imports for alias in node.names}
    setattr(module, "__all__", sorted(name for name in places if classes or not name[0].isupper()))  # noqa: B010 - of a module, which has no such attribute for a type checker

    def getattr_(name: str) -> object:
        if instead := GONE.get(f"{package}.{name}"):
            raise UserError(f"{package}.{name} is gone. {instead}")
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        if places[name] == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(module, name, value)
        return value

    return getattr_, lambda: sorted(places)


def docstring(item: Any) -> str:
    """Return the own docstring of a class or function without indentation, "" if it has none.

    `python -OO` drops docstrings. Then they are read from the source, where there is one.
    """
    text = None
    if sys.flags.optimize > 1:
        with contextlib.suppress(OSError, TypeError):
            definition: Any = ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]
            text = ast.get_docstring(definition)
    return inspect.cleandoc(text or vars(item).get("__doc__", item.__doc__) or "")
