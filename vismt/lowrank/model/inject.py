"""Adapter layers in place of stock modules, and back: one LayerSpec a module, one record a model.

`inject` is what every method with factors calls: targets -> specs -> layers -> start values -> freezing. It either
changes the model as a whole or, on a UserError, not at all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterLayer, LayerSpec, adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.packed_weights import is_packed, use_cpu_kernel
from vismt.lowrank.layers.parameters import hold, release
from vismt.lowrank.layers.wrappers import (
    ModuleWrapper,
    check_mergeable,
    described,
    from_stock,
    install_module,
    replace,
    to_stock,
    uninstall,
)
from vismt.lowrank.model.backups import backup_tensors, sample
from vismt.lowrank.model.options import checked
from vismt.lowrank.model.record import (
    RECORD,
    SHELF,
    AdaptRecord,
    AdaptReport,
    count_parameters,
    need_record,
    record_of,
    refuse_adapted,
    refuse_offloaded,
    refuse_others,
    refuse_switched,
)
from vismt.lowrank.model.starts import Initialiser, start_layers
from vismt.lowrank.model.targets import Targets, check_patterns, find_targets, matches, pattern_value
from vismt.lowrank.values import need_finite


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
    exclude: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    clamp_rank: bool = False,
    split_qkv: bool = False,
    dropout: float = 0.0,
    also_train: Sequence[str] = (),
    dtype: torch.dtype | str | None = None,
) -> AdaptReport:
    """Adapt `model` in place; only the factors and `also_train` keep a gradient.

    The method gives the first arguments, the user the options from `exclude` on (`options.COMMON`).

    Args:
        model: any module.
        method: name of the method in the record.
        init: start values of every module, or a mapping with one entry for each path.
        offset: whether the start is subtracted, so that the model starts as it was.
        targets: see vismt.lowrank.model.targets.
        rank: of each block.
        alpha: numerator of the scale alpha / rank (alpha / sqrt(rank) with rslora); None means alpha = rank.
        seed: of the start values, together with each module's path.
        layer: class of the layers. settings: fields of its `Settings` beyond rank, scale and blocks.
        rank_pattern, alpha_pattern: {full-path regex or suffix: value}, first match wins.
        exclude, also_train: module paths, parameter names, suffixes or full-path regexes, one text or a list; what
            also_train names stays trainable and is saved with the factors.
        dtype: of the factors, also by name; None means the weight's own, fp32 where that is bf16 or fp16.

    Raises:
        UserError: for options of a wrong type or out of range, and modules that cannot be adapted; nothing is changed.
    """
    options = checked(
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
    # Starts for each module are made from its inputs, which nothing sees where a weight is read without a call.
    formed = layer.forms_weight and not (dropout or isinstance(init, Mapping) or (settings or {}).get("experts"))
    modules, remarks = find_targets(model, options["targets"], options["exclude"], layer.takes_packed, formed=formed)
    check_patterns("adapt.rank_pattern", options["rank_pattern"], list(modules))
    check_patterns("adapt.alpha_pattern", options["alpha_pattern"], list(modules))
    specs = [
        layer.plan(
            path,
            module,
            pattern_value(path, options["rank_pattern"], options["rank"]),
            pattern_value(path, options["alpha_pattern"], options["alpha"]),
            rslora=rslora,
            clamp_rank=clamp_rank,
            split_qkv=split_qkv,
            **(settings or {}),
        )
        for path, module in modules.items()
    ]
    names = also_trained(model, options["also_train"], list(modules))
    layers = install(model, method, specs, {"dropout": dropout, "seed": seed}, names, dtype=options["dtype"])
    with undone_on_error(model):
        start_layers(layers, specs, init, seed, offset)
    if any(layer.weight.is_meta for layer in layers):
        need_record(model, "adapt").start = (init, seed, offset)
    trainable, total = count_parameters(model)
    return AdaptReport(method, specs, trainable, total, remarks)


def install(
    model: nn.Module,
    method: str,
    specs: Sequence[LayerSpec],
    options: dict[str, Any],
    also_train: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
) -> list[AdapterLayer]:
    """Place the layer of every spec, freeze the rest but `also_train` (parameter names), and leave the record.

    On an error the model is left as it was.
    """
    refuse_switched(model)
    refuse_offloaded(model, "adapt")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    stock = {id(parameter) for parameter in model.parameters()}
    originals = backup_tensors({name: model.get_parameter(name) for name in also_train})
    finish = prepare(model, specs)
    record = AdaptRecord(method, list(specs), options, required, originals)
    setattr(model, RECORD, record)
    with undone_on_error(model):
        dropout = options.get("dropout", 0.0)
        hold(model, [spec.path for spec in specs])
        use_cpu_kernel(model, False)
        layers = {spec.path: place(model, spec, dropout=dropout, dtype=dtype) for spec in specs}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in originals or id(parameter) not in stock)
        finish(layers)
        record.frozen = {
            name: sample(value)
            for name, value in model.named_parameters()
            if name in required and name not in originals and not value.is_meta and not is_packed(value)
        }
    watch_saving(model)
    return list(layers.values())


def prepare(model: nn.Module, specs: Sequence[LayerSpec]) -> Callable[[Mapping[str, AdapterLayer]], None]:
    """Check specs on the stock model as a whole, and return what is to be called with the placed layers by path."""
    functions = []
    for layer in dict.fromkeys(spec.layer for spec in specs):
        functions.append(layer.prepare(model, [spec for spec in specs if spec.layer is layer]))

    def finish(layers: Mapping[str, AdapterLayer]) -> None:
        for function in functions:
            if function is not None:
                function(layers)

    return finish


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Undo the adaptation of the model when the block is left by an error."""
    try:
        yield
    except BaseException:
        undo(model)
        raise


def merge(model: nn.Module, *, force: bool = False) -> nn.Module:
    """Fold every update into its weight: stock classes, stock keys, the same function.

    Args:
        model: an adapted model; changed in place.
        force: merge updates and weights with NaN or infinite values too.

    Returns:
        The model.

    Raises:
        UserError: for a stock model, one with further adapters, where merged weights cannot hold the function (a router), and
            for updates or merged weights that are not finite; nothing is changed.
    """
    record = need_record(model, "merge")
    refuse_offloaded(model, "merge")
    refuse_others(model, "merge")
    check_mergeable(model, "merge")
    layers = adapter_layers(model)
    if not force:
        need_finite(
            "merge", {f"{path}.{name}": v for path, layer in layers.items() for name, v in layer.tensors().items()}
        )
    to_stock(model)
    try:
        merged = {path: layer.merged() for path, layer in layers.items()}
        if not force:
            need_finite("merge", {f"{path}.weight": module.get_parameter("weight") for path, module in merged.items()})
    except BaseException:
        from_stock(model)
        for layer in layers.values():
            layer.empty_shell()
        raise
    uninstall(model)
    of_layer = {id(layer): merged[path] for path, layer in layers.items()}
    replace(model, AdapterLayer, lambda layer: of_layer[id(layer)])
    _forget(model, record)
    return model


def undo(model: nn.Module) -> None:
    """Restore the modules, weights (bit for bit) and gradient flags from before the active adapter."""
    record = need_record(model, "unadapt")
    to_stock(model)
    uninstall(model)
    replace(model, AdapterLayer, lambda layer: layer.restored())
    with torch.no_grad():
        for name, value in record.also_train.items():
            model.get_parameter(name).copy_(value)
    _forget(model, record)


SAVE = "save_pretrained"  # of transformers' models


class MergedSave:
    """`save_pretrained` of an adapted model: it writes what `merge` returns, which `from_pretrained` reads.

    The stock function writes the tensors of layers under names that `from_pretrained` leaves out, and so the base. Checkpoints
    of a Trainer, which continues from them on an adapted model, keep these names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> Any:
        module: Any = self.module
        record = record_of(module)
        to_resume = "state_dict" in options and re.fullmatch(r"checkpoint-\d+", Path(save_directory).name)
        if to_resume or (record is not None and not record.sites and not record.wrappers):  # all is in the weights
            return type(module).save_pretrained(module, save_directory, *args, **options)
        if record is None:
            raise UserError(
                f"{SAVE}: this {type(module).__name__} is a part of an adapted model, or several adapters are active; call "
                "vismt.merge(model) on the whole model first, or vismt.save_adapter(model, folder, name=...) for each adapter."
            )
        merged: Any = copy.deepcopy(module)
        merged._modules.pop(SHELF, None)
        state = options.pop("state_dict", None)
        try:
            if state is not None:
                merged.load_state_dict(state)
            merge(merged)
        except (UserError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{SAVE}: {reason} Write the adapter alone: vismt.save_adapter(model, folder).") from error
        merged.__dict__.pop("_keys_to_ignore_on_save", None)  # VismtCallback leaves frozen tensors out of checkpoints
        return merged.save_pretrained(save_directory, *args, **options)


def watch_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of an adapted model of transformers write what the model computes."""
    for module in model.modules():
        if hasattr(type(module), SAVE):
            setattr(module, SAVE, MergedSave(module))


def unwatch_saving(model: nn.Module) -> None:
    """Undo `watch_saving`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(SAVE), MergedSave):
            delattr(module, SAVE)


def _forget(model: nn.Module, record: AdaptRecord) -> None:
    release(model)
    use_cpu_kernel(model, True)
    unwatch_saving(model)
    restore_flags(model, record)
    delattr(model, RECORD)


def restore_flags(model: nn.Module, record: AdaptRecord) -> None:
    """Let a parameter require a gradient if it did before the adaptation."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(name, True))


def also_trained(model: nn.Module, patterns: Sequence[str], adapted: Sequence[str]) -> list[str]:
    """Return the names of the parameters that `patterns` keep trainable; UserError for a pattern without a match."""
    owners = {
        name: [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        for name, _ in model.named_parameters()
    }
    check_patterns("adapt.also_train", patterns, sorted({path for paths in owners.values() for path in paths}))
    names = [name for name, paths in owners.items() if any(matches(p, path) for p in patterns for path in paths)]
    for name in names:
        if name in adapted or name in {f"{path}.weight" for path in adapted}:
            raise UserError(f"adapt.also_train: '{name}' is adapted; train the update or the weight, not both.")
        if is_packed(model.get_parameter(name)):
            raise UserError(
                f"adapt.also_train: '{name}' is packed (quantised) and cannot be trained; adapt its module."
            )
    return names


def train_along(model: nn.Module, names: Sequence[str]) -> None:
    """Add parameters of an adapted model to `also_train`, so that they are saved and exported; undoing leaves them."""
    need_record(model, "train_along").also_train.update(
        {name: model.get_parameter(name).detach().clone() for name in names}
    )


def place(model: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None) -> AdapterLayer:
    """Put the layer of `spec` where the stock module stands, under every name it has; its update is left unset."""
    layer = spec.layer.build(model.get_submodule(spec.path), spec, dropout=dropout, dtype=dtype)
    install_module(model, spec.path, layer)
    return layer


def attach(model: nn.Module, path: str, wrapper: ModuleWrapper) -> None:
    """Put a wrapper in its place, and note it in the model's record."""
    need_record(model, "attach").wrappers[path] = described(wrapper)
    wrapper.attach(model, path)
