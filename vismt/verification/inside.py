"""The values of an adapter alone: what is wrong with them, and the numbers of each update, one module at a time."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.tensors import FLOATING, fits
from vismt.verification.facts import Facts, ModuleFacts
from vismt.verification.fit import Update
from vismt.verification.verdict import Finding, Level, ModuleRow, names_of

SAVE_AGAIN = "save the adapter again from a run whose values are finite"


LARGEST = 1e3  # of the root mean square of an update: weights are below 1


def update_of(facts: Facts, module: ModuleFacts) -> Update | None:
    """Return the update of a module; None where it is not a pair of factors, or the file does not determine it."""
    values = {role: facts.stored.read(tensor.name) for role, tensor in module.tensors.items()}
    known = {role: value for role, value in values.items() if value is not None}
    if len(known) < len(values) or not all(fits(value) for value in known.values()):
        return None
    try:
        if facts.kind == "vismt":
            spec = facts.specs[module.path]
            leaves = {tensor.name.rpartition(".")[2]: known[role] for role, tensor in module.tensors.items()}
            spec.layer.check_tensors("verify", spec, leaves)
            return Update(spec.layer.low_rank_of("verify", spec, leaves))
        return _of_peft(known, module)
    except (UserError, RuntimeError, LookupError, AttributeError):  # a tensor is missing, or does not fit
        return None


def _of_peft(known: dict[str, Tensor], module: ModuleFacts) -> Update | None:
    roles, scale = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}, module.scale
    if scale is None or not known.keys() <= roles or any(value.dtype not in FLOATING for value in known.values()):
        return None
    table = "embedding_A" in known
    B, A = (known["embedding_A"].T, known["embedding_B"].T) if table else (known["B"], known["A"])
    if module.experts > 1:  # A is (e*r, i) and B (o, r*e), the expert last
        pairs = zip(A.chunk(module.experts), (B[:, e :: module.experts] for e in range(module.experts)), strict=True)
        first, *others = (LowRank(b, a, scale=scale) for a, b in pairs)
        return Update(first, others=tuple(others))
    update = LowRank(B.flatten(1), A.flatten(1), scale=scale)
    magnitude = known.get("magnitude")
    if magnitude is None:
        return Update(update)
    return Update(update, magnitude.flatten()) if not table and magnitude.numel() == update.shape[0] else None


def examine(facts: Facts, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield what is wrong with the values of an adapter, and fill its numbers into the row of each module."""
    seen: dict[str, list[str]] = defaultdict(list)
    for path, module in facts.modules.items():
        values = [(role, facts.stored.read(tensor.name)) for role, tensor in module.tensors.items()]
        for sign in _signs({role: value for role, value in values if value is not None}):
            seen[sign].append(path)
        update, row = update_of(facts, module), rows[path]
        if update is not None:
            row.norm = update.norm()
            size = row.norm / max(prod(update.shape), 1) ** 0.5
            if row.norm > torch.finfo(torch.float32).max or size > LARGEST:
                seen["large"].append(path)
            elif row.norm > 0:
                row.stable_rank = update.low_rank.stable_rank()
                row.rank_used = update.low_rank.compact(1e-5).rank
    for tensor in facts.with_role("saved"):
        value = facts.stored.read(tensor.name)
        if value is not None and not fits(value):
            seen["bad"].append(tensor.path)
    yield from _shown(seen, facts)


def _signs(values: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield bad, edge or zero for the values of a module; where B is not zero, also their digest."""
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


def _shown(seen: dict[str, list[str]], facts: Facts) -> Iterable[Finding]:
    bad, edge, zero, large = (seen.pop(sign, []) for sign in ("bad", "edge", "zero", "large"))
    total = len(facts.modules)
    if bad:
        text = f"{names_of(bad)}: NaN or infinite values ({len(bad)} of {total} modules)"
        yield Finding("broken", "not-finite", text, SAVE_AGAIN, tuple(bad))
    if edge:
        text = f"{names_of(edge)}: values at the largest number of their dtype, as an overflow leaves them"
        yield Finding("suspicious", "overflow", text, SAVE_AGAIN, tuple(edge))
    if large:
        text = f"{names_of(large)}: the update is larger than {LARGEST:g} on average ({len(large)} of {total} modules)"
        yield Finding("suspicious", "size", text, "look at lora_alpha and at the values of the factors", tuple(large))
    kinds = Counter(_kind(facts.modules[path]) for path in facts.modules)
    whole = [
        kind for kind, count in Counter(_kind(facts.modules[path]) for path in zero).items() if 1 < count == kinds[kind]
    ]
    if zero and len(zero) == total:
        text = "A or B is zero in every module: the adapter changes nothing (yet)"
        yield Finding(
            "suspicious", "no-update", text, "save the adapter after training, in a dtype that holds its values"
        )
    elif zero:
        level: Level = "suspicious" if any(whole) else "note"
        every = f", every {names_of(whole)} among them" if any(whole) else ""
        text = f"{names_of(zero)}: A or B is zero in {len(zero)} of {total} modules, which stay the base's{every}"
        yield Finding(level, "zero-modules", text, modules=tuple(zero))
    for paths in seen.values():
        if len(paths) > 1:
            text = f"{names_of(paths)}: the same factors, bit for bit"
            yield Finding("suspicious", "duplicate", text, "save the adapter again", tuple(paths))


def _kind(module: ModuleFacts) -> str:
    """Return the last name of the path of a module; none of an attention's, beside which peft keeps a zero update."""
    return module.path.rpartition(".")[2] if module.named == module.path else ""
