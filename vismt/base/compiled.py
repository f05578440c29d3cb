"""Loops over pixels as machine code. numba compiles them at their first call and keeps the result for the next process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Compiled:
    """Decorator for a function of arrays and numbers that is compiled when it is first called.

    Importing it loads nothing. The code is kept beside the source file or in numba's cache folder. If neither can be written,
    every process compiles its own code.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    @cached_property
    def code(self) -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True)(self.function)
        except RuntimeError:  # numba finds no folder that it can write to
            return numba.njit(self.function)

    def __call__(self, *arguments: object) -> Any:
        return self.code(*arguments)
