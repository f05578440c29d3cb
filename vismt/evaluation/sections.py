"""The section `evaluate` of a job: the job's own keys, and the keys of the features whose needs the job provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TypeVar

from vismt.base.registry import Registry, with_entry_points
from vismt.uncertainty.features import REASONS, Feature

FEATURES: Registry[type[Feature]] = Registry(
    "evaluate: no feature", with_entry_points("vismt.features", {"certify": "vismt.evaluation.certify"})
)
Section = TypeVar("Section")


def evaluate_section(*provides: str) -> Callable[[type[Section]], type[Section]]:
    """Return a decorator that adds the keys of features to the dataclass of a job's own keys of `evaluate`.

    The key of a feature that needs more than the job provides is refused with the reason.

    Args:
        provides: Names of what the job provides, keys of `vismt.uncertainty.features.REASONS`.
    """

    def extended(own: type[Section]) -> type[Section]:
        features = [FEATURES[name] for name in FEATURES]
        lacking = {feature.key: sorted(feature.needs - set(provides)) for feature in features}
        keys = [feature.keys for feature in features if not lacking[feature.key]]
        reasons = {key: REASONS[needs[0]] for key, needs in lacking.items() if needs}
        elsewhere = {key: f"Leave it out: {reason}." for key, reason in reasons.items()}
        content = {"__doc__": own.__doc__, "__module__": own.__module__, "ELSEWHERE": elsewhere, "REFUSED": reasons}
        return dataclass(type(own.__name__, (*keys, own), content))

    return extended


def refusals(section: type) -> dict[str, str]:
    """Return by the key of each feature why the section `evaluate` of a job lacks it.

    The reason is "" for a key that the section has.
    """
    known = {item.name for item in fields(section)} if is_dataclass(section) else set()
    reasons: dict[str, str] = getattr(section, "REFUSED", {})
    return {name: "" if name in known else reasons.get(name, "this job declares no features") for name in FEATURES}


def asked_features(evaluate: object) -> list[Feature]:
    """Return the features that a section `evaluate` asks for."""
    asked = [(FEATURES[name], getattr(evaluate, name, None)) for name in FEATURES]
    return [feature(section) for feature, section in asked if section]
