"""Which adapters a model carries, and what they do to it now."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.model.modules import check_mergeable
from vismt.lowrank.model.named import mixed_names, shelved
from vismt.lowrank.model.record import AdaptRecord, count_parameters, names_of, record_of, refuse_others


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model.

    Attributes:
        part: path of the adapted model below the given one; "" for the given one itself.
        name: of the adapter.
        method: of the adaptation.
        active: whether the model computes with it.
        modules: number of adapted modules.
        parameters: number of the adapter's parameters, without those of also_train.
        trains: whether any parameter of the active adapter requires a gradient.
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
    """The adapters of a model; printing it gives a table.

    Attributes:
        adapters: the active ones first in each part; none for a stock model, as after merge and unadapt.
        trainable: number of the parameters that require a gradient.
        total: number of all parameters.
        blocked: why `vismt.merge` would refuse the model now, by part; empty where every part can be merged.
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
        model: any module; it is not changed.

    Returns:
        The adapters with counts; printing it gives a table.
    """
    adapters, blocked = [], {}
    for path, part in model.named_modules():
        if not names_of(part):
            continue
        record = record_of(part)
        trains = any(parameter.requires_grad for parameter in part.parameters())
        if record is not None:
            adapters.append(_adapter(path, record, True, trains))
        for name, shelf in shelved(part).items():
            adapters.append(_adapter(path, shelf.record, name in mixed_names(part), False))
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
