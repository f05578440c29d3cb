"""The status of a model's adapters: which adapters the model carries, which are active and which train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.model.modules import check_mergeable
from vismt.lowrank.model.named import shelved
from vismt.lowrank.model.record import AdaptRecord, adapter_names, count_parameters, record_of, refuse_others


@dataclass(frozen=True)
class AdapterStatus:
    """Status of one adapter of a model.

    Attributes:
        part: Path of the adapted model below the given model. "" stands for the given model itself.
        name: Name of the adapter.
        method: Name of the method.
        active: Whether the model computes with the adapter.
        modules: Number of adapted modules.
        parameters: Number of the adapter's parameters, without the parameters of also_train.
        trains: Whether any parameter of the active adapter requires a gradient.
    """

    part: str
    name: str
    method: str
    active: bool
    modules: int
    parameters: int
    trains: bool


@dataclass(frozen=True)
class ModelStatus:
    """Status of all adapters of a model. Printing it gives a table.

    Attributes:
        adapters: Adapters by part, the active ones first. Empty for a stock model, for example after merge and unadapt.
        trainable: Number of parameters that require a gradient.
        total: Number of all parameters.
        blocked: Reasons why `vismt.merge` would refuse the model now, by part. Empty if every part can be merged.
    """

    adapters: tuple[AdapterStatus, ...]
    trainable: int
    total: int
    blocked: dict[str, str]

    def __str__(self) -> str:
        count = f"{self.trainable:,} trainable of {self.total:,} parameters"
        if not self.adapters:
            return f"stock weights: no adapter (never adapted, merged or unadapted)   {count}"
        rows = [
            (one.part or "(model)", one.name, one.method, one.active, one.trains, one.modules, one.parameters)
            for one in self.adapters
        ]
        table = console.aligned(("part", "adapter", "method", "active", "trains", "modules", "parameters"), rows)
        merging = [f"merge: {text}" for text in self.blocked.values()] or ["merge: possible; vismt.merge(model)"]
        return "\n".join([table, count, *merging])


def status(model: nn.Module) -> ModelStatus:
    """Return which adapters a model and its parts carry, which are active, which train, and whether merging is possible.

    Args:
        model: Any module. It is not changed.

    Returns:
        The adapters with counts. Printing them gives a table.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "lora", targets=["qkv"])
        print(vismt.status(model))
    """
    adapters, blocked = [], {}
    for path, part in model.named_modules():
        if not adapter_names(part):
            continue
        record = record_of(part)
        trains = any(parameter.requires_grad for parameter in part.parameters())
        if record is not None:
            adapters.append(_adapter(path, record, True, trains))
        for shelf in shelved(part).values():
            adapters.append(_adapter(path, shelf.record, False, False))
        try:
            if record is None:
                raise UserError("needs one active adapter; call vismt.activate(model, name) first.")
            refuse_others(part, "merge")
            check_mergeable(part, "merge")
        except UserError as error:
            blocked[path] = str(error).removeprefix("merge: ")
    return ModelStatus(tuple(adapters), *count_parameters(model), blocked)


def _adapter(path: str, record: AdaptRecord, active: bool, trains: bool) -> AdapterStatus:
    parameters = sum(spec.parameters for spec in record.specs)
    return AdapterStatus(path, record.name, record.method, active, len(record.specs), parameters, trains)
