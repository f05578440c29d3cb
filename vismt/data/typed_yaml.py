"""Strict reading of a YAML mapping into a dataclass: unknown key, missing key, wrong type and doubled key are user errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Hashable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml

from vismt.errors import UserError, near

T = TypeVar("T")


class _NoDoubles(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML itself keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = [key.value for key, _ in node.value]
        doubled = next((key for key in seen if seen.count(key) > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key '{doubled}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, shown: str) -> dict[str, Any]:
    """The mapping in the file `path`; `shown` is how errors name it."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf8"), Loader=_NoDoubles)
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not readable as YAML: {' '.join(str(error).split())}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: cannot be read: {error}.") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{shown}: must hold `key: value` lines, holds {type(loaded).__name__}.")
    return loaded


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: plain classes, X | None, list[X] and dict[K, V]; a bool is no int."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def build(cls: type[T], mapping: object, shown: str, /, **given: Any) -> T:
    """`cls` filled from `mapping`; fields in `given` come from the caller and may not be in the mapping.

    Raises UserError naming `shown` and the key for an unknown or missing key or a value of another type.
    """
    if not isinstance(mapping, dict):
        raise UserError(f"{shown}: must be a mapping, is {mapping!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in given}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key, value in mapping.items():
        if key not in fields:
            raise UserError(f"{shown}: unknown key '{key}'.{near(str(key), fields)}")
        if not fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", None) if not typing.get_args(hints[key]) else str(hints[key])
            raise UserError(f"{shown}: '{key}' must be {wanted}, is {value!r} ({type(value).__name__}).")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in mapping and not optional:
            raise UserError(f"{shown}: key '{name}' is missing.")
    return cls(**mapping, **given)


def inside(text: str, shown: str) -> str:
    """`text` when it is a relative path that stays inside its folder, else a UserError."""
    parts = PurePosixPath(text)
    if not text or "\\" in text or "\0" in text or ":" in text or parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{shown}: '{text}' must be a relative path with '/' and without '..'.")
    return text
