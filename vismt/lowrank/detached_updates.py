"""Low-rank updates apart from a model: read from a folder or an adapted model, and put on a stock one as method 'lora'.

What is read is the update against the stock weight, scale L R: a start that is kept is in it (PiSSA, CorDA: rank 2r, [A; A0]
and [B, -B0]), so are cores (PoLAR), blocks (split_qkv) and the gates of one user (iLoRA, inside `instance_gates`). Updates
without such a form are refused: a router that still routes (EMTAL), slices and whole layers (S2FT, LISA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.inject import adapted_modules, install, need_record, refuse_adapted
from vismt.lowrank.layer_spec import Site
from vismt.lowrank.linear import AdaptedLinear
from vismt.lowrank.peft_files import CONFIG, PeftAdapter, read_peft
from vismt.lowrank.quantized import MERGE
from vismt.lowrank.store import (
    DESCRIPTION,
    base_samples,
    check_tensors,
    factor_shapes,
    fill,
    other_base,
    read_adapter,
    same_base,
)
from vismt.lowrank.targets import kind_of, matrix_shape, refusals
from vismt.lowrank.wrappers import need_idle, part_type, stock_order


@dataclass(frozen=True)
class Updates:
    """The updates of one adapter, on the CPU.

    low_rank: by module path; a convolution's is of its weight as a matrix (o, c*kh*kw).
    also_train: whole parameters that were trained along, by name.
    base: some values of the weights it was made for (`store.base_samples`), empty where they are not known.
    peft: what peft wrote, where it comes from there: its settings are to be compared with a model.
    name: of the adapter in messages.
    """

    low_rank: dict[str, LowRank]
    also_train: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, list[float]] = field(default_factory=dict)
    peft: tuple[PeftAdapter, ...] = ()
    name: str = "updates"

    def put_on(self, model: nn.Module, *, on_other_base: str = "error") -> nn.Module:
        """Adapt a stock model with these factors, as method 'lora'. Returns the model.

        The factors are held in the weight's dtype, fp32 where that is bf16 or fp16. on_other_base: see `load_adapter`.
        Raises UserError, and leaves the model as it is, where a path, a shape or the base is not that of the model.
        """
        return put_on(model, self, on_other_base=on_other_base)


def of_peft(adapter: PeftAdapter) -> Updates:
    """The updates of a folder that peft wrote."""
    return Updates(adapter.low_rank, adapter.extras, peft=(adapter,), name=adapter.what)


def put_on(
    model: nn.Module, updates: Updates, options: Mapping[str, Any] | None = None, *, on_other_base: str = "error"
) -> nn.Module:
    """`Updates.put_on`; options: those of the record."""
    what, sites, tensors = updates.name, [], {}
    refuse_adapted(model, what)
    also_train = updates.also_train
    for adapter in updates.peft:
        adapter.need_the_same_modules(model)
        kept = adapter.kept(model)
        also_train = kept if also_train else {}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for path, update in updates.low_rank.items():
        if path not in modules or kind_of(modules[path]) is None:
            raise UserError(f"{what}: {type(model).__name__} has no linear or convolution '{path}'.")
        shape = matrix_shape(modules[path])
        if update.shape != shape:
            raise UserError(f"{what}: '{path}': the update is for a {update.shape} weight, here it is {shape}.")
        plain = update.plain()
        sites.append(Site(path, str(kind_of(modules[path])), shape, plain.rank, plain.scale, (shape[0],)))
        tensors |= {f"{path}.lora_A": plain.R, f"{path}.lora_B": plain.L}
    for reason in refusals(model, updates.low_rank).values():
        raise UserError(f"{what}: {reason}.")
    for name, value in also_train.items():
        if name not in parameters:
            raise UserError(f"{what}: {type(model).__name__} has no parameter '{name}'.")
        if value.shape != parameters[name].shape:
            raise UserError(f"{what}: {name}: saved {tuple(value.shape)}, needed {tuple(parameters[name].shape)}.")
    samples = base_samples(model, [path for path in updates.base if path in modules])
    if not same_base(samples, updates.base):
        other_base(f"{what}: made for other weights than those of this {type(model).__name__}", on_other_base)
    install(model, "lora", sites, dict(options or {}), list(also_train))
    fill(model, {**tensors, **also_train})
    return model


def read_updates(
    source: Updates | nn.Module | str | Path, *, also_train: bool = True, what: str = "updates"
) -> Updates:
    """The updates of a folder that save_adapter, export_peft or peft wrote, or of an adapted model, copied.

    also_train: False leaves out whole parameters that were trained along (a head). what: how messages begin.
    Raises UserError for an update that is not of low rank, see the header, and for damaged files.
    """
    if isinstance(source, Updates):
        found = source
    elif isinstance(source, nn.Module):
        found = _of_model(source, what)
    elif isinstance(source, str | Path):
        found = _of_folder(Path(source), what)
    else:
        raise UserError(f"{what}: {type(source).__name__} is no adapter; give a folder or an adapted model.")
    return found if also_train else replace(found, also_train={})


def _of_model(model: nn.Module, what: str) -> Updates:
    record = need_record(model, what)
    name = f"{what}: '{record.method}' of {type(model).__name__}"
    need_factors(name, record.method, record.sites)
    need_idle(model, what)
    hosts = adapted_modules(model)
    if any(host.weight.is_meta for host in hosts.values()):
        raise UserError(f"{name}: the model lies on the meta device; there are no values to read.")
    with stock_order(model):
        found = {path: _copied(host.low_rank()) for path, host in hosts.items()}
        samples = base_samples(model, found)
    kept = {key: model.get_parameter(key).detach().cpu().clone() for key in record.also_train}
    return Updates(found, kept, samples, name=name)


def _of_folder(folder: Path, what: str) -> Updates:
    if (folder / CONFIG).exists() and not (folder / DESCRIPTION).exists():
        adapter = read_peft(folder)
        if adapter.replay:
            raise UserError(
                f"{what}: {adapter.what}: init_lora_weights 'pissa' changed the base it was trained on; import_peft it on "
                "that base and give the model."
            )
        return of_peft(adapter)
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{what}: '{folder}' is no adapter folder; it has neither {DESCRIPTION} nor {CONFIG}.")
    description, sites, tensors = read_adapter(folder)
    name = f"{what}: adapter '{folder}'"
    need_factors(name, description["method"], sites)
    for path, part in description["parts"].items():
        own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
        part_type(part["type"], name).need_idle_saved(name, path, own)
    wanted = factor_shapes(sites, tensors)
    kept = {key: value for key, value in tensors.items() if key in description["also_train"]}
    beside = tuple(f"{path}." for path in description["parts"])
    factors = {
        key: value
        for key, value in tensors.items()
        if key not in kept and (key in wanted or not key.startswith(beside))
    }
    check_tensors(name, wanted, factors)
    found = {site.path: _of_site(what, site, factors) for site in sites}
    return Updates(found, kept, description["base_samples"], name=name)


def _of_site(what: str, site: Site, tensors: Mapping[str, Tensor]) -> LowRank:
    """What a host of these tensors says of itself; it needs no weight for that."""
    host = AdaptedLinear(
        nn.Linear(*reversed(site.shape), bias=False, device="meta"),
        site.rank,
        site.scale,
        blocks=site.blocks,
        core=site.core_shape,
        experts=site.experts,
    )
    host.need_idle(what, site.path)
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        if path == site.path:
            setattr(host, leaf, value if leaf.endswith("0") else nn.Parameter(value, requires_grad=False))
    return host.low_rank()


def need_factors(what: str, method: str, sites: Iterable[Site]) -> None:
    """UserError for updates that are no pairs of factors."""
    sites = list(sites)
    if not sites:
        raise UserError(f"{what}: '{method}' has no low-rank factors; merge the model and save it whole.")
    if any(site.dim is not None for site in sites):
        raise UserError(
            f"{what}: '{method}' trains rows or columns of the weights, not factors; export_peft writes them as factors."
        )
    refuse_grid(what, method, sites)


def refuse_grid(what: str, method: str, sites: Iterable[Site]) -> None:
    """UserError for updates of quantised weights, which are no factors against the original ones."""
    if any(site.grid for site in sites):
        raise UserError(f"{what}: '{method}' lies on quantised weights; {MERGE}.")


def _copied(update: LowRank) -> LowRank:
    moved = update.to(device="cpu")
    return replace(moved, L=moved.L.clone(), R=moved.R.clone())
