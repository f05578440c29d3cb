"""Functions that numba compiles: at the first call, with or without a folder for the code."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from vismt.base.compiled import Compiled


def total(values: np.ndarray) -> float:
    result = 0.0
    for value in values:
        result += value
    return result


def test_the_code_is_compiled_and_kept() -> None:
    compiled = Compiled(total)
    assert compiled(np.arange(4.0)) == 6 and compiled.code is compiled.code


def test_without_a_folder_for_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_of = numba.njit

    def njit(*arguments: object, cache: bool = False) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_of(*arguments)

    def only_without_cache(*arguments: object, **options: bool) -> object:
        return (lambda function: njit(function, **options)) if options else njit(*arguments)

    monkeypatch.setattr(numba, "njit", only_without_cache)
    assert Compiled(total)(np.arange(4.0)) == 6
