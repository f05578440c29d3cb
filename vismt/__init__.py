"""vismt: low-rank adaptation methods for any timm ViT and any Hugging Face causal LM.

Public names are imported when they are first used, so that `import vismt` loads no library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vismt import llm, lowrank, metatune, multitask, robustness
    from vismt.api import audit, evaluate_fewshot, meta_tune, train
    from vismt.errors import UserError
    from vismt.lowrank.adapter_choice import adapters_per_sample
    from vismt.lowrank.inject import merge
    from vismt.lowrank.named import activate, disabled, remove, unadapt
    from vismt.lowrank.peft_folder import export_peft, import_peft
    from vismt.lowrank.recompute import recompute
    from vismt.lowrank.store import load_adapter, save_adapter
    from vismt.methods import adapt, list_methods
    from vismt.study_results import StudyResults

from vismt.registry import PLACES

__version__ = "0.1.0"

__all__ = [
    "StudyResults",
    "UserError",
    "activate",
    "adapt",
    "adapters_per_sample",
    "audit",
    "disabled",
    "evaluate_fewshot",
    "export_peft",
    "import_peft",
    "list_methods",
    "llm",
    "load_adapter",
    "lowrank",
    "merge",
    "meta_tune",
    "metatune",
    "multitask",
    "recompute",
    "remove",
    "robustness",
    "save_adapter",
    "train",
    "unadapt",
]

# The modules that hold the parts of an adapter, by the names that adapter files use.
PLACES["layers"] = {
    "expert_pairs": "vismt.multitask.expert_pairs",
    "hosted": "vismt.lowrank.hosted",
    "low_rank": "vismt.lowrank.linear",
    "quantized": "vismt.lowrank.quantized",
    "slice": "vismt.lowrank.slice_linear",
}
PLACES["wrappers"] = {"moefied_ffn": "vismt.multitask.moefied", "instance_gate": "vismt.llm.ilora"}

# Public name -> module that defines it; names of __all__ that are not here are packages of this one.
_MODULES = {
    "StudyResults": "study_results",
    "UserError": "errors",
    "activate": "lowrank.named",
    "adapt": "methods",
    "adapters_per_sample": "lowrank.adapter_choice",
    "audit": "api",
    "disabled": "lowrank.named",
    "evaluate_fewshot": "api",
    "export_peft": "lowrank.peft_folder",
    "import_peft": "lowrank.peft_folder",
    "list_methods": "methods",
    "load_adapter": "lowrank.store",
    "merge": "lowrank.inject",
    "meta_tune": "api",
    "recompute": "lowrank.recompute",
    "remove": "lowrank.named",
    "save_adapter": "lowrank.store",
    "train": "api",
    "unadapt": "lowrank.named",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vismt' has no attribute {name!r}")
    if name not in _MODULES:
        return importlib.import_module(f"vismt.{name}")
    value = getattr(importlib.import_module(f"vismt.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
