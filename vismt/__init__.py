"""vismt: low-rank adaptation methods for any timm ViT and any Hugging Face causal LM.

Public names are imported when they are first used, so that `import vismt` loads no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vismt import llm, lowrank, metatune, multitask, robustness
    from vismt.api import audit, evaluate_fewshot, meta_tune, predict, train
    from vismt.base.errors import UserError
    from vismt.jobs.study_results import StudyResults
    from vismt.lowrank.files.peft_folder import export_peft, import_peft
    from vismt.lowrank.files.save_load import load_adapter, save_adapter
    from vismt.lowrank.model.merge import merge
    from vismt.lowrank.model.mixed import adapters_per_sample
    from vismt.lowrank.model.named import activate, disabled, remove, unadapt
    from vismt.lowrank.model.status import status
    from vismt.lowrank.recompute import recompute
    from vismt.methods import adapt, list_methods
    from vismt.verification.verdict import Verdict
    from vismt.verification.verify import verify

from vismt.base.exports import exports
from vismt.base.registry import PLACES

__version__ = "0.1.0"

__all__ = [
    "StudyResults",
    "UserError",
    "Verdict",
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
    "predict",
    "recompute",
    "remove",
    "robustness",
    "save_adapter",
    "status",
    "train",
    "unadapt",
    "verify",
]

# The modules that hold the parts of an adapter, by the names that adapter files use.
PLACES["adapter_modules"] = {
    "expert_pairs": "vismt.multitask.emtal.expert_pairs",
    "hosted": "vismt.llm.peft_tuners.layer",
    "instance_gate": "vismt.llm.ilora.method",
    "low_rank": "vismt.lowrank.layers.low_rank",
    "moefied_ffn": "vismt.multitask.emtal.ffn",
    "quantized": "vismt.llm.pissa.quantized",
    "slice": "vismt.llm.s2ft.layer",
    "task_block": "vismt.multitask.mtlora.layers",
    "task_linear": "vismt.multitask.mtlora.layers",
}
# The modules that register the methods; installed packages add theirs by entry points of the group "vismt.methods".
PLACES["methods"] = {
    "amt": "vismt.metatune.amt.method",
    "corda": "vismt.llm.corda.method",
    "emtal": "vismt.multitask.emtal.method",
    "ilora": "vismt.llm.ilora.method",
    "lisa": "vismt.llm.lisa.method",
    "lora": "vismt.llm.lora",
    "mtlora": "vismt.multitask.mtlora.method",
    "peft:": "vismt.llm.peft_tuners.method",
    "pissa": "vismt.llm.pissa.method",
    "polar": "vismt.llm.polar.method",
    "s2ft": "vismt.llm.s2ft.method",
}
# The present names of methods that earlier adapters and configurations call otherwise.
PLACES["renamed methods"] = {"moe_lora": "emtal"}

__getattr__, __dir__ = exports(__name__)
