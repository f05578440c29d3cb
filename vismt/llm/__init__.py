"""Methods for language models and timm ViTs: initialisers, PoLAR, iLoRA, LISA, S2FT, and Bayesian last layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.llm.corda.covariance import collect_covariance
    from vismt.llm.corda.files import load_covariances, save_covariances
    from vismt.llm.ilora.method import gate_of, instance_gates, recompute_gates
    from vismt.llm.lisa.method import LISA
    from vismt.llm.polar.landing import Landing, orthonormalize_
    from vismt.llm.polar.stiefel import landing_field
    from vismt.llm.s2ft.method import check_slices
    from vismt.llm.s2ft.selection import UnitSelection, select_units
    from vismt.llm.s2ft.slices import read_slices, switch
    from vismt.uncertainty.laplace import Laplace, fit_laplace
    from vismt.uncertainty.temperature import fit_temperature
    from vismt.uncertainty.vbll import VBLLClassifier, alternating_loss

__all__ = [
    "LISA",
    "Landing",
    "Laplace",
    "UnitSelection",
    "VBLLClassifier",
    "alternating_loss",
    "check_slices",
    "collect_covariance",
    "fit_laplace",
    "fit_temperature",
    "gate_of",
    "instance_gates",
    "landing_field",
    "load_covariances",
    "orthonormalize_",
    "read_slices",
    "recompute_gates",
    "save_covariances",
    "select_units",
    "switch",
]

__getattr__, __dir__ = exports(__name__)
