"""The values of an adapter alone: what is wrong with them, and the numbers of each update, one module at a time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.tensors import FLOATING, fits
from vismt.verification.facts import Facts, ModuleFacts
from vismt.verification.fit import Update
from vismt.verification.verdict import Finding, ModuleRow, names_of

SAVE_AGAIN = "save the adapter again from a run whose values are finite"


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
        return _of_peft(known, module.scale)
    except (UserError, RuntimeError, LookupError, AttributeError):  # a tensor is missing, or does not fit
        return None


def _of_peft(known: dict[str, Tensor], scale: float | None) -> Update | None:
    roles = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}
    if scale is None or not known.keys() <= roles or any(value.dtype not in FLOATING for value in known.values()):
        return None
    table = "embedding_A" in known
    B, A = (known["embedding_A"].T, known["embedding_B"].T) if table else (known["B"], known["A"])
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
            if row.norm > 0:
                row.stable_rank = update.low_rank.stable_rank()
                row.rank_used = update.low_rank.compact(1e-5).rank
    for tensor in facts.with_role("saved"):
        value = facts.stored.read(tensor.name)
        if value is not None and not fits(value):
            seen["bad"].append(tensor.path)
    yield from _shown(seen, len(facts.modules))


def _signs(values: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield bad, edge or zero for the values of a module; where B is not zero, also their digest."""
    if not all(fits(value) for value in values.values()):
        yield "bad"
        return
    halves = [value for value in values.values() if value.dtype in (torch.float16, torch.bfloat16)]
    if any(bool((value.abs() == torch.finfo(value.dtype).max).any()) for value in halves):
        yield "edge"
    B = next((values[role] for role in ("B", "embedding_B") if role in values), None)
    if B is not None and not bool(B.any()):
        yield "zero"
    elif B is not None:
        parts = [value.contiguous().flatten().view(torch.uint8).numpy().tobytes() for value in values.values()]
        yield hashlib.sha256(b"".join(parts)).hexdigest()


def _shown(seen: dict[str, list[str]], total: int) -> Iterable[Finding]:
    bad, edge, zero = (seen.pop(sign, []) for sign in ("bad", "edge", "zero"))
    if bad:
        text = f"{names_of(bad)}: NaN or infinite values ({len(bad)} of {total} modules)"
        yield Finding("broken", "not-finite", text, SAVE_AGAIN, tuple(bad))
    if edge:
        text = f"{names_of(edge)}: values at the largest number of their dtype, as an overflow leaves them"
        yield Finding("suspicious", "overflow", text, SAVE_AGAIN, tuple(edge))
    if zero and len(zero) == total:
        yield Finding("note", "no-update", "B is zero in every module: the adapter changes nothing (yet)")
    elif zero:
        text = f"{names_of(zero)}: B is zero in {len(zero)} of {total} modules, which stay the base's"
        yield Finding("note", "zero-modules", text, modules=tuple(zero))
    for paths in seen.values():
        if len(paths) > 1:
            text = f"{names_of(paths)}: the same factors, bit for bit"
            yield Finding("suspicious", "duplicate", text, "save the adapter again", tuple(paths))
