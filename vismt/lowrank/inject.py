"""Adapted modules in place of stock ones, and back: one plan (Site) a module, one record a model.

`inject` is what every method with factors calls: targets -> sites -> hosts -> start values -> freezing. It either
changes the model as a whole or, on a UserError, not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.adapter_layer import Host
from vismt.lowrank.backups import set_aside
from vismt.lowrank.layer_spec import AdaptReport, Site, plan_site
from vismt.lowrank.linear import Adapted, AdaptedConv2d, AdaptedLinear
from vismt.lowrank.options import checked
from vismt.lowrank.permutation import couple, movable
from vismt.lowrank.quantized import QuantizedConv2d, QuantizedLinear
from vismt.lowrank.slice_linear import SlicedLinear
from vismt.lowrank.targets import Targets, check_patterns, find_targets, matches, pattern_value
from vismt.lowrank.threads import each
from vismt.lowrank.wrappers import Part, described, need_idle, put, replace, take_out, to_stock

# (weight (o, i), rank, scale, generator) -> (A (r, i), B (o, r)), called once per output block.
Initialiser = Callable[[Tensor, int, float, torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class AdaptRecord:
    """What an adapted model remembers of its adaptation: enough to save it, to undo it and to refuse a second one."""

    method: str
    sites: list[Site]
    options: dict[str, Any]
    required_grad: dict[str, bool]
    also_train: dict[str, Tensor]  # parameter name -> its value before adaptation
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> type and settings of a part


def inject(
    model: nn.Module,
    method: str,
    init: Initialiser | Mapping[str, Initialiser],
    *,
    offset: bool,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    exclude: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    clamp_rank: bool = False,
    split_qkv: bool = False,
    dropout: float = 0.0,
    also_train: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
    core: str = "",
    experts: int | None = None,
    grid: str = "",
) -> AdaptReport:
    """Adapt `model` in place; only the factors and `also_train` keep a gradient.

    init: the start values of every module, or a mapping that has its own for each path.
    alpha: numerator of the scale alpha / rank (alpha / sqrt(rank) with rslora); None means alpha = rank.
    rank_pattern, alpha_pattern: {full-path regex or suffix: value}, first match wins.
    exclude, also_train: module paths, parameter names, suffixes or full-path regexes, one text or a list; what
    also_train names stays trainable and is saved along.
    dtype: of the factors, also by name; None means the weight's own, fp32 where that is bf16 or fp16.
    core: "full" or "diagonal" for a trained core between the factors of each block, which starts at zero.
    experts: the rank is so many groups, gated by `instance_gates`; each has the scale alpha / (its own rank).
    grid: one of nf4.GRIDS puts what 4 bits hold of W less the start below the update, see quantized.py.
    """
    given = checked(
        {
            "targets": targets,
            "rank": rank,
            "alpha": alpha,
            "exclude": exclude,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "rslora": rslora,
            "clamp_rank": clamp_rank,
            "split_qkv": split_qkv,
            "dropout": dropout,
            "also_train": also_train,
            "dtype": dtype,
        }
    )
    refuse_adapted(model)
    found, remarks = find_targets(model, given["targets"], given["exclude"])
    check_patterns("adapt.rank_pattern", given["rank_pattern"], list(found))
    check_patterns("adapt.alpha_pattern", given["alpha_pattern"], list(found))
    plan = [
        plan_site(
            path,
            module,
            pattern_value(path, given["rank_pattern"], given["rank"]),
            pattern_value(path, given["alpha_pattern"], given["alpha"]),
            rslora=rslora,
            clamp_rank=clamp_rank,
            split_qkv=split_qkv,
            core=core,
            experts=experts,
            grid=grid,
        )
        for path, module in found.items()
    ]
    kept = also_trained(model, given["also_train"], list(found))
    hosts = install(model, method, plan, {"dropout": dropout, "seed": seed}, kept, dtype=given["dtype"])
    try:
        _start(hosts, plan, init, seed, offset)
    except BaseException:
        unadapt(model)
        raise
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return AdaptReport(method, plan, trainable, sum(p.numel() for p in parameters), remarks)


def refuse_adapted(model: nn.Module, what: str = "adapt") -> None:
    """Neither the model nor a part of it may be adapted already."""
    for path, module in model.named_modules():
        record = record_of(module)
        if record is not None or isinstance(module, (Host, Part)):
            where = f"its part '{path}' already carries" if path else "the model already carries"
            raise UserError(f"{what}: {where} '{record.method if record else 'an update'}'; merge or unadapt it first.")


def refuse_switched(model: nn.Module, what: str = "adapt") -> None:
    """Nor may a switch of S2FT adapters be in force: undoing it would overwrite what is trained or merged meanwhile."""
    for path, module in model.named_modules():
        if getattr(module, "vismt_switched", None):
            where = f"its part '{path}'" if path else "the model"
            told = f"{where} is switched to S2FT slices"
            raise UserError(
                f"{what}: {told}; call vismt.llm.switch(..., None) first, or load_adapter and merge to keep them."
            )


def install(
    model: nn.Module,
    method: str,
    sites: Sequence[Site],
    options: dict[str, Any],
    also_train: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
) -> list[Host]:
    """Place a host at every site, freeze the rest but `also_train` (parameter names), and leave the record."""
    refuse_switched(model)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    originals = set_aside({name: model.get_parameter(name) for name in also_train})
    structures = movable(model, [site.path for site in sites if site.mode == "permute"])
    hosts = [place(model, site, dropout=options.get("dropout", 0.0), dtype=dtype) for site in sites]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in originals or name not in required)
    couple(model, structures, {site.path: host for site, host in zip(sites, hosts)})
    model.vismt_record = AdaptRecord(method, list(sites), options, required, originals)
    return hosts


def record_of(model: nn.Module) -> AdaptRecord | None:
    """The record of an adapted model, None for a stock one."""
    return getattr(model, "vismt_record", None)


def need_record(model: nn.Module, what: str) -> AdaptRecord:
    """The record, or a UserError that says that there is nothing to `what`."""
    record = record_of(model)
    if record is None:
        raise UserError(f"{what}: this model is not adapted; call vismt.adapt or vismt.load_adapter on it first.")
    return record


def merge(model: nn.Module) -> nn.Module:
    """Fold every update into its weight: stock classes, stock keys, the same function. Returns the model.

    Raises UserError, and leaves the model as it is, where the model does more than a merged weight can (a router).
    """
    record = need_record(model, "merge")
    need_idle(model, "merge")
    to_stock(model)
    take_out(model)
    replace(model, Host, lambda host: host.merged())
    _forget(model, record)
    return model


def unadapt(model: nn.Module) -> nn.Module:
    """Give back the original modules, weights (bit for bit) and gradient flags. Returns the model."""
    record = need_record(model, "unadapt")
    to_stock(model)
    take_out(model)
    replace(model, Host, lambda host: host.restored())
    with torch.no_grad():
        for name, value in record.also_train.items():
            model.get_parameter(name).copy_(value)
    _forget(model, record)
    return model


def _forget(model: nn.Module, record: AdaptRecord) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(name, True))
    del model.vismt_record


def also_trained(model: nn.Module, patterns: Sequence[str], adapted: Sequence[str]) -> list[str]:
    """Names of the parameters that `patterns` keep trainable; every pattern must match one, none may be adapted."""
    owners = {
        name: [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        for name, _ in model.named_parameters()
    }
    check_patterns("adapt.also_train", patterns, sorted({path for paths in owners.values() for path in paths}))
    names = [name for name, paths in owners.items() if any(matches(p, path) for p in patterns for path in paths)]
    for name in names:
        if name in {f"{path}.weight" for path in adapted}:
            raise UserError(f"adapt.also_train: '{name}' is adapted; train the update or the weight, not both.")
    return names


def train_along(model: nn.Module, names: Sequence[str]) -> None:
    """Note parameters of an adapted model as trained along, so that they are saved and exported; undoing leaves them."""
    need_record(model, "train_along").also_train.update(
        {name: model.get_parameter(name).detach().clone() for name in names}
    )


def site_generator(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on (seed, path) alone, so the start of a module does not depend on the others."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def place(model: nn.Module, site: Site, *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> Host:
    """Put the host of `site` where the stock module stands, under every name it has; its update is left unset."""
    base = model.get_submodule(site.path)
    if site.dim is not None:
        host = SlicedLinear(base, site.rank, site.dim, site.mode, dtype=dtype)
    else:
        plain, quantized = (
            (AdaptedConv2d, QuantizedConv2d) if site.kind == "conv2d" else (AdaptedLinear, QuantizedLinear)
        )
        host = (partial(quantized, grid=site.grid) if site.grid else plain)(
            base,
            site.rank,
            site.scale,
            blocks=site.blocks,
            core=site.core_shape,
            dropout=dropout,
            dtype=dtype,
            experts=site.experts,
        )
    put(model, site.path, host)
    return host


def attach(model: nn.Module, path: str, part: Part) -> None:
    """Put a part in its place, and note it in the model's record."""
    need_record(model, "attach").parts[path] = described(part)
    part.join(model, path)


def _start(
    hosts: Sequence[Adapted],
    plan: Sequence[Site],
    init: Initialiser | Mapping[str, Initialiser],
    seed: int,
    offset: bool,
) -> None:
    """Fill all hosts, on the CPU several at a time."""

    def fill(pair: tuple[Adapted, Site]) -> None:
        host, site = pair
        initialise(host, site, init[site.path] if isinstance(init, Mapping) else init, seed, offset=offset)

    pairs = list(zip(hosts, plan))
    if all(host.weight.device.type == "cpu" for host in hosts):
        each(fill, pairs)
    else:
        for pair in pairs:
            fill(pair)


@torch.no_grad()
def initialise(host: Adapted, site: Site, init: Initialiser, seed: int, *, offset: bool) -> None:
    """Fill a host's factors block by block; on the meta device there is nothing to fill."""
    if host.weight.is_meta:
        if offset:
            host.set_factors(host.lora_A, host.lora_B, True)
        return
    generator = site_generator(seed, site.path)
    try:
        pairs = [
            init(rows, site.rank, site.scale, generator) for rows in host.matrix(host.weight).split(site.blocks, 0)
        ]
        whole = all(bool(factor.isfinite().all()) for pair in pairs for factor in pair)
    except torch.linalg.LinAlgError:
        whole = False
    if not whole:
        raise UserError(f"adapt: '{site.path}' gets no finite start values; its weight is infinite or NaN somewhere.")
    host.set_factors(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs]), offset)


def adapted_modules(model: nn.Module) -> dict[str, Host]:
    """Every host of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Host)}
