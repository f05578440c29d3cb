"""vismt: low-rank adaptation methods for any timm ViT and any Hugging Face causal LM."""

from vismt import llm
from vismt.errors import UserError
from vismt.lowrank.inject import merge, unadapt
from vismt.lowrank.peft_folder import export_peft, import_peft
from vismt.lowrank.recompute import recompute
from vismt.lowrank.store import load_adapter, save_adapter
from vismt.methods import adapt, list_methods

__version__ = "0.1.0"

__all__ = [
    "UserError",
    "adapt",
    "export_peft",
    "import_peft",
    "list_methods",
    "llm",
    "load_adapter",
    "merge",
    "recompute",
    "save_adapter",
    "unadapt",
]
