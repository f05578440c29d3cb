"""Methods of language models, for any timm ViT as well: initialisers and cores by name, and Bayesian last layers."""

from vismt.llm.alternating import alternating_loss
from vismt.llm.landing import Landing, orthonormalize_
from vismt.llm.laplace import Laplace, fit_laplace
from vismt.llm.lisa import LISA
from vismt.llm.temperature import fit_temperature
from vismt.llm.vbll import VBLLClassifier
from vismt.llm.vbll_generative import GenerativeVBLL

__all__ = [
    "LISA", "GenerativeVBLL", "Landing", "Laplace", "VBLLClassifier", "alternating_loss", "fit_laplace", "fit_temperature",
    "orthonormalize_",
]
