"""What a folder shows alone: settings against tensors, values, and numbers of each update, one module at a time."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.peft_settings import texts
from vismt.lowrank.tensors import FLOATING, fits
from vismt.verification.facts import Facts, ModuleFacts, TensorFacts
from vismt.verification.fit import Update
from vismt.verification.verdict import Finding, ModuleRow, names_of

TABLES = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_out.weight")  # which peft saves along
AGAIN = "save the adapter again"
SAVE_AGAIN = f"{AGAIN} from a run whose values are finite"


def update_of(facts: Facts, module: ModuleFacts) -> Update | None:
    """Return the update of a module; None where it is not a pair of factors, or the file does not determine it."""
    values = {role: facts.stored.read(tensor.name) for role, tensor in module.tensors.items()}
    known = {role: value for role, value in values.items() if value is not None and value.dtype in FLOATING}
    if len(known) < len(values) or not all(fits(value) for value in known.values()):
        return None
    try:
        if facts.kind == "vismt":
            spec = facts.specs[module.path]
            leaves = {tensor.name.rpartition(".")[2]: known[role] for role, tensor in module.tensors.items()}
            return Update(spec.layer.low_rank_of("verify", spec, leaves))
        return _of_peft(known, module.scale)
    except (UserError, RuntimeError, LookupError, AttributeError):  # a factor is missing, or its shape does not fit
        return None


def _of_peft(known: dict[str, Tensor], scale: float | None) -> Update | None:
    if scale is None or not known.keys() <= {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}:
        return None
    table = "embedding_A" in known
    B, A = (known["embedding_A"].T, known["embedding_B"].T) if table else (known["B"], known["A"])
    update = LowRank(B.flatten(1), A.flatten(1), scale=scale)
    magnitude = known.get("magnitude")
    if magnitude is None:
        return Update(update)
    return Update(update, magnitude.flatten()) if not table and magnitude.numel() == update.shape[0] else None


def examine(facts: Facts) -> tuple[list[Finding], list[ModuleRow]]:
    """Return the findings in an adapter folder alone, and a row for each module."""
    findings = [Finding("broken", "malformed", reason) for reason in facts.reasons + facts.stored.reasons]
    if not facts.modules:
        if not facts.reasons and not facts.with_role("saved"):
            findings.append(Finding("broken", "empty", "the file holds no tensor of an adapter"))
        return findings, []
    findings += [*_settings(facts), *_pairs(facts), *_gaps(facts), *_beside(facts)]
    more, rows = _values(facts)
    return findings + more, rows


def _settings(facts: Facts) -> Iterable[Finding]:
    """Yield what is wrong between adapter_config.json and the shapes of the tensors."""
    settings = facts.settings
    if facts.kind == "peft" and not facts.prefix:
        text = "the names of the tensors lack the prefix 'base_model.model.': peft loads nothing of them"
        yield Finding("broken", "prefix", text, "rename every tensor: put 'base_model.model.' before its name")
    infix = sorted({tensor.adapter for tensor in facts.tensors.values() if tensor.adapter})
    if infix:
        own = infix == ["default"]
        who = "only peft reads them" if own else "no reader finds them, peft neither"
        text = f"the adapter's name {infix[-1]!r} is in the names of tensors; {who}"
        yield Finding("suspicious" if own else "broken", "adapter-name", text, "take it out of the names")
    if settings is None:
        return
    wrong = [path for path, module in facts.modules.items() if module.rank and module.rank != module.declared]
    if wrong:
        module = facts.modules[wrong[0]]
        pair = [module.tensors.get("A"), module.tensors.get("B")]
        turned = all(part is not None and len(part.shape) == 2 for part in pair) and pair[0].shape[1] == module.declared  # type: ignore[union-attr]
        code, what = "rank", "the settings and the file disagree"
        if turned:
            code, what = "transposed", "its factors are stored transposed"
        text = f"'{wrong[0]}': rank {module.rank} in the file, {module.declared} by the settings; {what}"
        yield Finding("broken", code, text, "export the adapter again; the scale alpha / r depends on r", tuple(wrong))
    if settings.lora_alpha == 0:
        text = "lora_alpha is 0: the update is multiplied by 0"
        yield Finding("broken", "alpha-zero", text, "write the alpha it was trained with")
    if settings.use_rslora and settings.lora_alpha == settings.r and settings.r > 1:
        text = (
            f"use_rslora with lora_alpha = r = {settings.r}: the update is multiplied by sqrt(r); peft's add_weighted_adapter "
            "writes this by mistake (reported, peft#3761)"
        )
        yield Finding("note", "rslora-alpha", text, "compare with --merged, or the adapters that it was made from")


def _pairs(facts: Facts) -> Iterable[Finding]:
    """Yield modules with parts that do not belong together."""
    broken = [path for path, module in facts.modules.items() if module.unpaired]
    if broken:
        yield Finding("broken", "unpaired", f"{names_of(broken)}: one factor is missing", AGAIN, tuple(broken))
    if facts.kind == "peft" and facts.tuner == "LORA":
        dora = bool(facts.config.get("use_dora"))
        has = {path for path, module in facts.modules.items() if "magnitude" in module.tensors}
        odd = sorted(has if not dora else facts.modules.keys() - has)
        if odd:
            what = "has no magnitude, but use_dora is true" if dora else "has a magnitude, but use_dora is not set"
            yield Finding("broken", "dora", f"{names_of(odd)} {what}", "set use_dora as it was trained", tuple(odd))
        biased = [path for path, module in facts.modules.items() if "bias" in module.tensors]
        if biased and not facts.config.get("lora_bias"):
            text = f"{names_of(biased)}: the bias of lora_B is dropped, as lora_bias is not set"
            yield Finding("broken", "lora-bias", text, "set lora_bias to true", tuple(biased))
        odd = sorted({tensor.path for tensor in facts.with_role("other")})
        if odd:
            text = f"{names_of(odd)}: tensors that no variant of LoRA has"
            yield Finding("suspicious", "unknown-tensors", text, modules=tuple(odd))


def _gaps(facts: Facts) -> Iterable[Finding]:
    """Yield modules that the settings name by their path, or that other layers have, and the file has not."""
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for path in facts.modules:
        number = re.search(r"\.(\d+)\.", path)
        if number:
            layers[re.sub(r"\.\d+\.", ".*.", path, count=1)][int(number[1])] = path
    every = {number for found in layers.values() for number in found}
    settings = facts.settings
    if settings is None or settings.layers_to_transform is not None or settings.exclude_modules:
        return
    listed = {name for name in texts(settings.target_modules) if re.search(r"\.\d+\.", name)}
    absent = sorted(listed - facts.modules.keys()) if not isinstance(settings.target_modules, str) else []
    if absent:
        text = f"{names_of(absent)}: named by target_modules, but the file has no factors of it; these modules stay the base's"
        yield Finding("broken", "missing-module", text, AGAIN, tuple(absent))
        return
    gaps = [
        stem.replace("*", str(number), 1)
        for stem, found in layers.items()
        for number in sorted(every - found.keys())
        if 2 * len(found) > len(every)
    ]
    if gaps:
        text = f"{names_of(gaps)}: most layers have factors of such a module, this one has none; --base tells whether it is there"
        yield Finding("note", "gap", text, modules=tuple(gaps))


def unnamed(facts: Facts) -> list[TensorFacts]:
    """Return the whole parameters of a LoRA of peft that its settings do not name."""
    settings = facts.settings
    if settings is None:
        return []
    promised = texts(settings.modules_to_save)
    return [
        tensor
        for tensor in facts.with_role("saved")
        if not any(f".{name}." in f".{tensor.path}" for name in promised)
        and not (tensor.path.endswith("bias") and settings.bias != "none")
    ]


def _beside(facts: Facts) -> Iterable[Finding]:
    """Yield what is wrong with whole parameters, and files that change what the folder means."""
    settings = facts.settings
    saved = [tensor.path for tensor in facts.with_role("saved")]
    if settings is not None:
        promised = texts(settings.modules_to_save)
        absent = [name for name in promised if not any(f".{name}." in f".{path}" for path in saved)]
        if absent:
            text = f"modules_to_save names {names_of(absent)}, but the file has no tensor of it: a trained layer was not saved"
            yield Finding("broken", "head-lost", text, "save the adapter again with this layer, or take the name out")
        extra = [tensor.path for tensor in unnamed(facts) if not tensor.path.endswith(TABLES)]
        if extra:
            text = f"{names_of(extra)}: a whole parameter that the settings do not name; peft overwrites the base's with it"
            yield Finding("suspicious", "unnamed-parameter", text, "name it in modules_to_save", tuple(extra))
    models = [name for name in facts.files if name.startswith("model") and name.endswith(".safetensors")]
    if models and "model_type" in facts.model_config:
        text = "the folder has the weights of a model and an adapter: transformers applies the adapter to them"
        fix = "move the adapter to a folder of its own if these weights are merged"
        yield Finding("suspicious", "adapter-beside-model", text, fix)


def _values(facts: Facts) -> tuple[list[Finding], list[ModuleRow]]:
    bad: list[str] = []
    edge: list[str] = []
    zero: list[str] = []
    twins: dict[str, list[str]] = defaultdict(list)
    rows = []
    for path, module in facts.modules.items():
        row = ModuleRow(path, module.rank, module.scale)
        rows.append(row)
        values = {role: facts.stored.read(tensor.name) for role, tensor in module.tensors.items()}
        present = {role: value for role, value in values.items() if value is not None}
        if not all(fits(value) for value in present.values()):
            bad.append(path)
            continue
        halves = [value for value in present.values() if value.dtype in (torch.float16, torch.bfloat16)]
        if any(bool((value.abs() == torch.finfo(value.dtype).max).any()) for value in halves):
            edge.append(path)
        B = next((present[role] for role in ("B", "embedding_B") if role in present), None)
        if B is not None and not bool(B.any()):
            zero.append(path)
        elif B is not None:
            parts = [value.contiguous().flatten().view(torch.uint8).numpy().tobytes() for value in present.values()]
            twins[hashlib.sha256(b"".join(parts)).hexdigest()].append(path)
        update = update_of(facts, module)
        if update is not None:
            row.norm = update.norm()
            if row.norm > 0:
                row.stable_rank = update.low_rank.stable_rank()
                row.rank_used = update.low_rank.compact(1e-5).rank
    for tensor in facts.with_role("saved"):
        value = facts.stored.read(tensor.name)
        if value is not None and not fits(value):
            bad.append(tensor.path)
    return [*_value_findings(facts, bad, edge, zero, [paths for paths in twins.values() if len(paths) > 1])], rows


def _value_findings(
    facts: Facts, bad: list[str], edge: list[str], zero: list[str], twins: list[list[str]]
) -> Iterable[Finding]:
    if bad:
        text = f"{names_of(bad)}: NaN or infinite values ({len(bad)} of {len(facts.modules)} modules)"
        yield Finding("broken", "not-finite", text, SAVE_AGAIN, tuple(bad))
    if edge:
        text = f"{names_of(edge)}: values at the largest number of their dtype, as an overflow leaves them"
        yield Finding("suspicious", "overflow", text, SAVE_AGAIN, tuple(edge))
    if zero and len(zero) == len(facts.modules):
        yield Finding("note", "no-update", "B is zero in every module: the adapter changes nothing (yet)")
    elif zero:
        text = f"{names_of(zero)}: B is zero in {len(zero)} of {len(facts.modules)} modules, which stay the base's"
        yield Finding("note", "zero-modules", text, modules=tuple(zero))
    for paths in twins:
        text = f"{names_of(paths)}: the same factors, bit for bit"
        yield Finding("suspicious", "duplicate", text, AGAIN, tuple(paths))
