"""An adapter against its base model: values that show another base, whole parameters, vocabularies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vismt.base import console
from vismt.lowrank.files.save_load import same_base, samples_at
from vismt.storage.files import file_digest, parse_json
from vismt.verification.facts import Facts
from vismt.verification.fit import Update
from vismt.verification.inside import update_of
from vismt.verification.located import Located, equal, find_parameter
from vismt.verification.verdict import Finding, ModuleRow, names_of

LARGEST_VOCABULARY = 2**26  # bytes of a tokenizer.json that is read
LARGEST = 3.0  # of |D| / |W|
GIVE_BASE = "give the base it was trained on"


def against_base(facts: Facts, base: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield what values and vocabularies show of another base, and fill the ratio of each row in."""
    yield from _same_base(facts, base, rows)
    large = [path for path, row in rows.items() if (row.ratio or 0.0) > LARGEST]
    if large:
        text = f"{names_of(large)}: the update is more than {LARGEST:g} times as large as the weight"
        yield Finding("suspicious", "size", text, "look at lora_alpha and at the values of the factors", tuple(large))
    yield from _saved(facts, base.facts)
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
        text = "the weights of the base are not those that the adapter was trained on (samples in adapter.json)"
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
    """Yield whole parameters that do not fit the base."""
    copies = facts.unnamed()
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


# ---- tokenizers
def tokenizers(one: Facts, base: Facts, name: str) -> Iterable[Finding]:
    """Yield differences of the tokenizers and chat templates of a folder and of the base. name: of the first, in messages."""
    for file in ("tokenizer.json", "vocab.json", "chat_template.jinja"):
        paths = [facts.folder / file for facts in (one, base)]
        if not all(path.is_file() for path in paths) or file_digest(paths[0]) == file_digest(paths[1]):
            continue
        if file == "chat_template.jinja":
            text = f"the chat template of {name} differs from that of the base"
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
