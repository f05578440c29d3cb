"""Low-rank adaptation methods for any timm model and any Hugging Face causal LM.

    import timm, vismt

    model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
    report = vismt.adapt(model, "lora", targets=["qkv"], rank=8, also_train=["head"])   # in place
    ...                                       # your training loop
    vismt.save_adapter(model, "adapter")
    vismt.merge(model)                        # stock classes and keys again

`adapt`, `merge`, `unadapt`, `save_adapter`, `load_adapter`, `export_peft` and `import_peft` work on a model of yours.
`evaluate_fewshot`, `audit`, `meta_tune` and `train` run whole studies and return a `StudyResults`. Printing a `StudyResults`
gives a table, and its method `.report()` writes a page. `predict` answers new images or texts with the trained models. `verify`
returns a `Verdict` on an adapter folder or a checkpoint. `compare` compares predictions of any programs. A mistake that the
user can fix raises a `UserError`. Public names are imported when they are first used, so that `import vismt` loads no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vismt import llm as llm
    from vismt import lowrank as lowrank
    from vismt import metatune as metatune
    from vismt import multitask as multitask
    from vismt import robustness as robustness
    from vismt.api import audit as audit
    from vismt.api import compare as compare
    from vismt.api import evaluate_fewshot as evaluate_fewshot
    from vismt.api import meta_tune as meta_tune
    from vismt.api import predict as predict
    from vismt.api import train as train
    from vismt.base.errors import UserError as UserError
    from vismt.jobs.study_results import StudyResults as StudyResults
    from vismt.lowrank.files.peft_folder import export_peft as export_peft
    from vismt.lowrank.files.peft_folder import import_peft as import_peft
    from vismt.lowrank.files.save_load import load_adapter as load_adapter
    from vismt.lowrank.files.save_load import save_adapter as save_adapter
    from vismt.lowrank.model.merge import merge as merge
    from vismt.lowrank.model.named import activate as activate
    from vismt.lowrank.model.named import disabled as disabled
    from vismt.lowrank.model.named import remove as remove
    from vismt.lowrank.model.named import unadapt as unadapt
    from vismt.lowrank.model.status import status as status
    from vismt.lowrank.recompute import recompute as recompute
    from vismt.methods import adapt as adapt
    from vismt.methods import list_methods as list_methods
    from vismt.verification.verify import Verdict as Verdict
    from vismt.verification.verify import verify as verify

from vismt.base.exports import exports
from vismt.base.registry import PLACES

__version__ = "0.1.0"

# The modules that define the adapter modules, by the names that adapter files use.
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
# The modules that register the methods. Installed packages add methods by entry points of the group "vismt.methods".
PLACES["methods"] = {
    "amt": "vismt.metatune.amt.method",
    "corda": "vismt.llm.corda.method",
    "emtal": "vismt.multitask.emtal.method",
    "full": "vismt.llm.plain_tuning",
    "head": "vismt.llm.plain_tuning",
    "ilora": "vismt.llm.ilora.method",
    "lisa": "vismt.llm.lisa.method",
    "lora": "vismt.llm.lora",
    "mtlora": "vismt.multitask.mtlora.method",
    "peft:": "vismt.llm.peft_tuners.method",
    "pissa": "vismt.llm.pissa.method",
    "polar": "vismt.llm.polar.method",
    "s2ft": "vismt.llm.s2ft.method",
}
# Earlier names of methods and adapter modules that adapter files may still hold.
PLACES["earlier names in files"] = {
    "moe_lora": "emtal",
    "vismt.multitask.moefied:MoEfiedMlp": "moefied_ffn",
    "vismt.llm.ilora:InstanceGate": "instance_gate",
}

__getattr__, __dir__ = exports(__name__, classes=False)
