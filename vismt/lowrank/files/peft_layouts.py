"""Factors of weights that a module reads itself (parameter_modules.py) in peft's files: other keys, another order (peft 0.21).

experts     owner.lora_A (e*r, i), owner.lora_B (o, r*e), the expert last; one `base_layer` deeper for each parameter of the
            owner that is adapted and declared later; named in target_parameters
attention   in_proj_weight at the path of the nn.MultiheadAttention, out_proj below its base_layer: both, with one rank; the
            attention is named in target_modules, and out_proj alone would be passed by

Up to version 0.21, peft adds the update of an attention's out_proj twice, in training too. A file of such a version is read in
this way. No such file is written, because a later peft would apply half of the update.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.parameter_modules import declared, is_attention
from vismt.lowrank.model.targets import suffixes

IN, OUT = "in_proj_weight", "out_proj"


# ---- experts
def stack_keys(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Return by path where peft keeps the factors of each of these parameters. `paths` holds all adapted parameters."""
    keys = {}
    for path in paths:
        owner, _, name = path.rpartition(".")
        if not owner:
            raise UserError(
                f"peft cannot adapt '{path}', a parameter of the model itself; merge the model and save it whole."
            )
        wrapped = [other for other in declared(model.get_submodule(owner)) if f"{owner}.{other}" in paths]
        keys[path] = owner + ".base_layer" * (len(wrapped) - 1 - wrapped.index(name))
    return keys


def stack_tensors(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return A (e, r, i) and B (e, o, r) in peft's layout, by name."""
    return {"lora_A.weight": rearrange(A, "e r i -> (e r) i"), "lora_B.weight": rearrange(B, "e o r -> o (r e)")}


def pad_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (..., rank, i) and B (..., o, rank), filled up with zeros."""
    missing = rank - B.shape[-1]
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def names_stack(owners: Collection[str], key: str) -> bool:
    """Return whether the factors at `key` belong to a parameter of one of `owners`, the modules that target_parameters names."""
    return "" in owners or any(end in owners for end in suffixes(key.replace(".base_layer", "")))


# ---- attention
def attention_paths(model: nn.Module, path: str) -> set[str]:
    """Return the paths of what peft adapts if it is given the path of an attention."""
    return {f"{path}.{IN}", f"{path}.{OUT}"} if is_attention(model.get_submodule(path)) else set()


def stock_path(key: str, keys: Collection[str]) -> tuple[str, str]:
    """Return the path of the weight whose factors are stored at `key`, and the path that peft's settings name."""
    inner = re.fullmatch(rf"(.*)\.base_layer\.{OUT}", key)
    if inner:
        return f"{inner[1]}.{OUT}", inner[1]
    return (f"{key}.{IN}", key) if f"{key}.base_layer.{OUT}" in keys else (key, key)


def refuse_passed_by(what: str, modules: Mapping[str, nn.Module], paths: Collection[str]) -> None:
    """Raise UserError for factors of an out_proj, which peft never applies."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        if name == OUT and f"{owner}.{IN}" not in paths and is_attention(modules.get(owner)):
            raise UserError(
                f"{what}: peft passes the factors of '{path}' by, whose weight nn.MultiheadAttention reads itself; "
                f"train with target_modules '{owner}'."
            )


def added(path: str, version: str | None) -> int:
    """Return how often the peft version that wrote a file adds the update of an attention's weight."""
    known = re.match(r"(\d+)\.(\d+)", version or "")
    old = known is None or (int(known[1]), int(known[2])) <= (0, 21)
    return 2 if old and path.endswith(f".{OUT}") else 1


def with_partners(model: nn.Module, updates: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Return the updates with a zero update of out_proj beside each in_proj_weight, and by path where peft keeps both.

    Raise UserError for weights of attentions whose updates peft cannot store, or stores wrongly.
    """
    complete, keys = dict(updates), dict[str, str]()
    for path, update in updates.items():
        owner, _, name = path.rpartition(".")
        if not is_attention(model.get_submodule(owner)):
            continue
        if name != IN or not owner:
            why = "adds the update twice" if name == OUT else "has no LoRA of this parameter"
            raise UserError(
                f"export_peft: '{path}': peft {why} in nn.MultiheadAttention; exclude it, or merge the model and save it whole."
            )
        columns = update.shape[1]
        zero = LowRank(update.B.new_zeros(columns, update.rank), update.A.new_zeros(update.rank, columns))
        complete[f"{owner}.{OUT}"] = zero
        keys |= {path: owner, f"{owner}.{OUT}": f"{owner}.base_layer.{OUT}"}
    return complete, keys
