"""Methods for language models and timm ViTs: initialisers, PoLAR, iLoRA, LISA, S2FT, and Bayesian last layers."""

from vismt.llm.alternating_loss import alternating_loss
from vismt.llm.covariance import collect_covariance, covariance_ranks
from vismt.llm.covariance_files import load_covariances, save_covariances
from vismt.llm.ilora import gate_of, instance_gates, recompute_gates
from vismt.llm.landing import Landing, orthonormalize_
from vismt.llm.laplace import Laplace, fit_laplace
from vismt.llm.lisa import LISA
from vismt.llm.s2ft import check_slices
from vismt.llm.slices import add_slices, read_slices, serving, switch
from vismt.llm.temperature import fit_temperature
from vismt.llm.unit_selection import UnitSelection, select_units
from vismt.llm.vbll import VBLLClassifier
from vismt.llm.vbll_generative import GenerativeVBLL

__all__ = [
    "LISA",
    "GenerativeVBLL",
    "Landing",
    "Laplace",
    "UnitSelection",
    "VBLLClassifier",
    "add_slices",
    "alternating_loss",
    "check_slices",
    "collect_covariance",
    "covariance_ranks",
    "fit_laplace",
    "fit_temperature",
    "gate_of",
    "instance_gates",
    "load_covariances",
    "orthonormalize_",
    "read_slices",
    "recompute_gates",
    "save_covariances",
    "select_units",
    "serving",
    "switch",
]
