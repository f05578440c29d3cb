"""Whole checkpoints beside an adapter: opened by path or name, by themselves, and their config.json against each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from vismt.base.errors import UserError
from vismt.verification.facts import Facts, read_facts
from vismt.verification.library import Translated, translated
from vismt.verification.located import same_parameter
from vismt.verification.rules import Case, findings
from vismt.verification.verdict import Finding, names_of

# Keys of a config.json that change what a model computes, and keys with such words that do not.
DECIDES = re.compile(
    r"layer|head|hidden|size$|rope|theta|eps|act|window|softcap|scal|multiplier|bias|expert|_dim$|depth|norm"
)
DOES_NOT = re.compile(r"drop|output_|vocab|label|token|router_aux|init|cache|chunk|tie_")
# Families of models by words in their names, at the start or the end of a word.
KINDS = "llama|llava|mistral|mixtral|qwen|gemma|phi|gpt|opt|bloom|falcon|bert|t5|vit|swin|dino|deit|beit|clip|siglip|whisper"
FAMILIES = re.compile(rf"(?<![a-z])(?:{KINDS})|(?:{KINDS})(?![a-z])")
SIZES = {"m": 10**6, "b": 10**9}


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
            f"verify: {what} '{name}' is not a folder, a file or an asset, and the hub does not give it ({reason})."
        ) from error


def of_base(facts: Facts, adapter: Facts) -> tuple[Translated, list[Finding]]:
    """Return the base of an adapter in the class that was adapted, and what is wrong with it without its whole parameters."""
    whole = translated(facts, adapter)
    held = [tensor.path for tensor in adapter.with_role("saved")]
    whole.lacking = [name for name in whole.lacking if not any(same_parameter(path, name) for path in held)]
    return whole, of_checkpoint(whole, "the base")


def of_merged(facts: Facts, adapter: Facts, base: Translated) -> tuple[Translated, list[Finding]]:
    """Return a merged checkpoint in the class that was adapted, and what is wrong with it in its own class."""
    whole, own = translated(facts, adapter), translated(facts)
    own = own if own.library else whole
    return whole, [*of_checkpoint(own, "the merged checkpoint"), *configurations(base, own)]


def of_checkpoint(whole: Translated, what: str) -> list[Finding]:
    """Return what is wrong with a checkpoint alone. what: its name in messages."""
    reasons = [Finding("broken", "malformed", f"{what}: {reason}") for reason in whole.raw.stored.reasons]
    found = findings(Case(whole.raw, whole=whole))
    return [*reasons, *(replace(one, text=f"{what}: {one.text}") for one in found)]


def configurations(base: Translated, merged: Translated) -> Iterable[Finding]:
    """Yield what the config.json of a merged checkpoint says otherwise than the base's and what changes the function."""
    ours, theirs = (one.facts.model_config for one in (merged, base))
    filled = [one.library.model.config for one in (merged, base) if one.library]
    if len(filled) == 2 and type(filled[0]) is type(filled[1]):
        ours, theirs = (config.to_dict() for config in filled)
    if not ours or not theirs:
        return
    differing = [key for key in _differing(ours, theirs) if DECIDES.search(key) and not DOES_NOT.search(key)]
    if differing:
        text = f"config.json of the merged checkpoint differs from the base's in {names_of(differing)}"
        yield Finding("broken", "config", text, "take config.json from the base")
    if ours.get("tie_word_embeddings") and theirs.get("tie_word_embeddings") is False:
        text = "config.json of the merged checkpoint ties the head to the embedding, and the base's does not"
        yield Finding("suspicious", "config", text, "set tie_word_embeddings to false")


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], before: str = "") -> Iterable[str]:
    for key in ours.keys() & theirs.keys():
        one, two = ours[key], theirs[key]
        if isinstance(one, dict) and isinstance(two, dict) and not key.startswith("rope"):
            yield from _differing(one, two, f"{before}{key}.")
        elif one != two:
            yield f"{before}{key}"


def named_base(facts: Facts, given: str, base: Facts) -> Iterable[Finding]:
    """Yield whether the base that an adapter names is another model than the one that is given: by family and size."""
    name = (facts.base or "").rstrip("/")
    known = [given.rstrip("/"), str(base.model_config.get("_name_or_path") or "").rstrip("/")]
    last = name.rpartition("/")[2].lower()
    if not name or any(
        last == one.rpartition("/")[2].lower() or f"models--{name.replace('/', '--')}" in one for one in known
    ):
        return
    size = re.search(r"(?:^|[-_./])(\d+(?:\.\d+)?)([mb])(?:$|[-_.])", last)
    count = sum(prod(tensor.shape) for tensor in base.tensors.values())
    other = size is not None and not 0.4 < count / max(float(size[1]) * SIZES[size[2]], 1) < 2.5
    words, kind = FAMILIES.findall(last), str(base.model_config.get("model_type") or "").lower()
    other |= bool(kind and words) and not any(word in kind for word in words)
    text = f"the adapter names '{name[:200]}' as its base, and '{given[:200]}' is given"
    if other:
        yield Finding("suspicious", "base-name", f"{text}, which is of another family or size", "give that base")
    else:
        yield Finding("note", "base-name", text)
