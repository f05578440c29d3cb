"""Adapt a model: one LayerSpec for each adapter module, and one record for the model.

Every method with factors calls `inject`, which goes from targets to specs, layers, start values and freezing. It changes the
model as a whole. On a UserError it changes nothing. The arguments of the user are checked once, before anything is touched.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, need_names, require_known, shown_value
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.parameter_modules import to_modules
from vismt.lowrank.layers.stock_modules import is_prequantized, use_cpu_kernel
from vismt.lowrank.model.merge import freeze, undo, watch_saving
from vismt.lowrank.model.modules import attach_all, attach_modules, prepare_modules
from vismt.lowrank.model.record import (
    RECORD,
    AdaptRecord,
    AdaptReport,
    backup_tensors,
    count_parameters,
    need_record,
    refuse_adapted,
    refuse_offloaded,
    sample,
)
from vismt.lowrank.model.starts import Initialiser, start_layers
from vismt.lowrank.model.targets import Targets, containers, find_targets, match_patterns, pattern_values

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Options of `inject` that users give with any method, with their defaults.
COMMON: dict[str, Any] = {"exclude": (), "also_train": (), "rank_pattern": {}, "alpha_pattern": {}}
COMMON |= {"rslora": False, "clamp_rank": False, "split_qkv": False, "dropout": 0.0, "dtype": None}
FROZEN = "frozen"  # key of a record's options
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommonOptions(TypedDict, total=False):
    """Types of `COMMON`."""

    exclude: str | Sequence[str]
    also_train: str | Sequence[str]
    rank_pattern: Mapping[str, int] | None
    alpha_pattern: Mapping[str, float] | None
    rslora: bool
    clamp_rank: bool
    split_qkv: bool
    dropout: float
    dtype: torch.dtype | str | None


class InjectOptions(CommonOptions, total=False):
    """Options that the function of a method passes on to `inject`."""

    rank: int
    alpha: float | None


class LayerChoice(TypedDict, total=False):
    """Arguments by which a method has layers of its own."""

    layer: type[LowRankLayer]
    settings: Mapping[str, object]


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
    layer: type[LowRankLayer] = LowRankLayer,
    settings: Mapping[str, Any] | None = None,
    **options: Unpack[CommonOptions],
) -> AdaptReport:
    """Adapt `model` in place. Only the factors and `also_train` keep a gradient.

    The method gives the first arguments. The user gives the options from `rslora` on (`COMMON`).

    Args:
        model: Any module.
        method: Name of the method in the record.
        init: Start values of every module, or a mapping with one entry for each path.
        offset: Whether the start is subtracted, so that the model starts as it was.
        targets: Modules to adapt, see vismt.lowrank.model.targets.
        rank: Rank of each block.
        alpha: Numerator of the scale alpha / rank (alpha / sqrt(rank) with rslora). None means alpha = rank.
        seed: Seed of the start values, together with each module's path.
        layer: Class of the layers.
        settings: Fields of the layer's `Settings` beyond rank, scale and blocks.
        rslora: Whether alpha is divided by sqrt(rank).
        clamp_rank: Whether a rank that does not fit is lowered.
        split_qkv: Whether q, k and v of a fused projection get a pair of factors each.
        dropout: Probability of dropout on the input of the update.
        rank_pattern, alpha_pattern: Values by full-path regex or suffix. The first match wins.
        exclude, also_train: Module paths, parameter names, suffixes or full-path regexes, as one text or a list. What
            also_train names stays trainable and is saved with the factors.
        dtype: Dtype of the factors, also by name. None means the weight's own dtype, or fp32 if that is bf16 or fp16.

    Raises:
        UserError: If an option has a wrong type or is out of range, or a module cannot be adapted. Nothing is changed then.
    """
    checked = check_options({**options, "targets": targets, "rank": rank, "alpha": alpha})
    refuse_adapted(model)
    # A start that needs the inputs of a module is not possible for a weight that is read without a call.
    needs_calls = checked["dropout"] or isinstance(init, Mapping) or (settings or {}).get("experts")
    kinds = {"prequantized": layer.takes_prequantized, "readable": layer.weight_readable and not needs_calls}
    modules, remarks = find_targets(model, checked["targets"], checked["exclude"], **kinds)
    ranks = pattern_values("adapt.rank_pattern", checked["rank_pattern"], modules)
    alphas = pattern_values("adapt.alpha_pattern", checked["alpha_pattern"], modules)
    flags = {name: checked[name] for name in ("rslora", "clamp_rank", "split_qkv")}
    specs = []
    for path, module in modules.items():
        own_rank, own_alpha = ranks.get(path, checked["rank"]), alphas.get(path, checked["alpha"])
        specs.append(layer.plan(path, module, own_rank, own_alpha, **flags, **(settings or {})))
    names = also_trained(model, checked["also_train"], list(modules))
    recorded = {"dropout": checked["dropout"], "seed": seed}
    layers: Any = install(model, method, specs, recorded, names, dtype=checked["dtype"])
    with undone_on_error(model):
        start_layers(layers, specs, init, seed, offset)
    if any(layer.weight.is_meta for layer in layers):
        need_record(model, "adapt").start = (init, seed, offset)
    return AdaptReport(method, specs, *count_parameters(model), remarks)


def install(
    model: nn.Module,
    method: str,
    specs: Sequence[LayerSpec],
    options: dict[str, Any],
    also_train: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
) -> list[AdapterModule]:
    """Place the module of every spec, freeze all parameters but `also_train` (parameter names), and leave the record.

    On an error the model is left as it was.
    """
    refuse_offloaded(model, "adapt")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    stock = {id(parameter) for parameter in model.parameters()}
    originals = backup_tensors({name: model.get_parameter(name) for name in also_train})
    finish = prepare_modules(model, specs)
    record = AdaptRecord(method, list(specs), options, required, originals)
    setattr(model, RECORD, record)
    dropout = options.get("dropout", 0.0)
    with undone_on_error(model):
        freeze(model)
        to_modules(model, [spec.path for spec in specs if spec.has_weight])
        use_cpu_kernel(model, False)
        modules = attach_modules(
            model, specs, lambda spec, base: spec.layer.build(base, spec, dropout=dropout, dtype=dtype)
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in originals or id(parameter) not in stock)
        if FROZEN in options:  # of an adapter file
            freeze_tensors(model, options[FROZEN])
        finish(modules)
        record.frozen = {
            name: sample(value)
            for name, value in model.named_parameters()
            if name in required and name not in originals and not value.is_meta and not is_prequantized(value)
        }
    watch_saving(model)
    return list(modules.values())


def freeze_tensors(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the tensors of these names in every layer of an adapted model, and record that for its adapter file."""
    need_record(model, "adapt").options[FROZEN] = list(names)
    for layer in adapter_layers(model).values():
        for name, value in layer.named_parameters(recurse=False):
            value.requires_grad_(value.requires_grad and name not in names)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Undo the adaptation of the model if an error ends the block."""
    try:
        yield
    except BaseException:
        undo(model)
        raise


def also_trained(model: nn.Module, patterns: Sequence[str], adapted: Sequence[str]) -> list[str]:
    """Return the names of the parameters that `patterns` keep trainable. Raise UserError for a pattern without a match."""
    names = matched_parameters(model, "adapt.also_train", patterns)
    taken = {*adapted, *(f"{path}.weight" for path in adapted)}
    for name in names:
        if name in taken:
            raise UserError(f"adapt.also_train: '{name}' is adapted; train the update or the weight, not both.")
    return check_trained_whole(model, "adapt.also_train", names)


def matched_parameters(model: nn.Module, key: str, patterns: Sequence[str]) -> list[str]:
    """Return the names of parameters that match, or that lie in a module that matches.

    Raise UserError for a pattern without a match.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters())  # named_parameters lists a tied parameter once, under its first name
    tied = {name: [name, name.rpartition(".")[0]] for name in every if name not in own}
    paths = [path for name in own for path in containers(name)] + [path for both in tied.values() for path in both]
    matched = {path for found in match_patterns(key, patterns, dict.fromkeys(paths)).values() for path in found}
    for name, both in tied.items():
        if not matched.isdisjoint(both):
            first = next(other for other, value in own.items() if value is every[name])
            raise UserError(f"{key}: '{name}' is tied to '{first}'; name that one.")
    return [name for name in own if not matched.isdisjoint(containers(name))]


def check_trained_whole(model: nn.Module, key: str, names: Sequence[str]) -> list[str]:
    """Return the names of parameters that are trained themselves.

    Raise UserError for packed parameters, warn of half precision.
    """
    for name in names:
        parameter = model.get_parameter(name)
        if is_prequantized(parameter) or not parameter.is_floating_point():
            raise UserError(f"{key}: '{name}' is packed (quantised) and cannot be trained; adapt its module.")
    warn_of_rounding(key, {name: model.get_parameter(name) for name in names})
    return list(names)


def warn_of_rounding(what: str, trained: Mapping[str, Tensor]) -> None:
    """Warn of half-precision weights that are trained in place. A step below half the spacing of a weight changes nothing."""
    name, half = next(((name, p) for name, p in trained.items() if p.dtype.itemsize < 4), ("", None))
    if half is not None:
        warnings.warn(
            f"{what}: '{name}' is trained in {half.dtype}, where steps below half the spacing of a weight are lost; load the "
            "model in float32 and run it under torch.autocast.",
            stacklevel=4,
        )


def train_along(model: nn.Module, names: Sequence[str]) -> None:
    """Add parameters of an adapted model to `also_train`, so that they are saved and exported. Undoing leaves their values."""
    record = need_record(model, "train_along")
    record.also_train.update({name: model.get_parameter(name).detach().clone() for name in names})


def attach(model: nn.Module, modules: Mapping[str, AdapterModule], settings: Mapping[str, object]) -> None:
    """Put adapter modules other than layers in their places of an adapted model, and record them with their settings, by path."""
    specs = [LayerSpec(path, "", (), type(module), settings[path]) for path, module in modules.items()]
    need_record(model, "attach").specs.extend(specs)
    attach_all(model, modules)


def check_options(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options of `inject` with patterns as lists and dtypes as dtypes. Raise UserError for the first wrong option."""
    require_known("adapt: no option", options, ["targets", "rank", "alpha", *COMMON])
    result = COMMON | dict(options)
    for name in ("exclude", "also_train"):
        result[name] = need_names(f"adapt.{name}:", result[name])
    for name in ("rslora", "clamp_rank", "split_qkv"):
        if not isinstance(result[name], bool):
            raise UserError(f"adapt.{name}: {shown_value(result[name])}; it must be true or false.")
    for name, checked in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        table = result[name] or {}
        if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
            raise UserError(f"adapt.{name}: {shown_value(table)}; give a mapping from pattern to value.")
        result[name] = {key: checked(f"{name}['{key}']", value) for key, value in table.items()}
    result["rank"] = _rank("rank", result["rank"])
    result["alpha"] = None if result["alpha"] is None else _alpha("alpha", result["alpha"])
    dropout = result["dropout"]
    if not _number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"adapt.dropout: {shown_value(dropout)}; it must be a number in [0, 1).")
    result["dtype"] = _dtype(result["dtype"])
    if result["targets"] is not None and not isinstance(result["targets"], str):
        result["targets"] = need_names("adapt.targets:", result["targets"])
    return result


def _number(value: Any) -> TypeGuard[float]:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= sys.float_info.max)  # false for NaN


def _rank(name: str, value: object) -> int:
    if not _number(value) or value != int(value) or value < 1:
        raise UserError(f"adapt.{name}: {shown_value(value)}; it must be a whole number, at least 1.")
    return int(value)


def _alpha(name: str, value: object) -> float:
    if not _number(value) or value <= 0:
        raise UserError(f"adapt.{name}: {shown_value(value)}; it must be a positive number.")
    return float(value)


def _dtype(value: object) -> torch.dtype | None:
    if isinstance(value, str):
        require_known("adapt.dtype:", [value], _DTYPES)
        return _DTYPES[value]
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise UserError(f"adapt.dtype: {shown_value(value)}; give a floating dtype, one of {', '.join(_DTYPES)}.")
    return value
