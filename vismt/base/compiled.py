"""Loops over pixels as machine code: numba compiles them at their first call and keeps the result for the next process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Compiled:
    """A function of arrays and numbers that is compiled when it is first called; a decorator.

    Importing it loads nothing. The code is kept beside the source file or in numba's cache folder; where neither can be
    written, every process compiles its own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @cached_property
    def code(self) -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True)(self.function)
        except RuntimeError:  # no folder for compiled code
            return numba.njit(self.function)

    def __call__(self, *arguments: Any) -> Any:
        return self.code(*arguments)
