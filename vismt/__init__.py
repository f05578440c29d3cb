"""vismt: low-rank adaptation methods for any timm ViT and any Hugging Face causal LM."""

from vismt import llm
from vismt.api import StudyResults, audit, evaluate_fewshot, meta_tune, train
from vismt.errors import UserError
from vismt.lowrank.inject import merge, unadapt
from vismt.lowrank.peft_folder import export_peft, import_peft
from vismt.lowrank.recompute import recompute
from vismt.lowrank.store import load_adapter, save_adapter
from vismt.methods import adapt, list_methods

__version__ = "0.1.0"

__all__ = [
    "StudyResults",
    "UserError",
    "adapt",
    "audit",
    "evaluate_fewshot",
    "export_peft",
    "import_peft",
    "list_methods",
    "llm",
    "load_adapter",
    "merge",
    "meta_tune",
    "recompute",
    "save_adapter",
    "train",
    "unadapt",
]
