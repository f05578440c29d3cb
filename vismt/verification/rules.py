"""The conditions of a folder that matter to a library that loads it (a reader). _RULES has one rule for each condition.

Each rule was run with the library (libraries.py has the versions). A rule with a code is a finding of `vismt verify`. An
effect on a reader is one word. A reader that a rule does not name uses the tensors.

refused    the reader raises an error
ignored    the tensors change nothing
misread    the tensors are applied to another weight, or without parts that belong to them
note       the tensors are used, under the condition that the fix names
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vismt.lowrank.files.facts import PEFT_PREFIX, TENSORS, ModuleFacts, Stored, tuner_prefixes
from vismt.lowrank.files.peft_layouts import names_stack
from vismt.lowrank.files.peft_settings import BIASES, PEFT_STARTS, texts
from vismt.storage.files import DTYPES, JsonObject
from vismt.verification.checkpoints import EARLIER, Located, Translated, shape_of, unheld
from vismt.verification.facts import (
    INDEX,
    LEGACY_WEIGHTS,
    MERGE_COMMAND,
    TABLES,
    WEIGHTS,
    Facts,
    Finding,
    Level,
    shorten_names,
)

# Tuners that transformers' load_adapter cannot put into a model: of prompts, and with tensors that their layers share.
OF_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
OF_PEFT_MODELS = OF_PROMPTS | {"ADAPTION_PROMPT", "CARTRIDGE", "SHADOW", "VERA", "PVERA", "VBLORA", "TINYLORA"}
OF_PEFT_MODELS |= {"UNILORA", "FROD"}
# transformers leaves the name of the bare model out, or adds it inside a class with a head.
WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "BOOL")
_BARE = {f"without '{name}.'" for name in ("model", "transformer", "base_model", "vit", "bert", "gpt_neox")}
# Whether the folder meets the rule, or the names of tensors that meet it, or paths of modules that the file lacks.
FolderTest = Callable[["FolderCase"], "bool | Collection[str]"]


@dataclass(frozen=True)
class Rule:
    """A condition and what it means.

    why: Reason in words, with {case}, {module} (the first module that meets the condition) and the shapes of its {update} and
    {weight} to be filled in. effects: Effect by reader. code, level: Code and level of the finding. Without a code
    there is no finding.
    """

    when: FolderTest
    why: str
    effects: Mapping[str, str] = field(default_factory=dict)
    fix: str = ""
    code: str = ""
    level: Level = "broken"


@dataclass(frozen=True)
class FolderCase:
    """A folder, the places of its modules in its base (if the base is known), and the model of a checkpoint's library."""

    facts: Facts
    base: Located | None = None
    whole: Translated | None = None

    @property
    def lora(self) -> bool:
        """Whether it is a LoRA of peft."""
        return self.facts.kind == "peft" and self.facts.tuner in ("LORA", "")

    @property
    def beyond_low_rank(self) -> bool:
        """Whether it is an adapter of vismt with layers that are more than a low-rank update of one weight."""
        return any(spec.has_weight and spec.layer.export_refusal for spec in self.facts.specs.values())

    @property
    def exports(self) -> bool:
        """Whether it is an adapter of vismt that export_peft takes."""
        return self.facts.kind == "vismt" and bool(self.facts.modules) and not self.beyond_low_rank

    @property
    def configs(self) -> list[JsonObject]:
        """Return config.json of the folder and of the base."""
        return [self.facts.model_config, self.base.facts.model_config if self.base else {}]

    @property
    def timm(self) -> bool:
        """Whether a model of timm is adapted or stored."""
        library = self.facts.config.get("auto_mapping")
        parent = library.get("parent_library") if isinstance(library, dict) else None
        return str(parent).startswith("timm") or any("architecture" in config for config in self.configs)


@dataclass(frozen=True)
class Met:
    """A rule that a folder meets, with the names of the tensors or modules. Empty if the folder as a whole meets the rule."""

    rule: Rule
    names: list[str]
    why: str
    whole: bool


def met_rules(case: FolderCase) -> Iterable[Met]:
    """Yield the rules that a folder meets, with their reasons filled in."""
    facts = case.facts
    for rule in _RULES:
        names = rule.when(case)
        if names is True:
            yield Met(rule, list(facts.tensors) or [str(facts.folder)], rule.why, True)
        elif names:
            first = next((module for module in facts.modules.values() if set(of_modules([module])) & set(names)), None)
            update = first and shape_of(first)
            weight = first and case.base and case.base.shape(first.path)
            why = rule.why.format(case=case, module=first, update=update, weight=weight)
            yield Met(rule, list(names), why, False)


def findings_of(case: FolderCase) -> Iterable[Finding]:
    """Yield the rules with a code that a folder meets."""
    tensors, modules = case.facts.tensors, case.facts.modules
    for met in met_rules(case):
        code, level, fix = met.rule.code, met.rule.level, met.rule.fix
        paths = tuple(dict.fromkeys((name in tensors and tensors[name].path) or name for name in met.names))
        if code and met.whole:
            yield Finding(level, code, met.why, fix)
        elif code:
            count = f" ({len(paths)} of {len(modules)} modules)" if modules.keys() & paths else ""
            yield Finding(level, code, f"{shorten_names(paths)}: {met.why}{count}", fix, paths)


def of_modules(modules: Iterable[ModuleFacts]) -> list[str]:
    """Return the names of the tensors of modules."""
    return [tensor.name for module in modules for tensor in module.tensors.values()]


def _tensors(test: Callable[[FolderCase, Stored], object]) -> FolderTest:
    """Return a condition of single tensors of an adapter."""
    return lambda case: [
        tensor.name for tensor in case.facts.tensors.values() if case.facts.is_adapter and test(case, tensor)
    ]


def _modules(test: Callable[[FolderCase, ModuleFacts], object]) -> FolderTest:
    return lambda case: of_modules(module for module in case.facts.modules.values() if test(case, module))


def _lacks(*keys: str) -> FolderTest:
    return lambda case: case.facts.kind == "peft" and any(key not in case.facts.config for key in keys)


def _odd(key: str, known: Collection[object]) -> FolderTest:
    """Return the condition of a setting of a LoRA that has another value than the known ones."""
    return lambda case: case.lora and key in case.facts.config and case.facts.config[key] not in known


def _other_tuner(case: FolderCase) -> bool:
    """Return whether the tensors are a LoRA's, and the settings name a tuner with tensors of other names."""
    own, names = tuner_prefixes().get(case.facts.tuner, "lora_"), list(case.facts.tensors)
    return own != "lora_" and any(".lora_A" in name for name in names) and not any(own in name for name in names)


def _start(*names: str) -> FolderTest:
    return lambda case: case.lora and str(case.facts.config.get("init_lora_weights", True)).lower().startswith(names)


def _role(role: str, flag: str, on: bool) -> FolderTest:
    """Return the condition of tensors of a role where a setting is on, or off."""
    return _tensors(lambda case, tensor: tensor.role == role and case.lora and bool(case.facts.config.get(flag)) is on)


def _names(pattern: str) -> FolderTest:
    """Return the condition of tensors of a checkpoint by their names."""
    return lambda case: [
        name for name in case.facts.tensors if case.facts.kind == "checkpoint" and re.search(pattern, name)
    ]


# ---- modules
def _old(case: FolderCase, module: ModuleFacts) -> bool:
    return module.path.endswith(".model")


def _absent(case: FolderCase, module: ModuleFacts) -> bool:
    """Return whether the base lacks a module.

    Experts and tied heads have other names in files than in models. Replicated layers, and modules that a tuner without a rank
    adds, are in no base.
    """
    if case.base is None or not case.base.lacks(module.path):
        return False
    made = case.facts.config.get("layer_replication") or not module.rank
    return not made and not re.search(r"\.experts\b|(^|\.)lm_head$", module.path)


def _outside(case: FolderCase, module: ModuleFacts) -> bool:
    """Return whether the settings do not name a module."""
    settings = case.facts.settings
    if settings is None or settings.names(module.named) or _old(case, module):
        return False
    if case.facts.config.get("ensure_weight_tying") and f".{module.path}.weight".endswith(TABLES):
        return False  # peft adapts what is tied to a target
    return not names_stack(settings.stack_owners, module.key)


def _other_rank(case: FolderCase, module: ModuleFacts) -> bool:
    """Return whether the rank of the factors differs from the settings. peft stacks the factors of experts."""
    stacks = case.facts.settings.stack_owners if case.facts.settings else ()
    differs = None not in (module.rank, module.declared) and module.rank != module.declared
    return differs and not names_stack(stacks, module.key)


def _transposed(case: FolderCase, module: ModuleFacts) -> bool:
    pair = [module.tensors.get("A"), module.tensors.get("B")]
    return (
        _other_rank(case, module)
        and all(part is not None and len(part.shape) == 2 for part in pair)
        and pair[0].shape[1] == module.declared  # type: ignore[union-attr]
    )


def _not_held(case: FolderCase) -> list[str]:
    """Return the modules that the settings name and the file lacks: modules of the base, or modules listed by path."""
    settings = case.facts.settings
    found = set(unheld(case.facts, case.base)) if case.base else set()
    if settings and isinstance(settings.target_modules, list) and _every_layer(case):
        listed = {name for name in settings.target_modules if re.search(r"\.\d+\.", name)}
        found |= listed - case.facts.modules.keys()
    return sorted(found)


def _every_layer(case: FolderCase) -> bool:
    settings = case.facts.settings
    return settings is not None and settings.layers_to_transform is None and not settings.exclude_modules


def _gaps(case: FolderCase) -> list[str]:
    """Return the modules without factors in a layer, although most layers have factors for them."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for path in case.facts.modules if _every_layer(case) and not _not_held(case) else ():
        number = re.search(r"\.(\d+)\.", path)
        if number:
            layers[re.sub(r"\.\d+\.", ".*.", path, count=1)][int(number[1])] = path
    every = {number for found in layers.values() for number in found}
    return [
        stem.replace("*", str(number), 1)
        for stem, found in layers.items()
        for number in sorted(every - found.keys())
        if 2 * len(found) > len(every)
    ]


# ---- whole parameters
def _biases_lost(case: FolderCase) -> list[str]:
    """Return the biases of the base that the settings save, if the file has no biases."""
    kind = case.facts.config.get("bias", "none")
    if (
        case.base is None
        or not case.lora
        or any(tensor.path.endswith("bias") for tensor in case.facts.with_role("saved"))
    ):
        return []
    own = {f"{path}.bias" for path in case.facts.modules}
    biases = [name for name in case.base.facts.tensors if name.endswith(".bias")]
    return [name for name in biases if kind == "all" or (kind == "lora_only" and name in own)]


def _not_saved(case: FolderCase) -> list[str]:
    """Return the modules that the settings save and the file lacks. peft names the heads of all its models for one head."""
    held = [tensor.path for tensor in case.facts.with_role("saved")]
    listed = texts(case.facts.settings.modules_to_save) if case.facts.settings else []
    lost = [name for name in listed if not any(f"{name}." in path for path in held)]
    library = case.base.library if case.base else None
    if library is not None:
        return [name for name in lost if any(f".{name}." in f".{weight}" for weight in library.shapes)]
    heads = _HEADS if {*_HEADS} <= {*listed} and not {*_HEADS} <= {*lost} else ()
    return [name for name in lost if name not in heads]


# ---- checkpoints
def _whole(names: Callable[[Translated], list[str]]) -> FolderTest:
    return lambda case: names(case.whole) if case.whole is not None else []


def _unused(whole: Translated) -> list[str]:
    """Return the weights of the file that look like weights of the model's layers, but that the model does not have."""
    stems = {re.sub(r"\d+", "*", name) for name in (whole.library.shapes if whole.library else ())}
    return [name for name in whole.unknown if re.sub(r"\d+", "*", name) in stems]


def _wrapped(case: FolderCase) -> list[str]:
    """Return the tensors with prefixes that training wrappers give. timm removes such prefixes at the start of names."""
    if not case.facts.is_adapter and (case.timm or not case.facts.model_config):
        return []
    names = {name: name.removeprefix(PEFT_PREFIX) if case.facts.is_adapter else name for name in case.facts.tensors}
    return [name for name, inner in names.items() if re.search(_WRAPPERS, inner)]


_FACTORS = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}
# What peft takes: the beginnings of starts, and tasks.
INITIAL = (*PEFT_STARTS, "pissa", "corda", "olora", "loftq", "lora_ga", "true", "false", "none")
_TASKS = (None, "", "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_TOKENS = "trainable_token_indices"
_HEADS = ("classifier", "score")
_WRAPPERS = r"^(module|base_model\.model)\.|(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
CONVERT = "write a plain LoRA with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
_MERGE = f"merge it into its base: {MERGE_COMMAND}"
LOAD = "load it with vismt.load_adapter"
AGAIN = "save the adapter again"
_BASE = "give the base it was trained on"
_REFUSED = {"peft": "refused", "transformers": "refused"}
_IGNORED = {"peft": "ignored", "transformers": "ignored"}
MISREAD = {"peft": "misread", "transformers": "misread"}

# fmt: off
_RULES = (
    # files and settings
    Rule(lambda case: case.facts.kind == "none", "the folder holds no adapter and no checkpoint",
         _REFUSED | {"timm": "refused"}, "give the folder with adapter_config.json or adapter.json", "no-adapter"),
    Rule(lambda case: case.exports, "it is in the format of vismt", _REFUSED,
         "write it in peft's: vismt export RUN --format peft, or vismt.export_peft"),
    Rule(lambda case: case.facts.kind == "vismt" and not case.exports, "it is in the format of vismt", _REFUSED, LOAD),
    Rule(lambda case: case.facts.is_adapter and not case.beyond_low_rank, "timm reads no adapters", {"timm": "refused"}, _MERGE),
    Rule(lambda case: case.beyond_low_rank, "timm reads no adapters", {"timm": "refused"}, LOAD),
    Rule(lambda case: case.facts.kind == "peft" and not case.facts.tensors, "it has no tensors that can be read",
         _REFUSED, AGAIN),
    Rule(_lacks("peft_type"), "adapter_config.json has no peft_type", _REFUSED, "add the peft_type"),
    Rule(_other_tuner, "peft_type names another tuner: the tensors are a LoRA's, and that tuner reads none of them", _IGNORED,
         "set peft_type to the tuner of the training", "tuner"),
    Rule(lambda case: case.facts.tuner == "XLORA" and not case.facts.config.get("adapters"),
         "an X-LoRA mixes the adapters that its settings name, and they name none", _REFUSED, "add the adapters", "setting"),
    Rule(_odd("bias", BIASES), "bias is none of " + ", ".join(BIASES), _REFUSED,
         "set it to the value of the training", "setting"),
    Rule(_odd("task_type", _TASKS), "peft knows no such task_type", _REFUSED, "set task_type to null", "setting"),
    Rule(lambda case: case.lora and not str(case.facts.config.get("init_lora_weights", True)).lower().startswith(INITIAL),
         "peft knows no such init_lora_weights", _REFUSED, "set init_lora_weights to true", "setting"),
    Rule(lambda case: case.lora and any(case.facts.config.get(key, {}) is None for key in ("rank_pattern", "alpha_pattern")),
         "rank_pattern or alpha_pattern is null", _REFUSED, "set it to {}", "setting"),
    Rule(lambda case: case.facts.kind == "peft" and TENSORS not in case.facts.files,
         "its tensors are not in a safetensors file",
         {"transformers": "note"}, "load_adapter(..., use_safetensors=False)"),
    Rule(lambda case: case.facts.tuner in OF_PEFT_MODELS, "load_adapter does not take this tuner",
         {"transformers": "refused"}, "load it with peft.PeftModel"),
    Rule(lambda case: case.facts.kind == "peft" and case.timm, "models of timm have no load_adapter",
         {"transformers": "refused"}, "load it with peft.PeftModel"),
    Rule(lambda case: case.facts.is_adapter and "model_type" in case.facts.model_config
         and any(re.fullmatch(r"(model.*\.safetensors|pytorch_model.*\.bin)", name) for name in case.facts.files),
         "a model's weights are beside the adapter: from_pretrained adds the update to them, twice if they are merged",
         {"transformers": "note"}, "keep adapter and merged model in two folders", "adapter-beside-model", "suspicious"),
    # names
    Rule(_tensors(lambda case, tensor: case.facts.kind == "peft" and tensor.role != "shared"
                  and case.facts.tuner not in OF_PROMPTS and not tensor.name.startswith(PEFT_PREFIX)),
         f"the names lack '{PEFT_PREFIX}'", {"peft": "ignored"}, f"put '{PEFT_PREFIX}' before every name", "prefix"),
    Rule(_tensors(lambda case, tensor: tensor.adapter == "default"),
         "the names hold 'default', the adapter's name, which only peft reads",
         {"transformers": "ignored"}, "take '.default' out of the names", "adapter-name", "suspicious"),
    Rule(_tensors(lambda case, tensor: tensor.adapter not in ("", "default")),
         "the names hold the name of an adapter", _IGNORED, "take the name out", "adapter-name"),
    Rule(_modules(_old), "the names have '.model' of an old peft",
         _IGNORED, "write '.lora_' for '.model.lora_'"),
    Rule(_wrapped, "the names have the prefix of a wrapper of training (torch.compile, DDP, FSDP, peft)",
         _IGNORED, "take the prefix out of the names", "wrapped"),
    # transformers finds a model by its type where the paths only lack, or have, the name of the bare model
    Rule(_modules(lambda case, module: case.base and case.base.change == EARLIER and module.path in case.base.names
                  and f"{module.path}.weight" not in case.base.facts.tensors),
         "an earlier transformers named the modules so; the present one finds them in some models only",
         fix="load it with the transformers it was trained with", code="earlier-names", level="suspicious"),
    Rule(_modules(lambda case, module: case.base and case.base.change and case.base.change != EARLIER
                  and module.path in case.base.names
                  and not (case.base.change in _BARE and case.base.facts.config.get("model_type"))),
         "the base has these modules only {case.base.change} in their paths",
         _IGNORED, "rename the adapter's tensors in this way", "prefix"),
    Rule(_modules(lambda case, module: case.base and module.path not in case.base.names and not case.base.lacks(module.path)),
         "the base has other names, and it is not known what they become in its model",
         fix="give a folder with config.json", code="not-compared", level="suspicious"),
    Rule(_modules(_absent), "the base has no such modules", _IGNORED, _BASE,
         "not-in-base"),
    # modules and shapes
    Rule(_modules(_outside), "target_modules do not name these modules", _IGNORED, "name them in target_modules"),
    Rule(_not_held, "target_modules name these modules, and the file holds no factors of them",
         _IGNORED, AGAIN, "missing-module"),
    Rule(_gaps, "the file has factors of such modules in most layers, and none of these; --base shows whether the model has them",
         code="gap", level="note"),
    Rule(_modules(lambda case, module: module.unpaired), "one of the two factors is missing",
         _IGNORED, AGAIN, "unpaired"),
    Rule(_modules(lambda case, module: _other_rank(case, module) and not _transposed(case, module)),
         "'{module.path}' has rank {module.rank} in the file and {module.declared} in the settings",
         _REFUSED,
         "set r, or rank_pattern, to the rank of the tensors; the scale alpha / r depends on it", "rank"),
    Rule(_modules(_transposed), "the factors are stored transposed", _REFUSED,
         "export the adapter again", "transposed"),
    Rule(_modules(lambda case, module: case.base and case.base.misfits(module, case.facts.kind == "peft")
                  and ".experts" not in module.path),
         "the update of '{module.path}' is {update}, the base's weight {weight}",
         _REFUSED, _BASE, "shape"),
    Rule(_tensors(lambda case, tensor: tensor.role in _FACTORS and tensor.dtype in WHOLE_NUMBERS),
         "the factors are whole numbers, which are read without their scale", MISREAD, AGAIN, "dtype"),
    Rule(_tensors(lambda case, tensor: tensor.role in _FACTORS and tensor.dtype not in {*WHOLE_NUMBERS, *DTYPES.values()}),
         "no reader takes factors of this type as they are", fix=AGAIN, code="dtype"),
    # variants
    Rule(_role("magnitude", "use_dora", True), "load_adapter renames no magnitudes of DoRA: they keep their first values",
         {"transformers": "ignored"}, "load it with peft.PeftModel"),
    Rule(_role("magnitude", "use_dora", False), "the file has magnitudes of DoRA, and use_dora is not set", _IGNORED,
         "set use_dora", "dora"),
    Rule(_modules(lambda case, module: case.lora and case.facts.config.get("use_dora") and "magnitude" not in module.tensors),
         "use_dora is set, and the file lacks magnitudes", MISREAD, AGAIN, "dora"),
    Rule(_role("bias", "lora_bias", False), "the file has biases of B, and lora_bias is not set", _IGNORED, "set lora_bias",
         "lora-bias"),
    Rule(_tensors(lambda case, tensor: case.lora and tensor.role == "other"), "no variant of LoRA has such tensors",
         code="unknown-tensors", level="suspicious"),
    Rule(_not_saved, "modules_to_save names them, and the file does not hold them",
         {"peft": "refused", "transformers": "ignored"}, AGAIN, "head-lost"),
    Rule(_biases_lost, "the settings save biases, and the file holds none: they stay the base's", MISREAD, AGAIN, "head-lost"),
    Rule(lambda case: case.base is None and case.lora and case.facts.config.get("bias", "none") != "none"
         and not any(tensor.path.endswith("bias") for tensor in case.facts.with_role("saved")),
         "the settings save biases, and the file holds none; --base shows whether the model has any", code="gap", level="note"),
    Rule(lambda case: [_TOKENS] * (case.lora and bool(case.facts.config.get(_TOKENS)) and not case.facts.with_role("tokens")),
         "trainable_token_indices names rows of an embedding, and the file does not hold them",
         {"peft": "refused", "transformers": "ignored"}, AGAIN, "head-lost"),
    Rule(lambda case: [tensor.name for tensor in case.facts.unlisted() if not tensor.path.endswith(TABLES)],
         "the settings do not name them: they replace the base's parameters, also while the adapter is disabled",
         {"peft": "note", "transformers": "note"}, "name them in modules_to_save", "unnamed-parameter", "suspicious"),
    Rule(lambda case: case.lora and case.facts.config.get("lora_alpha") == 0, "lora_alpha is 0: the update is multiplied by 0",
         _IGNORED, "set lora_alpha to the value of the training", "alpha-zero"),
    Rule(lambda case: case.facts.settings is not None and bool(case.facts.settings.use_rslora)
         and case.facts.settings.lora_alpha == case.facts.settings.r > 1,
         "use_rslora with lora_alpha = r: the update is multiplied by sqrt(r); peft's add_weighted_adapter writes "
         "this by mistake (reported, peft#3761)", fix="compare with --merged, or the adapters that it was made from",
         code="rslora-alpha", level="note"),
    Rule(_start("corda", "loftq"), "the start needs data that the folder does not hold", _REFUSED, CONVERT),
    Rule(_modules(lambda case, module: case.lora and case.facts.config.get("use_rslora")
                  and re.search(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$", module.path)),
         "the reader fuses these experts, and their update becomes √2 too large with use_rslora",
         MISREAD, "set use_rslora to false and lora_alpha to lora_alpha·√r"),
    # checkpoints
    Rule(lambda case: case.facts.kind == "checkpoint",
         "it is a whole checkpoint", {"peft": "refused"}, "load it with the library of its model"),
    Rule(lambda case: case.facts.kind == "checkpoint" and bool(case.facts.model_config) and not case.timm,
         "it is not a model of timm", {"timm": "refused"}),
    Rule(_names(r"\.base_layer\.|\.lora_|\.modules_to_save\."), "the update was not merged: the file has the modules of peft",
         {"transformers": "misread"} | {"timm": "refused"}, "call merge_and_unload before saving", "unmerged"),
    Rule(_names(r"^base_model\."), "the names have the prefix of peft", {"transformers": "misread"} | {"timm": "refused"},
         f"take '{PEFT_PREFIX}' out"),
    Rule(_whole(lambda whole: whole.lacking), "the model has these weights and the file does not: they are initialised at random",
         {"transformers": "misread"}, "save the whole model under the names of its library", "lacking"),
    Rule(_whole(lambda whole: whole.misfits), "config.json says another shape", _REFUSED, "take config.json from the base",
         "shape"),
    Rule(_whole(_unused), "the model of config.json has no such layers: they are left out", {"transformers": "ignored"},
         "take config.json from the base", "config"),
    Rule(lambda case: case.facts.kind == "checkpoint" and "config.json" in case.facts.files
         and "model_type" in case.facts.model_config
         and not {WEIGHTS, *INDEX, *LEGACY_WEIGHTS} & {*case.facts.files},
         f"it has no '{WEIGHTS}' and no index of shards, which transformers looks for", _REFUSED, "save the model again",
         "file-names", "suspicious"),
    Rule(lambda case: case.facts.kind == "checkpoint" and {*INDEX} & {*case.facts.files} and WEIGHTS in case.facts.files,
         f"'{WEIGHTS}' is beside the shards of an index: transformers takes it and leaves the shards", {"transformers": "note"},
         "remove the one that is not meant", "two-sets", "suspicious"),
    Rule(_tensors(lambda case, tensor: tensor.name in case.facts.stored.twice), "the tensor is in two files",
         code="two-sets", level="suspicious"),
)
# fmt: on
