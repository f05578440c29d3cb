"""Values that are fitted on validation examples for the weights of a model, kept in a JSON file until the weights change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Protocol, TypeVar

from vismt.storage.files import atomic_write, read_sealed, sealed


class Fitted(Protocol):
    """What was fitted for weights with a fingerprint; a dataclass."""

    @property
    def fingerprint(self) -> str: ...


F = TypeVar("F", bound=Fitted)


def kept(path: Path, kind: type[F], fingerprint: str, fit: Callable[[], F]) -> F:
    """Return what a JSON file has for the weights with this fingerprint, or fit and write it."""
    if path.exists():
        names = tuple(field.name for field in fields(kind))  # type: ignore[arg-type]  # a dataclass
        known = kind(**read_sealed(path, f"'{path}'", names))
        if known.fingerprint == fingerprint:
            return known
    fitted = fit()
    atomic_write(path, sealed(asdict(fitted)))  # type: ignore[call-overload]  # a dataclass
    return fitted
