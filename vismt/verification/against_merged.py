"""A merged checkpoint against the base and the update of an adapter, one module at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vismt.base import console
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.peft_layouts import names_stack
from vismt.lowrank.files.peft_settings import texts
from vismt.lowrank.svd import principal
from vismt.lowrank.update import Update
from vismt.verification.checkpoints import Located, equal, find_parameter, same_parameter, shape_of
from vismt.verification.facts import MERGE_COMMAND, TABLES, Facts, Finding, shorten_names
from vismt.verification.fit import Fit, fit_merge
from vismt.verification.weights import ModuleRow, token_rows, tokenizers, update_of

FUSED = ("qkv", "c_attn", "in_proj", "Wqkv", "qkv_proj", "query_key_value")
GRID_ROWS = 64  # that show on which grid values lie
LOST = 0.5  # share of an update that rounding may take before it is a fault


def against_merged(facts: Facts, base: Located, merged: Located, rows: Mapping[str, ModuleRow]) -> Iterable[Finding]:
    """Yield how a merged checkpoint differs from the base and the update of the adapter."""
    fits: dict[str, Fit] = {}
    still: dict[str, bool] = {}  # of modules that cannot be compared: whether the weight is the base's
    rslora = bool(facts.settings is not None and facts.settings.use_rslora)
    for path in console.track([path for path in base.names if path in merged.names], "verify", "merged"):
        module, update = facts.modules[path], _update_of(facts, base, path)
        W, M = (at.matrix(path, update.shape) if update is not None else None for at in (base, merged))
        if update is None or W is None or M is None:
            still[path] = _same_values(base.facts, base.names[path], merged.facts, merged.names[path])
            continue
        fits[path] = found = fit_merge(W, M, update, module.rank or update.blocks[0].rank, rslora)
        row = rows[path]
        row.fit, row.factor, row.residual = found.kind, found.factor, found.residual
        row.erased = found.lost / found.norm if found.norm else None
        if not bool(torch.isfinite(M).all()):
            text = f"'{path}': the merged weight has NaN or infinite values"
            yield Finding("broken", "merged-not-finite", text, "merge in bf16 or fp32", (path,))
    absent = [path for path in base.names if merged.lacks(path)]
    if absent:
        text = f"the checkpoint has no weight of {shorten_names(absent)}"
        yield Finding("broken", "not-in-merged", text, "merge into the same base", tuple(absent))
    both = {*base.names} & {*merged.names}
    still |= {path: False for path in facts.modules if path not in both and path not in absent and not base.lacks(path)}
    lost = _lost(base, merged)
    if lost:
        text = f"the checkpoint lacks weights of the base: {shorten_names(lost)}"
        yield Finding("broken", "lacking", text, "save the whole model", tuple(lost[:20]))
    # Names that are not understood may be those of adapted modules.
    apart, another = _unadapted(facts, base, merged) if base.knows(facts) and merged.knows(facts) else ([], False)
    if another:
        text = f"{shorten_names(apart)}: weights that the adapter does not touch differ from the base: it was merged into another"
        yield Finding("broken", "other-base", text, "give the base it was merged into", tuple(apart[:20]))
    elif apart:
        text = f"{shorten_names(apart)}: differs from the base and belongs to no adapter"
        fix = "find out where it was trained, and name it in modules_to_save"
        yield Finding("suspicious", "foreign-change", text, fix, tuple(apart))
    if still and all(still.values()):
        text = f"no weight of the {len(still)} adapted modules differs from the base: nothing was merged"
        yield Finding("broken", "unmerged", text, f"merge the adapter into the base: {MERGE_COMMAND}", tuple(still))
    elif still:
        text = f"{shorten_names([*still])}: not compared, as the files do not determine the update or the weight"
        fix = "compare the answers of adapter and checkpoint on a probe"
        yield Finding("suspicious", "not-compared", text, fix, tuple(still))
    yield from _updates(facts, base, merged, fits, another)
    yield from _rounding(fits)
    yield from _heads(facts, base, merged)
    yield from tokenizers(merged.facts, base.facts, "the checkpoint")


def _update_of(facts: Facts, base: Located, path: str) -> Update | None:
    """Return the update of a module. peft makes a PiSSA start again when it loads, so that D = s (B A - B0 A0)."""
    update = update_of(facts, facts.modules[path])
    if update is None or facts.settings is None or str(facts.settings.init_lora_weights).lower() != "pissa":
        return update
    W, block = base.matrix(path, update.shape), update.blocks[0]
    if W is None or len(update.blocks) > 1 or not block.scale:
        return None
    A0, B0 = principal(W, len(block.A), block.scale, torch.Generator())
    factors = torch.cat([block.B.to(B0), -B0], 1), torch.cat([block.A.to(A0), A0])
    return replace(update, blocks=(LowRank(*factors, scale=block.scale),))


def _updates(facts: Facts, base: Located, merged: Located, fits: Mapping[str, Fit], another: bool) -> Iterable[Finding]:
    """Yield the faults of the merged updates. another: Whether the base is another one, which explains other differences."""
    groups: dict[Finding, list[str]] = defaultdict(list)
    for path, found in fits.items():
        judged = _judged(facts, base, merged, path, found) if found.kind != "other" or not another else None
        if judged is not None:
            groups[judged].append(path)
    for judged, paths in groups.items():
        every = "all" if len(paths) == len(fits) else f"{len(paths)} of {len(fits)}"
        yield replace(judged, text=f"{judged.text} in {every} modules: {shorten_names(paths)}", modules=tuple(paths))


def _judged(facts: Facts, base: Located, merged: Located, path: str, found: Fit) -> Finding | None:
    """Return the finding for the fit of one module. None if it was merged right."""
    if found.kind == "factor" and found.factor is not None:
        factor = round(found.factor, 2)
        code = "unmerged" if factor == 0 else "merged-twice" if "merged twice" in found.rule else "scale"
        text = f"{found.rule or 'no known mistake'}: the checkpoint holds {factor:g} times the update"
        fix = f"merge the adapter into the base once: {MERGE_COMMAND}, with the scale of its settings"
        if facts.settings is not None:
            kind = ", rsLoRA" if facts.settings.use_rslora else ""
            fix += f" (alpha {facts.settings.lora_alpha:g}, rank {facts.settings.r}{kind})"
        return Finding("broken", code, text, fix)
    if found.kind == "none" and not _same_values(base.facts, base.names[path], merged.facts, merged.names[path]):
        text, fix = "the update is zero, and the weight differs from the base", f"merge again: {MERGE_COMMAND}"
        return Finding("broken", "not-this-adapter", text, fix)
    if found.kind == "unresolved":
        text = "the update is below the resolution of the checkpoint's dtype"
        return Finding("note", "unresolved", text, "merge in a wider dtype")
    if found.kind == "other":
        code, text = _explained(facts, base, merged, path, found)
        return Finding("broken", code, text, f"merge this adapter into this base again: {MERGE_COMMAND}")
    return None


def _explained(facts: Facts, base: Located, merged: Located, path: str, found: Fit) -> tuple[str, str]:
    """Return code and text that explain M - W if it is not a multiple of the update of this module."""
    update = _update_of(facts, base, path)
    assert update is not None
    W, M = base.matrix(path, update.shape), merged.matrix(path, update.shape)
    assert W is not None and M is not None
    E = M.to(torch.promote_types(M.dtype, torch.float32)) - W.to(torch.promote_types(M.dtype, torch.float32))
    own = abs(found.cosine)
    if update.shape[0] == update.shape[1] and _cosine(update, E.T) > max(0.3, 3 * own):
        return "transposed", "the update was added transposed"
    rows = slice(0, min(GRID_ROWS, len(E)))
    wide, few = E.dtype, E[rows]
    D = update.step(W[rows].to(wide), rows, 1.0)
    if update.magnitude is not None and (few - update.delta(rows).to(wide)).norm() < 0.5 * (few - D).norm():
        return "dora", "the magnitudes of DoRA were left out"
    for values, what in ((M[rows].to(wide), "the merged weight"), (M[rows].to(wide) - D, "the base")):
        bits = _bits(values)
        if bits and not _bits(W[rows].to(wide)):
            return "quantized", f"{what} was rounded to {bits} bits and back"
    others = [module for other, module in facts.modules.items() if other != path and shape_of(module) == update.shape]
    alike = (update_of(facts, module) for module in others)
    if own < 0.3 and any(other is not None and _cosine(other, E) > 0.5 for other in alike):
        return "swapped", "the update of another module of the adapter was added"
    third, rest = divmod(update.shape[0], 3)
    if not rest and any(word in path for word in FUSED):
        parts = [float(rows.norm()) for rows in E.split(third)]
        if min(parts) < 1e-3 * max(parts):
            return "slice-missing", "only a part of the rows of a fused projection was merged"
    if found.cosine > 0.3:
        return "another-update", "there is more than the update of this adapter (another base, adapter or training)"
    return "not-this-adapter", "the difference from the base is not the update of this adapter"


def _bits(values: Tensor) -> int:
    """Return 8 or 4 if the rows lie on a grid of as many bits (NF4 counts as 4), or else 0."""
    most = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
    for bits in (4, 8):
        places = values / most * (2 ** (bits - 1) - 1)
        if float((places - places.round()).abs().mean()) < 0.1:  # 0.25 by chance
            return bits
    from vismt.llm.pissa.quantized import nf4

    return 4 if float((nf4(values) - values).norm()) < 0.03 * float(values.norm()) else 0  # 0.09 by chance


def _cosine(update: Update, E: Tensor) -> float:
    sizes = update.norm() * float(E.norm())
    return update.product(E) / sizes if sizes else 0.0


def _rounding(fits: Mapping[str, Fit]) -> Iterable[Finding]:
    lost, whole = (sum(getattr(found, name) ** 2 for found in fits.values()) for name in ("lost", "norm"))
    share = (lost / whole) ** 0.5 if whole else 0.0
    text = f"rounding to the checkpoint's dtype takes {100 * share:.0f} % of the update (as norms)"
    if share > LOST:
        yield Finding("suspicious", "rounded-away", text, "merge in fp32, or serve the adapter apart")
    elif share > 0.01:
        yield Finding("note", "rounding", text)
    coarse = max((found.resolution for found in fits.values() if found.kind == "right"), default=0.0)
    if coarse > 0.1:
        text = f"a scale that is wrong by less than {100 * coarse:.0f} % cannot be seen in this dtype"
        yield Finding("note", "resolution", text)


def _lost(base: Located, merged: Located) -> list[str]:
    """Return the weights of the base that a merged checkpoint lacks, if no library says what it needs."""
    if merged.library is not None:
        return []
    shared = locate_all(base.facts, merged.facts)
    tables = any(name.endswith(TABLES) for name in merged.facts.tensors)  # a head may be tied to them
    return [
        name
        for name in base.facts.tensors.keys() - shared.keys()
        if not name.endswith("num_batches_tracked") and not (tables and name.endswith(TABLES))
    ]


def _trained(facts: Facts, base: Located) -> Callable[[str], bool]:
    """Return whether an adapter may change a weight of its base, by the name of the weight."""
    adapted = {*base.names.values()}
    adapted |= {name for name, parts in base.checkpoint.parts.items() if adapted & {*parts}}
    named = {tensor.path for tensor in facts.with_role("saved", "shared")}
    named |= {f"{tensor.path}.bias" for tensor in facts.with_role("bias")}
    named |= {f"{tensor.path}.weight" for tensor in facts.with_role("tokens")}
    settings = facts.settings
    promised = texts(settings.modules_to_save) if settings is not None else []
    stacks = (settings.target_parameters if settings is not None else None) or []
    tied = any(name.endswith(TABLES) for name in adapted | named)

    def trained(name: str) -> bool:
        path = name.removesuffix(".weight")
        return (
            name in adapted
            or any(same_parameter(path, name) for path in named)
            or any(f".{module}." in f".{name}" for module in promised)
            or (settings is not None and (settings.names(path) or (settings.bias != "none" and name.endswith("bias"))))
            or (tied and name.endswith(TABLES))
            or (base.library is None and names_stack(stacks, path))
        )

    return trained


def _unadapted(facts: Facts, base: Located, merged: Located) -> tuple[list[str], bool]:
    """Return the names of weights outside the adapter that differ from the base, and whether most matrices are among them."""
    trained = _trained(facts, base)
    shared = locate_all(base.facts, merged.facts)
    made = {part for parts in base.checkpoint.parts.values() for part in parts}
    apart, compared, matrices = [], 0, 0
    for name, theirs in shared.items():
        if name in made or trained(name):
            continue
        plain = len(base.facts.tensors[name].shape) < 2  # norms and biases start equal in every model
        compared += not plain
        if not _same_values(base.facts, name, merged.facts, theirs):
            apart.append(name)
            matrices += not plain
    return apart, bool(compared) and matrices >= max(2, 0.5 * compared)


def locate_all(base: Facts, merged: Facts) -> dict[str, str]:
    """Return the names of the base's tensors in another checkpoint, whose names may have another beginning."""
    names = merged.tensors
    if base.tensors.keys() & names.keys():
        return {name: name for name in base.tensors if name in names}
    by_end = {name: name for name in names} | {name.partition(".")[2]: name for name in names}
    return {name: by_end[end] for name in base.tensors if (end := name.partition(".")[2]) in by_end}


def _same_values(base: Facts, name: str, merged: Facts, other: str) -> bool:
    W, M = base.stored.read(name), merged.stored.read(other)
    if W is None or M is None:
        return True
    if W.shape != M.shape and W.ndim == M.ndim and W.shape[1:] == M.shape[1:]:  # a vocabulary that was resized
        rows = min(len(W), len(M))
        W, M = W[:rows], M[:rows]
    return W.shape == M.shape and equal(W, M)


def _heads(facts: Facts, base: Located, merged: Located) -> Iterable[Finding]:
    """Yield findings for whole parameters of the adapter, and rows of embeddings, that the checkpoint does not hold."""
    for tensor in facts.with_role("saved", "tokens"):
        if tensor.name.endswith(".base_layer.weight"):  # peft's copy of an embedding
            continue
        rows = tensor.role == "tokens"
        path = f"{tensor.path}.weight" if rows else tensor.path
        tied = [
            path,
            *(one for group in (merged.library.tied if merged.library else ()) if path in group for one in group),
        ]
        name = next((name for name in tied if name in merged.facts.tensors), find_parameter(path, merged.facts))
        value, M = facts.stored.read(tensor.name), merged.facts.stored.read(name) if name is not None else None
        if rows and M is not None and name is not None:
            chosen = [row for row in token_rows(facts, tensor.path) if 0 <= row < len(M)]
            rest = [row for row in range(len(M)) if row not in set(chosen)]
            W = base.facts.stored.read(name) if name in base.facts.tensors else None
            if W is not None and W.shape == M.shape and not equal(W[rest], M[rest]):
                text = f"'{name}': rows that were not trained differ from the base"
                yield Finding("suspicious", "foreign-change", text, "merge again", (name,))
            M = M[chosen]
        if value is not None and (M is None or M.shape != value.shape or not equal(value, M)):
            what = "is not in the checkpoint" if M is None else "has other values in the checkpoint"
            text = f"'{tensor.path}', which was trained whole, {what}"
            yield Finding("broken", "head-not-merged", text, "merge again", (tensor.path,))
