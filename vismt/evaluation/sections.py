"""The section `evaluate` of a job: the job's own keys, and the keys of the features whose needs the job provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.exports import docstring
from vismt.base.registry import Registry, with_entry_points
from vismt.data.division import validation_parts
from vismt.data.set_entries import check_apart, check_row_names
from vismt.engine.study import TuneConfig
from vismt.uncertainty.features import REASONS, VALIDATION, Feature, Inputs, Rows, View
from vismt.uncertainty.intervals import CLEAN, Score

# Modules of this folder with a key.
_KEYS = sorted({path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - {"quality", "sections"})
FEATURES: Registry[type[Feature]] = Registry(
    "evaluate: no feature",
    with_entry_points("vismt.features", {key: f"vismt.evaluation.{key}" for key in _KEYS}),
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
        keys = [_key(feature) for feature in features if not lacking[feature.key]]
        reasons = {key: REASONS[needs[0]] for key, needs in lacking.items() if needs}
        elsewhere = {key: f"Leave it out: {reason}." for key, reason in reasons.items()}

        def check(self: Any) -> None:
            check_split(self, getattr(self, "split", "test"))
            getattr(own, "__post_init__", lambda section: None)(self)

        content: dict[str, Any] = {"__doc__": docstring(own), "__module__": own.__module__}
        content |= {"ELSEWHERE": elsewhere, "REFUSED": reasons}
        content |= {"PROVIDES": frozenset(provides), "__post_init__": check}
        return dataclass(type(own.__name__, (*keys, own), content))

    return extended


def _key(feature: type[Feature]) -> type:
    """Return a dataclass with the key of a feature, as a base of a section."""
    default = field(default_factory=feature.default) if callable(feature.default) else field(default=feature.default)
    content = {"__doc__": f"A key.\n\nArgs:\n    {feature.key}: {feature.meaning}\n", "__module__": feature.__module__}
    return make_dataclass(f"{feature.__name__}Key", [(feature.key, feature.kind, default)], namespace=content)


def refusals(section: type) -> dict[str, str]:
    """Return by the key of each feature why the section `evaluate` of a job lacks it.

    The reason is "" for a key that the section has from the feature.
    """
    known = {item.name for item in fields(section)} if is_dataclass(section) else set()
    reasons: dict[str, str] = getattr(section, "REFUSED", {})
    return {name: reasons.get(name, "" if name in known else "this job declares no features") for name in FEATURES}


def asked_features(evaluate: object, attacks: Sequence[Any] | None = None, *, validated: bool = False) -> list[Feature]:
    """Return the features that a section `evaluate` asks for.

    attacks: Attacks in place of the conditions of the section, under which only some features have columns. None for the
    section. validated: Whether the job has validation answers anyway, with which some features cost nothing.
    """
    asked = [(FEATURES[name], getattr(evaluate, name)) for name in FEATURES if hasattr(evaluate, name)]
    found = [feature(section) for feature, section in asked if section or (validated and feature.costs_nothing)]
    if attacks is not None:
        return [FEATURES["attacks"](attacks), *(of for of in found if of.everywhere)]
    return sorted(found, key=lambda of: of.decides)


def perturbations(features: Sequence[Feature], inputs: Inputs) -> list[Any]:
    """Return the attacks and corruptions of the features. Raises UserError for unfit values, and for two with the same text."""
    found = [(spec, feature.key) for feature in features for spec in feature.perturbations(inputs)]
    labels = [spec.label for spec, _ in found]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        keys = dict.fromkeys(f"evaluate.{key}" for spec, key in found if spec.label == repeated)
        raise UserError(f"evaluate: '{repeated}' is asked for twice; leave one out of {' or '.join(keys)}.")
    return [spec for spec, _ in found]


def check_split(evaluate: object, split: str) -> None:
    """Raise UserError for a feature that would be fitted on the evaluated examples."""
    for feature in asked_features(evaluate):
        if VALIDATION in feature.needs and split == "validation":
            raise UserError(
                f"evaluate.{feature.key}: it is fitted on the validation examples; set evaluate.split to test, or leave it out."
            )


def check_other_sets(evaluate: object, inside: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError for a set of other classes that is also a set of the run. inside: Sets by the key that names them."""
    for feature in asked_features(evaluate):
        check_row_names(feature.sets, f"evaluate.{feature.key}")
        check_apart(inside, {f"evaluate.{feature.key}": feature.sets})


def fitted_keys(evaluate: object, *, apart: bool = False) -> list[str]:
    """Return the keys of the features that are fitted on validation examples.

    apart: Whether features are left out that may be fitted on examples which choose learning rates.
    """
    features = asked_features(evaluate)
    return [of.key for of in features if VALIDATION in of.needs and (of.holds_out or not apart)]


def divides(evaluate: object, tune: TuneConfig | None) -> bool:
    """Return whether one half of the validation examples chooses learning rates, and features are fitted on the other half."""
    return bool(fitted_keys(evaluate, apart=True)) and tune is not None and len(tune.rates) > 1


def check_held_out(evaluate: object, tune: TuneConfig | None, labels: Tensor, groups: Sequence[str]) -> None:
    """Raise UserError for a feature that would be fitted on too few validation examples.

    labels: Labels of the validation examples, int64 (n,). groups: Group of each example, () for independent examples.
    """
    count = int(validation_parts(labels, divides(evaluate, tune), groups)[1].sum())
    for feature in asked_features(evaluate):
        if feature.holds_out:
            feature.check_held_out(count)


def outside_entries(features: Sequence[Feature]) -> list[str]:
    """Return the entries of the sets of other classes whose answers features ask for, each once."""
    return [*dict.fromkeys(of.outside for feature in features for of in feature.quantities() if of.outside)]


def asked_scores(features: Sequence[Feature], view: View, rows: Rows, outside: Callable[[str], Rows]) -> list[Score]:
    """Return the scores of recorded answers. outside: Returns the rows of a set of other classes by its entry."""
    rows = replace(rows, forms={CLEAN: False, **{at: of.decides for of in features for at in of.forms}})
    others = {entry: outside(entry) for entry in outside_entries(features)}
    return [score for feature in features for score in feature.scores(view, rows, others)]


def shown_quantile(features: Sequence[Feature]) -> float | None:
    """Return the largest -log p of a class in the sets that predictions show, None for no sets."""
    return max((of.quantile for of in features if of.quantile is not None), default=None)
