"""An adapter against its base model and against a merged checkpoint, weight by weight; at most one module is in memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import same_base, samples_at
from vismt.lowrank.files.peft_settings import texts
from vismt.storage.files import file_digest, parse_json
from vismt.verification.facts import Facts, ModuleFacts, read_facts
from vismt.verification.fit import BITS, Fit, Update, fit
from vismt.verification.inside import update_of
from vismt.verification.verdict import Finding, ModuleRow, names_of

INNER = "language_model."  # the part that text-only and multimodal classes name differently
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linears are transposed
FUSED = ("qkv", "c_attn", "in_proj", "Wqkv", "qkv_proj", "query_key_value")
LARGEST_VOCABULARY = 2**26  # bytes of a tokenizer.json that is read
LOST = 0.5  # share of an update that rounding may take before it is a fault


@dataclass
class Located:
    """The weights of adapted modules in a checkpoint. names: of their tensors, by path. change: what the paths had to be changed by."""

    facts: Facts
    names: dict[str, str] = field(default_factory=dict)
    change: str = ""
    transposed: bool = False

    def matrix(self, path: str, shape: tuple[int, int]) -> Tensor | None:
        """Return the weight (o, i) of a module; None where it is not there, has another shape, or is no plain number."""
        stored = self.facts.stored.tensors[self.names[path]]
        turned = stored.shape == shape[::-1] and (shape[0] != shape[1] or self.transposed)
        flat = (stored.shape[0], int(torch.Size(stored.shape[1:]).numel())) if stored.shape else ()
        if not turned and flat != shape:
            return None
        value = self.facts.stored.read(stored.name)
        if value is None or value.dtype not in BITS:
            return None
        return value.T if turned else value.flatten(1)


def open_checkpoint(place: str | Path, what: str) -> Facts:
    """Return the facts of a checkpoint: a folder or file, the name of an asset, or a model on the hub."""
    path = Path(place).expanduser()
    if not path.exists():
        from vismt.backbones.assets import get_asset, list_assets

        path = get_asset(str(place)) if str(place) in list_assets() else _from_hub(str(place), what)
    facts = read_facts(path)
    if facts.is_adapter and facts.model_config:  # a merged model with the adapter's files beside it
        facts = read_facts(path, as_checkpoint=True)
    if facts.kind != "checkpoint":
        raise UserError(f"verify: {what} '{place}' is not a checkpoint ({facts.kind}); give a folder with its weights.")
    return facts


def _from_hub(name: str, what: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"verify: {what} '{name}' is no folder, no file, no asset, and the hub gives no such model ({reason})."
        ) from error


def locate(facts: Facts, checkpoint: Facts) -> Located:
    """Find the weights of the adapted modules, under the change of names that finds the most of them."""
    names = checkpoint.stored.tensors
    paths = list(facts.modules)

    def hits(change: Callable[[str], str]) -> dict[str, str]:
        found = {}
        for path in paths:
            name = change(path)
            weight = next((known for known in (f"{name}.weight", name) if known in names), None)
            if weight is not None:
                found[path] = weight
        return found

    changes: dict[str, Callable[[str], str]] = {"": lambda path: path}
    changes[f"without '{INNER}'"] = lambda path: path.replace(INNER, "", 1)
    inner = {
        name.replace(INNER, "", 1).removesuffix(".weight"): name.removesuffix(".weight")
        for name in names
        if INNER in name
    }
    changes[f"with '{INNER}'"] = lambda path: inner.get(path, path)
    first = next(iter(paths), "").partition(".")[0]
    changes[f"without '{first}.'"] = lambda path: path.removeprefix(f"{first}.")
    for ending in paths[:1]:
        for name in names:
            if name.endswith(f".{ending}.weight"):
                before = name.removesuffix(f"{ending}.weight")
                changes[f"with '{before}'"] = lambda path, before=before: f"{before}{path}"  # type: ignore[misc]
    found = {label: hits(change) for label, change in changes.items()}
    best = max(found, key=lambda label: (len(found[label]), not label))
    located = Located(checkpoint, found[best], best if found[best] else "")
    shapes = [
        (_shape(module), names[located.names[path]].shape)
        for path, module in facts.modules.items()
        if path in located.names
    ]
    known = [
        (shape, stored) for shape, stored in shapes if shape is not None and len(stored) == 2 and shape[0] != shape[1]
    ]
    turned = sum(stored == shape[::-1] for shape, stored in known)
    by_type = checkpoint.config.get("model_type") in CONV1D
    located.transposed = turned > 0.5 * len(known) if known else by_type
    return located


def _shape(module: ModuleFacts) -> tuple[int, int] | None:
    """Return (o, i) of the update by the shapes of its factors; None where it has none."""
    A, B = (module.tensors.get(role) for role in ("A", "B"))
    if A is not None and B is not None and len(A.shape) >= 2 and len(B.shape) >= 2 and A.shape[0] == B.shape[1]:
        return B.shape[0], int(torch.Size(A.shape[1:]).numel())
    A, B = (module.tensors.get(role) for role in ("embedding_A", "embedding_B"))
    if A is not None and B is not None and len(A.shape) == len(B.shape) == 2:
        return A.shape[1], B.shape[0]
    return None


def against_base(facts: Facts, base: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield what is wrong between an adapter and its base: names, shapes, values that show another base, vocabularies."""
    yield from _names(facts, base)
    misfits = {}
    for path, name in base.names.items():
        module, stored = facts.modules[path], base.facts.stored.tensors[name].shape
        shape = _shape(module) if module.rank == module.declared else None  # else a finding of its own
        if shape and len(stored) == 2 and stored not in (shape, shape[::-1]):
            misfits[path] = f"'{path}': the update is {shape}, the base's weight {stored}"
    if misfits:
        yield Finding(
            "broken",
            "shape",
            f"{next(iter(misfits.values()))} ({len(misfits)} such modules)",
            "give the base it was trained on",
            tuple(misfits),
        )
    yield from _same_base(facts, base, rows)
    yield from _saved(facts, base.facts)
    yield from _tokenizers(facts, base.facts, "the adapter", "the base")


def _names(facts: Facts, base: Located) -> Iterable[Finding]:
    absent = [path for path in facts.modules if path not in base.names]
    total = len(facts.modules)
    # transformers adds or leaves out the name of the bare model inside a class with a head
    bare = (
        bool(base.facts.config.get("model_type"))
        and base.change.startswith(("without", "with "))
        and INNER not in base.change
    )
    known = ("'model.'", "'transformer.'", "'base_model.'", "'vit.'", "'bert.'", "'gpt_neox.'")
    if base.change and not (bare and base.change.startswith("without") and base.change.endswith(known)):
        text = (
            f"the modules are named otherwise than in the base: {len(base.names)} of {total} are found only {base.change} in their "
            "paths; a reader that looks paths up serves the base (reported for vLLM, vllm#34186)"
        )
        yield Finding("broken", "prefix", text, f"rename the adapter's tensors: {base.change}")
    if absent:
        text = f"the base has no weight of {names_of(absent)} ({len(absent)} of {total} adapted modules)"
        yield Finding("broken", "not-in-base", text, "give the base it was trained on", tuple(absent))
    if facts.settings is None or absent or base.change:
        return
    paths = {
        name.removesuffix(".weight")
        for name, stored in base.facts.stored.tensors.items()
        if name.endswith(".weight") and len(stored.shape) >= 2
    }
    stems = {re.sub(r"\d+", "*", path) for path in facts.modules}
    missing = sorted(
        path
        for path in paths - facts.modules.keys()
        if facts.settings.names(path) and re.sub(r"\d+", "*", path) in stems
    )
    if missing:
        text = f"{names_of(missing)}: named by target_modules, but the file has no factors of it ({len(missing)} modules stay the base's)"
        yield Finding("broken", "missing-module", text, "save the adapter again", tuple(missing))


def _same_base(facts: Facts, base: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield signs of another base, and fill the ratio of each row in."""
    samples: dict[str, list[float]] = {}
    expected = facts.config.get("base_samples") if facts.kind == "vismt" and facts.specs else None
    inside: list[str] = []
    lengths: list[bool] = []
    for path in console.track(list(base.names), "verify", "base"):
        module = facts.modules[path]
        stored = base.facts.stored.tensors[base.names[path]]
        if isinstance(expected, dict) and path in expected:
            value = base.facts.stored.read(stored.name)
            if value is not None:
                samples[path] = samples_at(path, value)
        update = update_of(facts, module)
        W = base.matrix(path, update.shape) if update is not None else None
        if update is None or W is None:
            continue
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        norm, whole = update.norm(), float(W.norm())
        rows[path].ratio = norm / whole if whole else None
        if norm and _is_projection(update, W, norm, whole):
            inside.append(path)
        if update.magnitude is not None:
            lengths.append(_agreement(update.magnitude.to(W.dtype), W.norm(dim=1)))
    if samples and isinstance(expected, dict) and not same_base(samples, expected):
        yield Finding(
            "broken",
            "other-base",
            "the weights of the base are not those that the adapter was trained on (samples differ)",
            "give the base it was trained on",
        )
    start = str(facts.settings.init_lora_weights).lower() if facts.settings is not None else ""
    kept = start.startswith(("pissa", "olora", "corda"))
    if inside and not kept and len(inside) >= 0.5 * len(rows):
        text = f"the update of {len(inside)} modules is a projection of the base's weight: a PiSSA or OLoRA start that was not converted"
        yield Finding(
            "broken",
            "start-inside",
            text,
            "convert it: export_peft, or peft's path_initial_model_for_weight_conversion",
            tuple(inside),
        )
    if kept and not inside and any(row.ratio for row in rows.values()):
        text = f"init_lora_weights is '{start}', but the update is no projection of this base's weights: another base"
        yield Finding("suspicious", "other-base", text, "give the base it was trained on")
    if lengths and sum(not agree for agree in lengths) > 0.5 * len(lengths):
        text = "the magnitudes of DoRA do not follow the lengths of the rows of this base: another base"
        yield Finding("suspicious", "other-base", text, "give the base it was trained on")


def _agreement(magnitude: Tensor, lengths: Tensor) -> bool:
    """Return whether magnitudes, which start as the lengths of the rows of the base, still follow them."""
    both = torch.stack([magnitude, lengths]).clamp_min(1e-30).log()
    moved = float((both[0] - both[1]).abs().median())
    return moved < 0.05 or float(torch.corrcoef(both)[0, 1]) > 0.3


def _is_projection(update: Update, W: Tensor, norm: float, whole: float) -> bool:
    """Return whether D holds a projection of W, as PiSSA, OLoRA and CorDA start: <D, W> / |D|^2 near 1, far from chance."""
    product = update.product(W)
    z = product / (norm * whole) * W.numel() ** 0.5 if whole else 0.0
    return 0.5 < product / norm**2 < 1.3 and z > 8


def _saved(facts: Facts, base: Facts) -> Iterable[Finding]:
    """Yield whole parameters that do not fit the base."""
    for tensor in facts.with_role("saved"):
        found = next(
            (
                s
                for n, s in base.stored.tensors.items()
                if n == tensor.path or n.endswith(f".{tensor.path}") or tensor.path.endswith(f".{n}")
            ),
            None,
        )
        if found is not None and found.shape != tensor.shape:
            text = f"'{tensor.path}' is {tensor.shape}, the base's {found.shape}"
            yield Finding("note", "resized", text, "resize the base before it is loaded", (tensor.path,))
        elif found is not None and ".base_layer." in tensor.name:
            ours, theirs = facts.stored.read(tensor.name), base.stored.read(found.name)
            if ours is not None and theirs is not None and not _equal(theirs, ours):
                text = f"'{tensor.path}': the copy of the base in the file has other values than this base"
                yield Finding("broken", "other-base", text, "give the base it was trained on", (tensor.path,))


def _equal(W: Tensor, M: Tensor) -> bool:
    """Return whether one is the other, or a cast of it."""
    return torch.equal(W.to(M.dtype), M) or torch.equal(M.to(W.dtype), W)


# ---- tokenizers
def _tokenizers(one: Facts, other: Facts, name: str, than: str) -> Iterable[Finding]:
    for file in ("tokenizer.json", "vocab.json", "chat_template.jinja"):
        paths = [facts.folder / file for facts in (one, other)]
        if not all(path.is_file() for path in paths) or file_digest(paths[0]) == file_digest(paths[1]):
            continue
        if file == "chat_template.jinja":
            yield Finding(
                "note",
                "chat-template",
                f"the chat template of {name} differs from that of {than}",
                "serve with the adapter's template",
            )
            continue
        ids = [_ids(path) for path in paths]
        if ids[0] is None or ids[1] is None:
            yield Finding(
                "suspicious", "tokenizer", f"'{file}' of {name} or of {than} cannot be read", "copy the tokenizer again"
            )
            continue
        moved = [token for token in ids[0].keys() & ids[1].keys() if ids[0][token] != ids[1][token]]
        gone = ids[1].keys() - ids[0].keys()
        if len(moved) + len(gone) > 0.01 * len(ids[1]):
            text = f"'{file}' of {name}: {len(moved) + len(gone):,} of {len(ids[1]):,} tokens of {than} have another id or are missing"
            yield Finding("broken", "tokenizer", text, "use the tokenizer of the base it was trained on")
        elif ids[0] != ids[1]:
            added = len(ids[0].keys() - ids[1].keys())
            yield Finding("note", "tokenizer", f"'{file}' of {name} has {added} tokens that {than} has not")


def _ids(path: Path) -> dict[str, int] | None:
    """Return the ids of a tokenizer's tokens; None for a file that cannot be read."""
    if path.stat().st_size > LARGEST_VOCABULARY:
        return None
    try:
        content = parse_json(path.read_text(encoding="utf8"))
        vocabulary: Any = content["model"]["vocab"] if path.name == "tokenizer.json" else content
        if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        extra = content.get("added_tokens", []) if path.name == "tokenizer.json" else []
        return {**dict(vocabulary), **{entry["content"]: entry["id"] for entry in extra}}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


# ---- a merged checkpoint
def against_merged(facts: Facts, base: Located, merged: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield how a merged checkpoint differs from the base and the update of the adapter."""
    fits: dict[str, Fit] = {}
    changed: list[str] = []
    rslora = bool(facts.settings is not None and facts.settings.use_rslora)
    for path in console.track([path for path in base.names if path in merged.names], "verify", "merged"):
        module = facts.modules[path]
        update = update_of(facts, module)
        W, M = (at.matrix(path, update.shape) if update is not None else None for at in (base, merged))
        if update is None or W is None or M is None:
            if not _same_values(base.facts, base.names[path], merged.facts, merged.names[path]):
                changed.append(path)
            continue
        fits[path] = found = fit(W, M, update, module.rank or update.low_rank.rank, rslora)
        row = rows[path]
        row.fit, row.factor, row.residual = found.kind, found.factor, found.residual
        row.erased = found.lost / found.norm if found.norm else None
        if not bool(torch.isfinite(M).all()):
            yield Finding(
                "broken",
                "merged-not-finite",
                f"'{path}': the merged weight has NaN or infinite values",
                "merge in bf16 or fp32",
                (path,),
            )
    absent = [path for path in base.names if path not in merged.names]
    if absent:
        yield Finding(
            "broken",
            "not-in-merged",
            f"the checkpoint has no weight of {names_of(absent)}",
            "merge into the same base",
            tuple(absent),
        )
    apart, another = _unadapted(facts, base, merged)
    if another:
        text = f"{names_of(apart)}: weights that the adapter does not touch differ from the base: it was merged into another one"
        yield Finding("broken", "other-base", text, "give the base it was merged into", tuple(apart[:20]))
    elif apart:
        text = f"{names_of(apart)}: differs from the base and belongs to no adapter"
        yield Finding(
            "suspicious", "foreign-change", text, "look where it was trained; name it in modules_to_save", tuple(apart)
        )
    yield from _factors(facts, fits)
    if not another:
        yield from _others(facts, base, merged, fits)
    yield from _rounding(fits)
    yield from _heads(facts, base, merged)
    yield from _tokenizers(merged.facts, base.facts, "the checkpoint", "the base")


def _factors(facts: Facts, fits: Mapping[str, Fit]) -> Iterable[Finding]:
    groups: dict[tuple[str, float], list[str]] = defaultdict(list)
    for path, found in fits.items():
        if found.kind == "factor" and found.factor is not None:
            groups[found.rule, round(found.factor, 2)].append(path)
    for (rule, factor), paths in groups.items():
        every = "all" if len(paths) == len(fits) else f"{len(paths)} of {len(fits)}"
        text = f"the checkpoint holds {factor:g} times the update in {every} modules ({rule or 'no known mistake'}): {names_of(paths)}"
        code = {0.0: "unmerged", 2.0: "merged-twice"}.get(factor, "scale")
        fix = "merge the adapter into the base once, with the scale of its settings"
        if facts.settings is not None:
            fix += f" (alpha {facts.settings.lora_alpha:g}, rank {facts.settings.r}{', rsLoRA' if facts.settings.use_rslora else ''})"
        yield Finding("broken", code, text, fix, tuple(paths))
    loose = [path for path, found in fits.items() if found.kind == "unresolved"]
    if loose:
        text = f"{names_of(loose)}: the update is below the resolution of the checkpoint's dtype ({len(loose)} of {len(fits)} modules)"
        yield Finding("note", "unresolved", text, "merge in a wider dtype", tuple(loose))


def _others(facts: Facts, base: Located, merged: Located, fits: Mapping[str, Fit]) -> Iterable[Finding]:
    """Yield what stands in modules whose difference is no multiple of their update, in words of the best explanation."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, found in fits.items():
        if found.kind == "other":
            groups[_explained(facts, base, merged, path, found)].append(path)
    for (code, text), paths in groups.items():
        yield Finding(
            "broken",
            code,
            f"{text} in {len(paths)} of {len(fits)} modules: {names_of(paths)}",
            "merge this adapter into this base again",
            tuple(paths),
        )


def _explained(facts: Facts, base: Located, merged: Located, path: str, found: Fit) -> tuple[str, str]:
    update = update_of(facts, facts.modules[path])
    assert update is not None
    W, M = base.matrix(path, update.shape), merged.matrix(path, update.shape)
    assert W is not None and M is not None
    E = M.to(torch.promote_types(M.dtype, torch.float32)) - W.to(torch.promote_types(M.dtype, torch.float32))
    whole = float(E.norm()) or 1.0

    def cosine(other: Update, matrix: Tensor) -> float:
        norm = other.norm()
        return other.product(matrix) / (norm * whole) if norm else 0.0

    if update.shape[0] == update.shape[1] and cosine(update, E.T) > max(0.3, 3 * abs(found.cosine)):
        return "transposed", "the update was added transposed"
    if update.magnitude is not None and cosine(update, E) > max(0.5, 2 * abs(found.cosine)):
        return "dora", "the magnitudes of DoRA were left out"
    if abs(found.cosine) < 0.3:
        for other, module in facts.modules.items():
            if other != path and _shape(module) == update.shape:
                foreign = update_of(facts, module)
                if foreign is not None and cosine(foreign, E) > 0.5:
                    return "swapped", "the update of another module of the adapter was added"
    thirds = update.shape[0] // 3
    if any(word in path for word in FUSED) and update.shape[0] % 3 == 0:
        present = [float(E[part : part + thirds].norm()) > 1e-3 * whole for part in range(0, 3 * thirds, thirds)]
        if not all(present):
            return "slice-missing", "only a part of the rows of a fused projection was merged"
    if found.cosine > 0.3:
        return "another-update", "there is more than the update of this adapter (another base, adapter or training)"
    return "not-this-adapter", "the difference from the base is not the update of this adapter"


def _rounding(fits: Mapping[str, Fit]) -> Iterable[Finding]:
    lost, whole = (sum(getattr(found, name) ** 2 for found in fits.values()) for name in ("lost", "norm"))
    share = (lost / whole) ** 0.5 if whole else 0.0
    if share > LOST:
        text = f"rounding to the checkpoint's dtype takes {100 * share:.0f} % of the update (as norms)"
        yield Finding("suspicious", "rounded-away", text, "merge in fp32, or serve the adapter apart")
    elif share > 0.01:
        yield Finding(
            "note", "rounding", f"rounding to the checkpoint's dtype takes {100 * share:.0f} % of the update (as norms)"
        )
    coarse = max((found.resolution for found in fits.values() if found.kind == "right"), default=0.0)
    if coarse > 0.1:
        yield Finding(
            "note",
            "resolution",
            f"a scale that is wrong by less than {100 * coarse:.0f} % cannot be seen in this dtype",
        )


def _unadapted(facts: Facts, base: Located, merged: Located) -> tuple[list[str], bool]:
    """Return the names of weights outside the adapter that differ from the base, and whether most matrices are among them."""
    adapted = set(base.names.values())
    named = {tensor.path for tensor in facts.tensors.values() if tensor.role in ("saved", "bias", "shared")}
    promised = texts(facts.settings.modules_to_save) if facts.settings is not None else []
    biases = facts.settings is not None and facts.settings.bias != "none"
    tied = any(name.endswith(("lm_head.weight", "wte.weight", "embed_tokens.weight")) for name in adapted | named)
    shared = locate_all(base.facts, merged.facts)
    apart, compared, matrices = [], 0, 0
    for name, theirs in shared.items():
        trained = any(name == path or name.endswith(f".{path}") or path.endswith(f".{name}") for path in named)
        trained |= any(f".{module}." in f".{name}" for module in promised)
        trained |= facts.settings is not None and facts.settings.names(name.removesuffix(".weight"))
        if name in adapted or trained or (biases and name.endswith("bias")):
            continue
        if tied and name.endswith(("lm_head.weight", "wte.weight", "embed_tokens.weight")):
            continue
        plain = len(base.facts.stored.tensors[name].shape) < 2  # norms and biases start equal in every model
        compared += not plain
        if not _same_values(base.facts, name, merged.facts, theirs):
            apart.append(name)
            matrices += not plain
    return apart, bool(compared) and matrices >= max(2, 0.5 * compared)


def locate_all(base: Facts, merged: Facts) -> dict[str, str]:
    """Return the names of the base's tensors in another checkpoint, whose names may have another beginning."""
    names = merged.stored.tensors
    if base.stored.tensors.keys() & names.keys():
        return {name: name for name in base.stored.tensors if name in names}
    by_end = {name.partition(".")[2]: name for name in names}
    return {
        name: found
        for name in base.stored.tensors
        if (found := by_end.get(name) or (name.partition(".")[2] if name.partition(".")[2] in names else None))
    }


def _same_values(base: Facts, name: str, merged: Facts, other: str) -> bool:
    W, M = base.stored.read(name), merged.stored.read(other)
    if W is None or M is None:
        return True
    if W.shape != M.shape and W.ndim == M.ndim and W.shape[1:] == M.shape[1:]:  # a vocabulary that was resized
        rows = min(len(W), len(M))
        W, M = W[:rows], M[:rows]
    return W.shape == M.shape and _equal(W, M)


def _heads(facts: Facts, base: Located, merged: Located) -> Iterable[Finding]:
    """Yield whole parameters of the adapter that the checkpoint does not hold."""
    for tensor in facts.with_role("saved"):
        if ".base_layer." in tensor.name:
            continue
        name = next(
            (
                n
                for n in merged.facts.stored.tensors
                if n == tensor.path or n.endswith(f".{tensor.path}") or tensor.path.endswith(f".{n}")
            ),
            None,
        )
        value = facts.stored.read(tensor.name)
        M = merged.facts.stored.read(name) if name is not None else None
        if value is not None and (M is None or M.shape != value.shape or not _equal(value, M)):
            what = "is not in the checkpoint" if M is None else "has other values in the checkpoint"
            yield Finding(
                "broken",
                "head-not-merged",
                f"'{tensor.path}', which was trained whole, {what}",
                "merge again",
                (tensor.path,),
            )
