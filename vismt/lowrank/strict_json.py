"""Strict reading of the JSON of adapter folders into dataclasses.

`read` refuses repeated keys, NaN, numbers beyond fp64 or 64 bits, and nesting that Python cannot follow. `build` turns a mapping
into a dataclass and raises ValueError with the dotted key (`sites[3].rank`), the expected type and the value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from vismt.base.errors import UserError, near

T = TypeVar("T")


def read(path: Path, what: str) -> Any:
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


def build(cls: type[T], values: Any, key: str = "") -> T:
    """Return an instance of the dataclass `cls` with fields from a mapping.

    Fields may be bool, int, float, str, Any, Literal, dataclasses, and unions, lists, tuples and dicts of these. A whole number
    fits a float field; a bool is not a number. key: the dotted key of `values` in the file.

    Raises ValueError for an unknown or missing key, a value of another type, and what `cls` itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(_wrong(key or "the file", "a mapping", values))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {_join(key, name)!r}.{near(name, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{_join(key, name)!r} is missing")
    arguments = {name: _convert(value, hints[name], _join(key, name)) for name, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:  # of a check in __post_init__
        raise ValueError(f"{key}: {error}" if key else str(error)) from error


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(key: str, expected: str, value: Any) -> str:
    return f"{key}: expected {expected}, got {reprlib.repr(value)}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the type `hint`; ValueError where it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _member(value, hint, key)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
    elif origin in (list, tuple):
        return _items(value, hint, key)
    elif origin is dict:
        if isinstance(value, dict):
            return {name: _convert(item, arguments[1], f"{key}['{name}']") for name, item in value.items()}
        fits = False
    elif dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    elif hint is float and type(value) is int:
        return float(value)
    else:
        fits = type(value) is hint
    if not fits:
        raise ValueError(_wrong(key, _described(hint), value))
    return value


def _member(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the first type of a union that it fits."""
    for member in typing.get_args(hint):
        try:
            return _convert(value, member, key)
        except ValueError:
            continue
    raise ValueError(_wrong(key, _described(hint), value))


def _items(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    open_ended = origin is list or arguments[-1] is Ellipsis
    if not isinstance(value, list) or not (open_ended or len(value) == len(arguments)):
        raise ValueError(_wrong(key, _described(hint), value))
    hints = [arguments[0]] * len(value) if open_ended else arguments
    return origin(_convert(item, of, f"{key}[{number}]") for number, (item, of) in enumerate(zip(value, hints)))


def _described(hint: Any) -> str:
    """Return a type as messages name it: 'int or null', 'a list of str'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(member) for member in arguments)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list of {_described(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values"
    if origin is dict:
        return f"a mapping to {_described(arguments[1])}"
    return "null" if hint is types.NoneType else str(getattr(hint, "__name__", hint))
