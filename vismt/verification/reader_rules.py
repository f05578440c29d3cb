"""What each reader does with a folder that meets a condition, as a table: one rule a condition, with the effect by reader.

An effect is one word; a reader that a rule does not name uses the tensors. A "?" marks what was reported or follows from a
reader's source and was not run: it is expected, not certain.

refused    the reader raises an error
ignored    the tensors change nothing
misread    they are applied to another weight, with another factor, or without what belongs to them
note       they are used, under the condition that the fix names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vismt.lowrank.files.peft_layouts import names_stack, stock_path
from vismt.lowrank.files.peft_settings import PeftSettings, texts
from vismt.verification.facts import PREFIX, TENSORS, Facts, ModuleFacts, TensorFacts
from vismt.verification.located import INNER, Located, unheld

# Tuners that transformers' load_adapter cannot put into a model: of prompts, and with tensors that their layers share.
OF_PEFT_MODELS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}
OF_PEFT_MODELS |= {"CARTRIDGE", "SHADOW", "VERA", "PVERA", "VBLORA", "TINYLORA", "UNILORA", "FROD"}
Condition = Callable[["Case"], Collection[str]]


@dataclass(frozen=True)
class Rule:
    """A condition and its effects. when: the names of the tensors that meet it, or paths of modules that lack their tensors."""

    when: Condition
    why: str
    effects: Mapping[str, str]
    fix: str = ""


@dataclass(frozen=True)
class Case:
    """A folder, and the places of its modules in its base where that is known."""

    facts: Facts
    base: Located | None = None

    @property
    def lora(self) -> bool:
        return self.facts.kind == "peft" and self.facts.tuner in ("LORA", "")

    @property
    def modules(self) -> Iterable[ModuleFacts]:
        """Return the modules of a LoRA of peft."""
        return self.facts.modules.values() if self.lora else ()

    @property
    def settings(self) -> PeftSettings | None:
        return self.facts.settings if self.lora else None

    @property
    def configs(self) -> list[dict[str, Any]]:
        """Return config.json of the folder and of the base."""
        return [self.facts.model_config, self.base.facts.model_config if self.base else {}]

    @property
    def timm(self) -> bool:
        """Whether a model of timm is adapted or stored."""
        library = self.facts.config.get("auto_mapping")
        parent = library.get("parent_library") if isinstance(library, dict) else None
        return str(parent).startswith("timm") or any("architecture" in config for config in self.configs)

    @cached_property
    def keys(self) -> set[str]:
        return {module.key for module in self.facts.modules.values()}

    def named(self, module: ModuleFacts) -> str:
        """Return the path by which the settings of peft name a module."""
        return stock_path(module.key, self.keys)[1]


def of_modules(modules: Iterable[ModuleFacts]) -> list[str]:
    """Return the names of the tensors of modules."""
    return [tensor.name for module in modules for tensor in module.tensors.values()]


def _folder(test: Callable[[Case], object]) -> Condition:
    """Return a condition of the whole folder, which all tensors meet."""

    def met(case: Case) -> list[str]:
        everything = list(case.facts.tensors) or list(case.facts.stored.tensors) or [str(case.facts.folder)]
        return everything if test(case) else []

    return met


def _tensors(test: Callable[[Case, TensorFacts], object]) -> Condition:
    """Return a condition of single tensors of an adapter."""
    return lambda case: [tensor.name for tensor in case.facts.tensors.values() if test(case, tensor)]


def _modules(test: Callable[[Case, ModuleFacts], object]) -> Condition:
    """Return a condition of the modules of a LoRA of peft."""
    return lambda case: of_modules(module for module in case.modules if test(case, module))


def _setting(*keys: str) -> Condition:
    return _folder(lambda case: case.lora and any(case.facts.config.get(key) for key in keys))


def _lacks(*keys: str) -> Condition:
    return _folder(lambda case: case.facts.kind == "peft" and any(key not in case.facts.config for key in keys))


def _start(*names: str) -> Condition:
    return _folder(
        lambda case: case.lora and str(case.facts.config.get("init_lora_weights", True)).lower().startswith(names)
    )


def _role(role: str, flag: str, value: bool) -> Condition:
    """Return the condition of tensors of a role where a setting is on, or off."""
    return _tensors(
        lambda case, tensor: tensor.role == role and case.lora and bool(case.facts.config.get(flag)) is value
    )


def _names(pattern: str) -> Condition:
    """Return the condition of tensors of a checkpoint by their names."""
    return lambda case: [
        name for name in case.facts.stored.tensors if case.facts.kind == "checkpoint" and re.search(pattern, name)
    ]


def _vision(case: Case) -> bool:
    return case.timm or any(
        "image_size" in made and not {"vocab_size", "text_config"} & made.keys() for made in case.configs
    )


def _beside_a_model(case: Case) -> bool:
    return (
        case.facts.is_adapter
        and "config.json" in case.facts.files
        and any(re.fullmatch(r"(model.*\.safetensors|pytorch_model.*\.bin)", name) for name in case.facts.files)
    )


def _old(case: Case, module: ModuleFacts) -> bool:
    return module.path.endswith(".model")


def _absent(case: Case, module: ModuleFacts) -> bool:
    """Return whether the base lacks a module; experts and tied heads have other names in files than in models."""
    if case.base is None or module.path in case.base.names:
        return False
    return not re.search(r"\.experts\b|(^|\.)lm_head$", module.path)


def _outside(case: Case, module: ModuleFacts) -> bool:
    """Return whether the settings do not name a module."""
    settings = case.settings
    if settings is None or settings.names(case.named(module)) or _old(case, module):
        return False
    return not names_stack(settings.target_parameters or [], module.key)


def _other_rank(case: Case, module: ModuleFacts) -> bool:
    """Return whether the rank of the factors is not that of the settings; peft stacks the factors of experts."""
    stacks = (case.settings and case.settings.target_parameters) or []
    differs = module.rank and module.declared and module.rank != module.declared
    return bool(differs) and not names_stack(stacks, module.key)


def _no_target(case: Case) -> bool:
    """Return whether the settings name no module of the base."""
    settings = case.settings
    if settings is None or settings.everywhere or settings.target_parameters or case.base is None:
        return False
    pieces = [name.split(".") for name in case.base.facts.stored.tensors]
    owners = {".".join(parts[:end]) for parts in pieces for end in range(1, len(parts))}
    return not any(settings.names(path) for path in owners)


# ---- whole parameters
def _whole(case: Case) -> dict[str, str]:
    """Return the tensors that are saved whole, by name, with their kind: copy (of an adapted embedding), norm or other."""
    kinds = {}
    for tensor in case.facts.with_role("saved"):
        copy = tensor.name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))
        norm = "_layernorm" in tensor.name or ".norm" in tensor.name
        kinds[tensor.name] = "copy" if copy else "norm" if norm else "other"
    return kinds if case.facts.kind == "peft" else {}


def _saved(*kinds: str) -> Condition:
    return lambda case: [name for name, found in _whole(case).items() if found in kinds]


def _unlisted(case: Case) -> list[str]:
    """Return parameters that the file holds and the settings do not name."""
    listed = tuple(texts(case.settings.modules_to_save)) if case.settings else ()
    return [
        name
        for name in _saved("norm", "other")(case)
        if not name.rpartition(".")[0].endswith(listed or "\n")
        and not name.endswith(".bias")
        and "trainable_tokens" not in name
    ]


def _not_saved(case: Case) -> list[str]:
    """Return the modules_to_save that the file does not hold."""
    held = [tensor.path.rpartition(".")[0] for tensor in case.facts.with_role("saved")]
    listed = texts(case.settings.modules_to_save) if case.settings and case.lora else []
    return [name for name in listed if not any(path.endswith(name) for path in held)]


PLAIN = "load it with vismt.import_peft and write it with vismt.export_peft(..., uniform=True)"
CONVERT = "write a plain LoRA with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
MERGE = "merge it into its base"
AGAIN = "save the adapter again"
BASE = "use the base it was trained on"
REFUSED = {"peft": "refused", "transformers": "refused"}
IGNORED = {"peft": "ignored", "transformers": "ignored"}
UNSERVED = {"vllm": "refused", "llama.cpp": "refused"}
UNMAPPED = {"transformers": "misread", "vllm": "refused?", "llama.cpp": "refused?"}

# fmt: off
RULES = (
    # files and settings
    Rule(_folder(lambda case: case.facts.kind == "none"), "it is neither an adapter nor a checkpoint",
         REFUSED | UNSERVED | {"timm": "refused"}),
    Rule(_folder(lambda case: case.facts.kind == "vismt"), "it is in the format of vismt", REFUSED | UNSERVED,
         "write it in peft's: vismt export RUN --format peft, or vismt.export_peft"),
    Rule(_folder(lambda case: case.facts.is_adapter), "timm reads no adapters", {"timm": "refused"}, MERGE),
    Rule(_folder(lambda case: case.facts.kind == "peft" and not case.facts.tensors), "it has no tensors that can be read",
         REFUSED | UNSERVED, AGAIN),
    Rule(_lacks("peft_type"), "adapter_config.json has no peft_type", REFUSED, "add the peft_type"),
    Rule(_lacks("r", "lora_alpha", "target_modules"), "its settings lack r, lora_alpha or target_modules", {"vllm": "refused"}),
    Rule(_lacks("lora_alpha"), "its settings lack lora_alpha", {"llama.cpp": "refused"}, "add it; 8 is what peft takes"),
    Rule(_folder(lambda case: case.facts.kind == "peft" and TENSORS not in case.facts.files),
         "its tensors are not in a safetensors file",
         {"transformers": "note"}, "load_adapter(..., use_safetensors=False)"),
    Rule(_folder(lambda case: case.facts.kind == "peft" and case.facts.tuner not in ("LORA", "")), "it is not a LoRA",
         UNSERVED, MERGE),
    Rule(_folder(lambda case: case.facts.tuner in OF_PEFT_MODELS), "load_adapter does not take this tuner",
         {"transformers": "refused"}, "load it with peft.PeftModel"),
    Rule(_folder(lambda case: case.facts.kind == "peft" and case.timm), "models of timm have no load_adapter",
         {"transformers": "refused"}, "load it with peft.PeftModel"),
    Rule(_folder(_vision), "it serves language models", UNSERVED),
    Rule(_folder(lambda case: case.facts.is_adapter and any(made.get("model_type") == "gpt2" for made in case.configs)),
         "its model of GPT-2 has no LoRA", {"vllm": "refused?"}, MERGE),
    Rule(_folder(_beside_a_model), "from_pretrained takes the weights beside it for the base: merged ones get the update twice",
         {"transformers": "note"}, "keep adapter and merged model in two folders"),
    # names
    Rule(_tensors(lambda case, tensor: case.facts.kind == "peft" and tensor.role != "shared"
                  and not tensor.name.startswith(PREFIX)),
         f"the names lack '{PREFIX}'", {"peft": "ignored"}, f"put '{PREFIX}' before every name"),
    Rule(_tensors(lambda case, tensor: tensor.adapter == "default"), "the names hold 'default', the adapter's name",
         UNSERVED | {"transformers": "ignored"},
         "take '.default' out of the names"),
    Rule(_tensors(lambda case, tensor: tensor.adapter not in ("", "default")),
         "the names hold the name of an adapter", UNSERVED | IGNORED, "take the name out"),
    Rule(_modules(_old), "the names have '.model' of an old peft",
         IGNORED | {"vllm": "refused?", "llama.cpp": "refused?"}, "write '.lora_' for '.model.lora_'"),
    Rule(_modules(lambda case, module: case.base and INNER in case.base.change and module.path in case.base.names),
         f"the base has these modules with '{INNER}' in another place",
         IGNORED | {"vllm": "ignored?", "llama.cpp": "refused?"}, f"move '{INNER}' in the names"),
    Rule(_modules(_absent), "the base has no such modules", IGNORED | {"vllm": "ignored?", "llama.cpp": "refused"}, BASE),
    # modules and shapes
    Rule(_modules(_outside), "target_modules do not name these modules", IGNORED, "name them in target_modules"),
    Rule(lambda case: unheld(case.facts, case.base) if case.base else [],
         "target_modules name modules that the file does not hold",
         IGNORED | {"vllm": "ignored", "llama.cpp": "ignored"}, AGAIN),
    Rule(_folder(_no_target), "target_modules name no module of the base", REFUSED, BASE),
    Rule(_modules(lambda case, module: module.unpaired),
         "one of the two factors is missing", IGNORED | {"vllm": "refused?", "llama.cpp": "refused"}, AGAIN),
    Rule(_modules(_other_rank), "the factors have another rank than the settings",
         REFUSED | {"vllm": "misread?", "llama.cpp": "misread?"},
         "set r, or rank_pattern, to the rank of the tensors"),
    Rule(_modules(lambda case, module: case.base and case.base.misfits(module) and ".experts" not in module.path),
         "the factors do not fit the base's weights", REFUSED | {"vllm": "misread?", "llama.cpp": "refused"}, BASE),
    Rule(_modules(lambda case, module: (module.rank or 0) > 16),
         "the rank is over the default limit of 16", {"vllm": "note"}, "start the server with --max-lora-rank"),
    Rule(_modules(lambda case, module: (module.rank or 0) > 512),
         "the rank is over the largest limit, 512", {"vllm": "refused"}, MERGE),
    # variants
    Rule(_role("magnitude", "use_dora", True), "load_adapter renames no magnitudes of DoRA: they keep their first values",
         {"transformers": "ignored"}, "load it with peft.PeftModel"),
    Rule(_role("magnitude", "use_dora", False), "use_dora is not set", IGNORED, "set use_dora"),
    Rule(_folder(lambda case: case.facts.config.get("use_dora") or case.facts.with_role("magnitude")), "it is a DoRA",
         {"vllm": "refused"}, MERGE),
    Rule(_tensors(lambda case, tensor: tensor.role == "magnitude"), "it is a DoRA", {"llama.cpp": "refused"}, MERGE),
    Rule(_modules(lambda case, module: case.facts.config.get("use_dora") and "magnitude" not in module.tensors),
         "use_dora is set, and the file lacks magnitudes", {"peft": "misread", "transformers": "misread",
         "llama.cpp": "misread"}, AGAIN),
    Rule(_role("bias", "lora_bias", False), "lora_bias is not set", IGNORED, "set lora_bias"),
    Rule(_tensors(lambda case, tensor: tensor.role == "bias"), "it has biases of B", UNSERVED, MERGE),
    Rule(_folder(lambda case: case.lora and case.facts.config.get("bias", "none") != "none"), "it has biases",
         {"vllm": "refused"}, MERGE),
    Rule(_setting("modules_to_save"), "it has parameters that are saved whole", {"vllm": "refused"}, MERGE),
    Rule(lambda case: [] if case.facts.config.get("modules_to_save") else _saved("other", "norm")(case),
         "it has parameters that are saved whole", {"vllm": "refused"}, MERGE),
    Rule(_saved("other"), "it has parameters that are saved whole", {"llama.cpp": "refused"}, MERGE),
    Rule(_saved("norm"), "it has norms that are saved whole", {"llama.cpp": "ignored"}, MERGE),
    Rule(_not_saved, "modules_to_save name modules that the file does not hold",
         {"peft": "refused", "transformers": "ignored", "llama.cpp": "ignored"}, AGAIN),
    Rule(_saved("copy"), "it has copies of embeddings", {"vllm": "note", "llama.cpp": "note"},
         "needed where the vocabulary was resized"),
    Rule(_unlisted, "the settings do not name them: they replace the base's parameters, also where the adapter is disabled",
         {"peft": "note", "transformers": "note"}, "name them in modules_to_save"),
    Rule(_folder(lambda case: case.lora and case.facts.config.get("lora_alpha") == 0), "lora_alpha is 0",
         IGNORED | {"vllm": "ignored?", "llama.cpp": "misread"}, "set lora_alpha"),
    Rule(_start("pissa", "olora", "corda", "loftq"), "the start was taken out of the base, which this reader leaves whole",
         {"vllm": "misread", "llama.cpp": "misread"}, CONVERT),
    Rule(_start("corda", "loftq"), "the start needs data that the folder does not hold", REFUSED, CONVERT),
    Rule(_setting("alora_invocation_tokens"), "it applies after certain tokens only (aLoRA)", {"vllm": "misread?"}),
    Rule(_setting("layer_replication"), "it repeats layers", {"vllm": "misread?", "llama.cpp": "misread?"}, MERGE),
    Rule(_setting("target_parameters"), "it adapts experts in one tensor", {"vllm": "note", "llama.cpp": "refused?"},
         "for models that vLLM marks as 3-D, or with enable_mixed_moe_lora_format"),
    Rule(_modules(lambda case, module: case.facts.config.get("use_rslora")
                  and re.search(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$", module.path)),
         "the reader fuses these experts, and their update becomes √2 too large with use_rslora",
         {"peft": "misread", "transformers": "misread"}, "set use_rslora to false and lora_alpha to lora_alpha·√r"),
    Rule(_modules(lambda case, module: case.base and case.base.facts.model_config.get("tie_word_embeddings")
                  and module.path.rpartition(".")[2] == "lm_head"),
         "the head is the embedding table of the base", {"llama.cpp": "refused"}, MERGE),
    # checkpoints
    Rule(_folder(lambda case: case.facts.kind == "checkpoint"),
         "it is a whole checkpoint", {"peft": "refused"}, "load it with the library of its model"),
    Rule(_folder(lambda case: case.facts.kind == "checkpoint" and case.facts.model_config and not case.timm),
         "it is not a model of timm",
         {"timm": "refused"}),
    Rule(_names(r"\.base_layer\.|\.lora_|\.modules_to_save\."), "the update was not merged: the file has the modules of peft",
         UNMAPPED | {"timm": "refused"}, "call merge_and_unload before saving"),
    Rule(_names(r"^base_model\."), "the names have the prefix of peft", UNMAPPED | {"timm": "refused"}, f"take '{PREFIX}' out"),
    Rule(_names(r"^module\."), "the names have the prefix of a parallel wrapper", UNMAPPED, "take 'module.' out of the names"),
)
# fmt: on
