"""JSON text to plain values, within bounds: no repeated key, no NaN, no number beyond fp64 or 64 bits, no bottomless nesting."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file; a UserError that starts with `what` where it cannot be read."""
    if not path.is_file():
        raise UserError(f"{what}: no file '{path}'.")
    try:
        return json.loads(
            path.read_text(encoding="utf8"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise UserError(f"{what}: '{path}' cannot be read as JSON (it is nested too deep).") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: '{path}' cannot be read as JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return result


def _whole(text: str) -> int:
    value = int(text)
    if value.bit_length() > 64:
        raise ValueError(f"a whole number of {value.bit_length()} bits; at most 64 are read")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(text)} is not a finite number")
    return value
