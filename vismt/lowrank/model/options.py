"""Types and ranges of what a user passes to `adapt`, checked once, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from vismt.base.errors import UserError, near

# The options of `inject` that users give, whatever the method.
COMMON = (
    "exclude",
    "rank_pattern",
    "alpha_pattern",
    "rslora",
    "clamp_rank",
    "split_qkv",
    "dropout",
    "also_train",
    "dtype",
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `inject` with patterns as lists and dtype names as dtypes; UserError for the first wrong one."""
    result = dict(options)
    for name in ("exclude", "also_train"):
        result[name] = _patterns(name, result.get(name, ()))
    for name in ("rslora", "clamp_rank", "split_qkv"):
        if not isinstance(result.get(name, False), bool):
            raise UserError(f"adapt.{name}: {result[name]!r}; it must be true or false.")
    result["rank_pattern"] = {p: _rank(f"rank_pattern['{p}']", v) for p, v in _table("rank_pattern", result).items()}
    result["alpha_pattern"] = {
        p: _alpha(f"alpha_pattern['{p}']", v) for p, v in _table("alpha_pattern", result).items()
    }
    result["rank"] = _rank("rank", result["rank"])
    result["alpha"] = None if result["alpha"] is None else _alpha("alpha", result["alpha"])
    dropout = result.get("dropout", 0.0)
    if not _number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"adapt.dropout: {dropout!r}; it must be a number in [0, 1).")
    result["dtype"] = _dtype(result.get("dtype"))
    targets = result["targets"]
    if targets is not None and not isinstance(targets, str):
        result["targets"] = _patterns("targets", targets)
    return result


def _patterns(name: str, value: Any) -> list[str]:
    """Return the patterns as a list: a string is one pattern."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise UserError(
            f"adapt.{name}: {value!r}; give module paths, suffixes or regular expressions as a list of texts."
        )
    return list(value)


def _table(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    value = options.get(name) or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"adapt.{name}: {value!r}; give a mapping from pattern to value.")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _rank(name: str, value: Any) -> int:
    if not _number(value) or value != int(value) or value < 1:
        raise UserError(f"adapt.{name}: {value!r}; it must be a whole number, at least 1.")
    return int(value)


def _alpha(name: str, value: Any) -> float:
    if not _number(value) or value <= 0:
        raise UserError(f"adapt.{name}: {value!r}; it must be a positive number.")
    return float(value)


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, str):
        if value not in DTYPES:
            raise UserError(f"adapt.dtype: '{value}'.{near(value, DTYPES)}")
        return DTYPES[value]
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise UserError(f"adapt.dtype: {value!r}; give a floating dtype, one of {', '.join(DTYPES)}.")
    return value
