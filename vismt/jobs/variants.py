"""Variants of a model's outputs that are fitted on validation examples, and the file that takes a temperature into an export."""

from __future__ import annotations

import json

from vismt.stats import Condition

TEMPERED = Condition("temperature of validation", "variant", "temperature")
ADJUSTED = Condition("logit adjustment of validation", "variant", "logit adjustment")
# Of a Laplace approximation around the head, by the part of the Hessian that is kept.
LAPLACE = {
    structure: Condition(label, "variant", "Laplace")
    for structure, label in (("full", "Laplace"), ("kronecker", "Laplace (Kronecker)"), ("rows", "Laplace"))
}
TEMPERATURE_FILE = "temperature.json"
TAUS = tuple(tau / 4 for tau in range(9))  # tried factors of the log prior, 0 to 2


def temperature_file(temperature: float) -> bytes:
    """Return the content of temperature.json beside exported weights."""
    about = {"temperature": temperature, "probabilities": "softmax(logits / temperature)", "fitted_on": "validation"}
    return json.dumps(about, indent=1).encode()
