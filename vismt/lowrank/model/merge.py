"""Merge weights, restore the model as it was, and make `save_pretrained` write what the model computes.

Rounding to half precision takes something from an update when it is merged, because W + DeltaW has the spacing of W's numbers:

    erased = |round(W + DeltaW) - (W + DeltaW)|_F / |DeltaW|_F        over all adapted weights together

A bf16 number has 8 significant bits, so an update of 1 % of its weight keeps one or two of them.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterLayer, AdapterModule, adapter_layers
from vismt.lowrank.layers.parameter_modules import to_parameters
from vismt.lowrank.layers.stock_modules import is_prequantized, use_cpu_kernel
from vismt.lowrank.model.modules import check_mergeable, detach_all
from vismt.lowrank.model.record import (
    RECORD,
    SHELF,
    AdaptRecord,
    adapter_names,
    need_record,
    record_of,
    refuse_offloaded,
    refuse_others,
)
from vismt.lowrank.tensors import need_finite

SAVE = "save_pretrained"  # method of transformers' models
TRAIN = "train"  # method of a module


def merge(model: nn.Module, *, force: bool = False) -> nn.Module:
    """Fold every update into its weight. The model then has stock classes and keys, and computes the same function.

    Args:
        model: Adapted model, changed in place.
        force: Whether to merge updates and weights with NaN or infinite values too.

    Returns:
        The model.

    Raises:
        UserError: If the model is a stock model or carries further adapters, merged weights cannot hold its function (a
            router), or values are not finite. Nothing is changed then.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"], rank=8)
        ...  # train
        vismt.merge(model)
    """
    record = need_record(model, "merge")
    refuse_offloaded(model, "merge")
    refuse_others(model, "merge")
    check_mergeable(model, "merge")
    layers = adapter_layers(model)
    if not force:
        tensors = {f"{path}.{name}": v for path, layer in layers.items() for name, v in layer.tensors().items()}
        need_finite("merge", tensors)
    merged = {path: layer.merged() for path, layer in layers.items()}
    if not force:
        need_finite("merge", {f"{path}.weight": module.get_parameter("weight") for path, module in merged.items()})
    detach_all(model, merged)
    forget(model, record)
    return model


@torch.no_grad()
def merged_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a frozen copy in eval mode, with every low-rank update in its weight, for gradients of inputs alone.

    The copy runs the forward and backward of the stock model. It multiplies no factors, and keeps nothing for a
    parameter. Layers that one weight cannot hold (gates of samples, packed weights) stay adapter layers. All other tensors
    except packed weights are shared with the model, so the copy is valid until the weights change.

    Args:
        model: Model with or without adapters. It is not changed.
        dtype: Dtype of the copy's matrices if it runs under autocast to that dtype. Otherwise autocast casts them in every
            forward.
    """
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    plain = [p for p in model.parameters() if not is_prequantized(p)]
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in plain}
    twin = copy.deepcopy(model, shared).eval()
    merged: dict[int, nn.Module] = {}
    for path, layer in [*twin.named_modules(remove_duplicate=False)]:
        if not isinstance(layer, AdapterLayer) or not layer.weight_readable or layer.of_parameter:
            continue
        try:
            layer.check_mergeable("merge", path)
        except UserError:
            continue
        if id(layer) not in merged:
            merged[id(layer)] = layer.merged()
        twin.set_submodule(path, merged[id(layer)])
    for parameter in twin.parameters():
        if dtype is not None and parameter.ndim > 1 and not is_prequantized(parameter):
            parameter.data = parameter.data.to(dtype)
    return twin


def undo(model: nn.Module) -> None:
    """Restore the modules, weights (bit for bit) and gradient flags that the model had before the active adapter."""
    record = need_record(model, "unadapt")
    detach_all(model)
    with torch.no_grad():
        for name, value in record.also_train.items():
            model.get_parameter(name).copy_(value)
    forget(model, record)


class MergedSave:
    """`save_pretrained` of an adapted model. It writes the merged model, which `from_pretrained` reads.

    The stock function would write the tensors of layers under names that `from_pretrained` skips, so that the base would be
    lost too. Checkpoints of a Trainer keep these names, because the Trainer continues from them on an adapted model.
    """

    def __init__(self, module: nn.Module, stock: Callable[..., object] | None = None) -> None:
        self.module = module
        self.stock = stock  # function of the class, None if the model has this one as its own

    def __call__(self, save_directory: str | Path, *args: object, **options: object) -> object:
        module: Any = self.module
        adapted = [part for part in module.modules() if adapter_names(part)]  # the model itself, or parts of it
        records = [record_of(part) for part in adapted]
        to_resume = "state_dict" in options and re.fullmatch(r"checkpoint-\d+", Path(save_directory).name)
        has_others = any(SHELF in part._modules for part in adapted)
        if to_resume or not (has_others or any(isinstance(part, AdapterModule) for part in module.modules())):
            stock = self.stock or type(module).save_pretrained
            return stock(module, save_directory, *args, **options)  # the weights hold everything
        merged: Any = copy.deepcopy(module)
        state = options.pop("state_dict", None)
        try:
            if state is not None:
                merged.load_state_dict(state)
            for part, record in zip([part for part in merged.modules() if adapter_names(part)], records):
                part._modules.pop(SHELF, None)
                if record is not None and record.specs:
                    merge(part)
            if any(isinstance(part, AdapterModule) for part in merged.modules()):
                raise UserError(
                    f"this {type(module).__name__} is a part of an adapted model; call vismt.merge(model) on the whole model "
                    "first."
                )
        except (UserError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{SAVE}: {reason} Write only the adapter: vismt.save_adapter(model, folder).") from error
        merged.__dict__.pop("_keys_to_ignore_on_save", None)  # VismtCallback leaves frozen tensors out of checkpoints
        return merged.save_pretrained(save_directory, *args, **options)


def watch_saving(model: nn.Module) -> None:
    """Make `save_pretrained` of an adapted transformers model, and of a model around it, write what the model computes."""
    for module in model.modules():
        if hasattr(type(module), SAVE):
            setattr(module, SAVE, MergedSave(module))
    record = record_of(model)
    if record is not None:
        record.watch = Watch()


class Watch:
    """Part of the record of an adapted model. While one exists, transformers models around adapted parts are watched.

    When the last one is gone, the class `PreTrainedModel` has its own `save_pretrained` again.
    """

    alive: ClassVar[int] = 0
    watched: ClassVar[Callable[..., object] | None] = None  # function that the class has meanwhile

    def __init__(self) -> None:
        Watch.alive += 1
        weakref.finalize(self, Watch._leave).atexit = False
        library = sys.modules.get("transformers.modeling_utils")
        if library is not None and Watch.watched is None:
            Watch.watched = library.PreTrainedModel.save_pretrained = _watched(library.PreTrainedModel.save_pretrained)

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()  # the copy of a record belongs to another model

    @staticmethod
    def _leave() -> None:
        Watch.alive -= 1
        if Watch.alive or Watch.watched is None:
            return
        owner = sys.modules["transformers.modeling_utils"].PreTrainedModel
        if owner.save_pretrained is Watch.watched:  # otherwise another library has wrapped it
            owner.save_pretrained = vars(Watch.watched)["__wrapped__"]
        Watch.watched = None


def _watched(stock: Callable[..., object]) -> Callable[..., object]:
    """Return `save_pretrained` of a class for a model that is not adapted itself but may have an adapted part."""

    @functools.wraps(stock)
    def save_pretrained(self: nn.Module, *args: Any, **options: Any) -> object:
        if SAVE in vars(self) or not any(adapter_names(part) for part in self.modules()):
            return stock(self, *args, **options)
        return MergedSave(self, stock)(*args, **options)

    return save_pretrained


def unwatch_saving(model: nn.Module) -> None:
    """Undo `watch_saving`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(SAVE), MergedSave):
            delattr(module, SAVE)


def forget(model: nn.Module, record: AdaptRecord) -> None:
    """Remove the record, the hooks on saving and the gradient flags of an adaptation."""
    to_parameters(model)
    use_cpu_kernel(model, True)
    unwatch_saving(model)
    unfreeze(model, record)
    delattr(model, RECORD)


def freeze(model: nn.Module) -> None:
    """Freeze every parameter of a stock model, and the running statistics of its batch norms. `train()` leaves them frozen.

    Statistics that move with the batches belong to no adapter. On another copy of the base the adapter would compute something
    else.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.training = False
            setattr(module, TRAIN, functools.partial(_stay_in_eval_mode, module))


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def unfreeze(model: nn.Module, record: AdaptRecord) -> None:
    """Restore the gradient flags from before the adaptation, and let batch norms follow the mode of the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(name, True))
    for module in model.modules():
        if module.__dict__.pop(TRAIN, None) is not None:
            module.train(model.training)


@torch.no_grad()
def erased_by_rounding(model: nn.Module) -> float | None:
    """Return the share of the update (as Frobenius norms) that `merge` would lose in bf16 or fp16 weights.

    Args:
        model: Adapted model that merges. It is not changed.

    Returns:
        A number of at least 0. None if no adapted weight is in half precision, or layers have no factors.

    Raises:
        UserError: If the model cannot be merged now.
    """
    check_mergeable(model, "merge")
    lost = whole = 0.0
    for layer in adapter_layers(model).values():
        if layer.weight.dtype.itemsize > 2 or not layer.has_factors:
            continue
        update = layer.low_rank().delta()
        total = layer.matrix(layer.weight).float() + update
        lost += float((total.to(layer.weight.dtype).float() - total).square().sum(dtype=torch.float64))
        whole += float(update.square().sum(dtype=torch.float64))
    return (lost / whole) ** 0.5 if whole else None
