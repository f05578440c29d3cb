"""Examine the values of an adapter, alone and beside its base: faults, numbers of each update, whole parameters, tokenizers."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.files.facts import ModuleFacts
from vismt.lowrank.files.save_load import same_base, samples_at
from vismt.lowrank.tensors import fits
from vismt.lowrank.update import Update
from vismt.storage.files import file_digest, parse_json
from vismt.verification.checkpoints import Located, equal, find_parameter
from vismt.verification.facts import Facts, Finding, Level, shorten_names

LARGEST_VOCABULARY = 2**26  # bytes of a tokenizer.json that is read
_LARGEST = 1e3  # of the root mean square of an update: weights are below 1
LARGEST_RATIO = 3.0  # of |D| / |W|
SAVE_AGAIN = "save the adapter again from a run whose values are finite"
GIVE_BASE = "give the base it was trained on"


@dataclass
class ModuleRow:
    """Numbers of an adapted module; None if they are not known.

    norm: |DeltaW|_F. ratio: |DeltaW|_F / |W|_F. rank_used: Number of singular values above the dtype's noise. stable_rank:
    |DeltaW|_F^2 / |DeltaW|_2^2. fit: Kind of the `Fit` of a merged checkpoint. factor: k of W + k DeltaW. residual:
    |M - W - c DeltaW|_F / |M|_F. erased: Share of the update that rounding to the checkpoint's dtype loses.
    """

    path: str
    rank: int | None = None
    scale: float | None = None
    norm: float | None = None
    rank_used: int | None = None
    stable_rank: float | None = None
    ratio: float | None = None
    fit: str | None = None
    factor: float | None = None
    residual: float | None = None
    erased: float | None = None


def update_of(facts: Facts, module: ModuleFacts) -> Update | None:
    """Return the update of a module. None if it is not a pair of factors, or the file does not determine it."""
    values = {role: facts.stored.read(tensor.name) for role, tensor in module.tensors.items()}
    known = {role: value for role, value in values.items() if value is not None}
    if len(known) < len(values) or not all(fits(value) for value in known.values()):
        return None
    try:
        if facts.kind == "vismt":
            spec = facts.specs[module.path]
            leaves = {tensor.name.rpartition(".")[2]: known[role] for role, tensor in module.tensors.items()}
            spec.layer.check_tensors("verify", spec, leaves)
            return Update((spec.layer.low_rank_of("verify", spec, leaves),))
        return module.update(known)
    except (UserError, RuntimeError, LookupError, AttributeError):  # a tensor is missing, or does not fit
        return None


def examine_values(facts: Facts, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield findings about the values of an adapter, and fill its numbers into the row of each module."""
    seen: dict[str, list[str]] = defaultdict(list)
    for path, module in facts.modules.items():
        values = [(role, facts.stored.read(tensor.name)) for role, tensor in module.tensors.items()]
        for sign in _signs({role: value for role, value in values if value is not None}):
            seen[sign].append(path)
        update, row = update_of(facts, module), rows[path]
        if update is not None:
            row.norm = update.norm()
            size = row.norm / max(prod(update.shape), 1) ** 0.5
            if row.norm > torch.finfo(torch.float32).max or size > _LARGEST:
                seen["large"].append(path)
            elif row.norm > 0:
                row.stable_rank = update.blocks[0].stable_rank()
                row.rank_used = update.blocks[0].compact(1e-5).rank
    for tensor in facts.with_role("saved"):
        value = facts.stored.read(tensor.name)
        if value is not None and not fits(value):
            seen["bad"].append(tensor.path)
        elif value is not None and value.ndim > 1 and not bool(value.any()):
            text = f"'{tensor.path}', which was trained whole, is zero everywhere"
            yield Finding("suspicious", "zero-modules", text, "save the adapter again", (tensor.path,))
    yield from _findings_of(seen, facts)


def _signs(values: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield bad, edge or zero for the values of a module, and their digest if B is not zero."""
    if not all(fits(value) for value in values.values()):
        yield "bad"
        return
    halves = [value for value in values.values() if value.dtype in (torch.float16, torch.bfloat16)]
    if any(bool((value.abs() == torch.finfo(value.dtype).max).any()) for value in halves):
        yield "edge"
    factors = [value for role, value in values.items() if role.removeprefix("embedding_") in ("A", "B")]
    if not all(bool(factor.any()) for factor in factors):
        yield "zero"
    elif factors:
        parts = [value.contiguous().flatten().view(torch.uint8).numpy().tobytes() for value in values.values()]
        yield hashlib.sha256(b"".join(parts)).hexdigest()


def _findings_of(seen: dict[str, list[str]], facts: Facts) -> Iterable[Finding]:
    bad, edge, zero, large = (seen.pop(sign, []) for sign in ("bad", "edge", "zero", "large"))
    total = len(facts.modules)
    if bad:
        text = f"{shorten_names(bad)}: NaN or infinite values ({len(bad)} of {total} modules)"
        yield Finding("broken", "not-finite", text, SAVE_AGAIN, tuple(bad))
    if edge:
        text = f"{shorten_names(edge)}: values at the largest number of their dtype, as an overflow leaves them"
        yield Finding("suspicious", "overflow", text, SAVE_AGAIN, tuple(edge))
    if large:
        text = f"{shorten_names(large)}: the update is larger than {_LARGEST:g} on average ({len(large)} of {total} modules)"
        yield Finding("suspicious", "size", text, "look at lora_alpha and at the values of the factors", tuple(large))
    kinds = Counter(_kind_of(facts.modules[path]) for path in facts.modules)
    whole = [
        kind
        for kind, count in Counter(_kind_of(facts.modules[path]) for path in zero).items()
        if 1 < count == kinds[kind]
    ]
    if zero and len(zero) == total:
        text = "A or B is zero in every module: the adapter changes nothing (yet)"
        yield Finding(
            "suspicious", "no-update", text, "save the adapter after training, in a dtype that holds its values"
        )
    elif zero:
        level: Level = "suspicious" if any(whole) else "note"
        every = f", every {shorten_names(whole)} among them" if any(whole) else ""
        text = f"{shorten_names(zero)}: A or B is zero in {len(zero)} of {total} modules, which stay the base's{every}"
        yield Finding(level, "zero-modules", text, modules=tuple(zero))
    for paths in seen.values():
        if len(paths) > 1:
            text = f"{shorten_names(paths)}: the same factors, bit for bit"
            yield Finding("suspicious", "duplicate", text, "save the adapter again", tuple(paths))


def _kind_of(module: ModuleFacts) -> str:
    """Return the last name of the path of a module. "" for an attention, beside which peft keeps a zero update."""
    return module.path.rpartition(".")[2] if module.named == module.path else ""


# ---- beside the base
def against_base(facts: Facts, base: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield findings that values and vocabularies belong to another base, and fill in the ratio of each row."""
    yield from _same_base(facts, base, rows)
    large = [path for path, row in rows.items() if (row.ratio or 0.0) > LARGEST_RATIO]
    if large:
        text = f"{shorten_names(large)}: the update is more than {LARGEST_RATIO:g} times as large as the weight"
        yield Finding("suspicious", "size", text, "look at lora_alpha and at the values of the factors", tuple(large))
    yield from _saved(facts, base.facts)
    yield from _rows_of_tokens(facts, base.facts)
    yield from tokenizers(facts, base.facts, "the adapter")


def _same_base(facts: Facts, base: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    expected = facts.config.get("base_samples", {}) if facts.specs else {}
    samples: dict[str, list[float]] = {}
    inside: list[str] = []
    follow: list[bool] = []
    for path in console.track(list(base.names), "verify", "base"):
        value = base.facts.stored.read(base.names[path]) if path in expected else None
        if value is not None:
            samples[path] = samples_at(path, value)
        update = update_of(facts, facts.modules[path])
        W = base.matrix(path, update.shape) if update is not None else None
        if update is None or W is None:
            continue
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        norm, whole = update.norm(), float(W.norm())
        rows[path].ratio = norm / whole if whole else None
        if norm and whole and _is_projection(update, W, norm, whole):
            inside.append(path)
        if update.magnitude is not None:
            follow.append(_follows(update.magnitude.to(W.dtype), W.norm(dim=1)))
    if not same_base(samples, expected):
        text = "the adapter was trained on other weights than the base has (samples in adapter.json)"
        yield Finding("broken", "other-base", text, GIVE_BASE)
    if 2 * sum(follow) < len(follow):
        text = "the magnitudes of DoRA do not follow the lengths of the rows of this base: another base"
        yield Finding("suspicious", "other-base", text, GIVE_BASE)
    start = str(facts.settings.init_lora_weights).lower() if facts.settings is not None else ""
    kept = start.startswith(("pissa", "olora", "corda"))
    if not kept and inside and 2 * len(inside) >= len(rows):
        text = (
            f"the update of {len(inside)} modules is a projection of the base: a PiSSA or OLoRA start is still inside"
        )
        fix = "convert it: vismt.export_peft, or peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        yield Finding("broken", "start-inside", text, fix, tuple(inside))
    if kept and not inside and any(row.ratio for row in rows.values()):
        text = (
            f"init_lora_weights is '{start}', but the update is not a projection of this base's weights: another base"
        )
        yield Finding("suspicious", "other-base", text, GIVE_BASE)


def _follows(magnitude: Tensor, lengths: Tensor) -> bool:
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
    """Yield findings for whole parameters that do not fit the base."""
    copies = facts.unlisted()
    for tensor in facts.with_role("saved"):
        name = find_parameter(tensor.path, base)
        if name is None:
            continue
        shape = base.tensors[name].shape
        if shape != tensor.shape:
            text = f"'{tensor.path}' is {tensor.shape}, the base's {shape}"
            yield Finding("note", "resized", text, "resize the base before it is loaded", (tensor.path,))
        elif tensor in copies:  # of embeddings, which peft saves as they are
            ours, theirs = facts.stored.read(tensor.name), base.stored.read(name)
            if ours is not None and theirs is not None and not equal(theirs, ours):
                text = f"'{tensor.path}': the settings do not name it as trained, but it has other values than in this base"
                fix = f"{GIVE_BASE}, or name it in modules_to_save"
                yield Finding("broken", "other-base", text, fix, (tensor.path,))


def _rows_of_tokens(facts: Facts, base: Facts) -> Iterable[Finding]:
    """Yield findings for trained rows of an embedding that are not as many as their indices, or lie outside the embedding."""
    for tensor in facts.with_role("tokens"):
        chosen, name = token_rows(facts, tensor.path), find_parameter(f"{tensor.path}.weight", base)
        if name is None:
            continue
        count = base.tensors[name].shape[0]
        if len(chosen) != tensor.shape[0] or not all(0 <= row < count for row in chosen):
            text = f"trainable_token_indices names {len(chosen)} rows up to {max(chosen, default=0)}"
            text += f", the file holds {tensor.shape[0]}, and '{name}' has {count}"
            yield Finding("broken", "tokens", text, "set trainable_token_indices to the value of the training")


def token_rows(facts: Facts, path: str) -> list[int]:
    """Return the rows of an embedding that the settings name as trained."""
    chosen = facts.config.get("trainable_token_indices")
    if isinstance(chosen, dict):
        chosen = next((rows for name, rows in chosen.items() if f".{path}".endswith(f".{name}")), [])
    return [row for row in chosen if isinstance(row, int)] if isinstance(chosen, list) else []


# ---- tokenizers
def tokenizers(one: Facts, base: Facts, name: str) -> Iterable[Finding]:
    """Yield findings for tokenizers and chat templates that differ from the base. name: Name of the folder in messages."""
    for file in ("tokenizer.json", "vocab.json", "chat_template.jinja"):
        paths = [facts.folder / file for facts in (one, base)]
        if not all(path.is_file() for path in paths) or file_digest(paths[0]) == file_digest(paths[1]):
            continue
        if file == "chat_template.jinja":
            text = f"the chat template of {name} differs from the base's template"
            yield Finding("note", "chat-template", text, "serve with the adapter's template")
            continue
        ours, theirs = map(_ids, paths)
        if ours is None or theirs is None:
            text = f"'{file}' of {name} or of the base cannot be read"
            yield Finding("suspicious", "tokenizer", text, "copy the tokenizer again")
            continue
        moved = sum(ours.get(token) != number for token, number in theirs.items())
        if moved > 0.01 * len(theirs):
            text = f"'{file}' of {name}: {moved:,} of {len(theirs):,} tokens have another id than in the base"
            yield Finding("broken", "tokenizer", text, "use the tokenizer of the base it was trained on")
        elif ours != theirs:
            added = len(ours.keys() - theirs.keys())
            yield Finding("note", "tokenizer", f"'{file}' of {name} has {added} tokens that the base has not")


def _ids(path: Path) -> dict[str, int] | None:
    """Return the ids of a tokenizer's tokens. None for a file that cannot be read."""
    if path.stat().st_size > LARGEST_VOCABULARY:
        return None
    try:
        content = parse_json(path.read_text(encoding="utf8"))
        vocabulary = content["model"]["vocab"] if path.name == "tokenizer.json" else content
        if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        extra = content.get("added_tokens", []) if path.name == "tokenizer.json" else []
        return {**dict(vocabulary), **{entry["content"]: entry["id"] for entry in extra}}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
