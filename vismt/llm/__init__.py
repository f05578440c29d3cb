"""Methods for language models and timm ViTs: LoRA, PiSSA, CorDA, PoLAR, iLoRA, LISA, S2FT, and Bayesian last layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.llm.corda.covariance import collect_covariance as collect_covariance
    from vismt.llm.corda.covariance import load_covariances as load_covariances
    from vismt.llm.corda.covariance import save_covariances as save_covariances
    from vismt.llm.ilora.method import gate_of as gate_of
    from vismt.llm.ilora.method import instance_gates as instance_gates
    from vismt.llm.ilora.method import recompute_gates as recompute_gates
    from vismt.llm.lisa.method import LISA as LISA
    from vismt.llm.polar.landing import Landing as Landing
    from vismt.llm.polar.landing import orthonormalize_ as orthonormalize_
    from vismt.llm.polar.stiefel import landing_field as landing_field
    from vismt.llm.s2ft.method import check_slices as check_slices
    from vismt.llm.s2ft.selection import UnitSelection as UnitSelection
    from vismt.llm.s2ft.selection import select_units as select_units
    from vismt.uncertainty.laplace import Laplace as Laplace
    from vismt.uncertainty.laplace import fit_laplace as fit_laplace
    from vismt.uncertainty.temperature import fit_temperature as fit_temperature
    from vismt.uncertainty.vbll import VBLLClassifier as VBLLClassifier
    from vismt.uncertainty.vbll import alternating_loss as alternating_loss

__getattr__, __dir__ = exports(__name__)
