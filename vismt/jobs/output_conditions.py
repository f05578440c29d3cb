"""Conditions of rows that several jobs have: variants of a model's outputs, sets of other classes; a temperature in an export.

What is fitted on validation examples for the weights of a model is kept in a JSON file until the weights change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Protocol, TypeVar

from vismt.storage.files import atomic_write, read_sealed, sealed
from vismt.uncertainty.intervals import Condition

TEMPERED = Condition("temperature of validation", "variant", "temperature")
ADJUSTED = Condition("logit adjustment of validation", "variant", "logit adjustment")
# Of a Laplace approximation around the head, by the part of the Hessian that is kept.
LAPLACE = {
    structure: Condition(label, "variant", "Laplace")
    for structure, label in (("full", "Laplace"), ("kronecker", "Laplace (Kronecker)"), ("rows", "Laplace"))
}
TEMPERATURE_FILE = "temperature.json"
TAUS = tuple(tau / 4 for tau in range(9))  # tried factors of the log prior, 0 to 2


def against(name: str) -> Condition:
    """Return the condition of the AUROC with which a confidence tells the evaluated images from those of another set."""
    return Condition(f"against {name}", "variant", "out of distribution")


def temperature_file(temperature: float) -> bytes:
    """Return the content of temperature.json beside exported weights."""
    about = {"temperature": temperature, "probabilities": "softmax(logits / temperature)", "fitted_on": "validation"}
    return json.dumps(about, indent=1).encode()


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
