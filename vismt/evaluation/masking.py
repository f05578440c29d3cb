"""Whether an attack at growing radii follows honest gradients (vismt/robustness/masking.py): `evaluate.masking`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vismt.evaluation.sections import FEATURES
from vismt.uncertainty.features import PIXELS, RADII, Feature, Lines, View

_TYPES = {
    "epsilons": list[float],
    "accuracies": list[float],
    "chance": float,
    "n": int,
    "norm": str,
    "unit": str,
    "verdict": str,
}
_NOTE = (
    "An attack runs at growing radii. On sets of images it is the first attack of the evaluation. On episodes it is PGD-10, on "
    "the first episodes of each set. With honest gradients the accuracy does not rise with the radius and ends at chance, within "
    "the noise of the examples. If the check fails, the accuracies under attack do not measure robustness. The verdict ends with "
    "the accuracy under this attack minus the accuracy under `strong` at the same radius."
)


def _line(view: View) -> dict[str, Any]:
    check = view.by_radius()
    return {**vars(check), "unit": view.unit, "verdict": check.verdict()}


def _cells(line: Mapping[str, Any]) -> dict[str, str]:
    from vismt.robustness.attacks.attacks import radius_text

    norm = "" if line["norm"] == "linf" else f"{line['norm']} "
    radii = [f"{norm}{radius_text(line['norm'], radius)}" if radius else "clean" for radius in line["epsilons"]]
    shares = dict(zip((*radii, "chance"), (*line["accuracies"], line["chance"]), strict=True))
    texts = {head: f"{100 * share:.1f}" for head, share in shares.items()}
    return {**texts, f"n ({line['unit']})": str(line["n"]), "Verdict": line["verdict"]}


@FEATURES.register("masking")
class Masking(Feature):
    """The accuracy by radius, and what is wrong with it."""

    key, needs = "masking", frozenset({PIXELS, RADII})
    meaning = (
        "whether an attack also runs at growing radii. On cards it is the first attack, on few-shot tasks PGD on the first "
        "masking_episodes episodes of each set."
    )
    lines = Lines("Gradient masking", "By radius, accuracy in %", _TYPES, _NOTE, _line, _cells)
