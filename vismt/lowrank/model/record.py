"""Records of what `adapt` did to a model: its report, and the record on the model with copies of tensors.

The copies of tensors are rarely read again. Small copies stay in memory, and large ones are in a temporary file that is mapped.
The file has no name once it is mapped, so it disappears with the last tensor in it. The system may drop its pages and read them
again, and none is on an accelerator. If TMPDIR is in memory, so are the copies.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterModule, LayerSpec
from vismt.storage.files import JsonObject

RECORD = "vismt_record"  # attribute of an adapted model
SHELF = "vismt_parked"  # submodule with the adapters that are not active (named.py)


@dataclass
class AdaptRecord:
    """The record on an adapted model, from which the adapter is saved and undone. It also prevents a second adaptation.

    specs: Specs of its adapter modules, layers first. also_train: Values before the adaptation, by parameter name. frozen: Some
    values of each parameter that no file of the adapter holds, by name (`sample`). name: Name of the adapter on the model.
    start: Arguments of `inject` that fill the factors. They are kept if the factors have no values yet (meta device).
    """

    method: str
    specs: list[LayerSpec]
    options: JsonObject
    required_grad: dict[str, bool]
    also_train: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    name: str = "default"
    start: tuple[Any, int, bool] | None = None
    # watches the library's saving while the record exists (merge.py)
    watch: object = field(default=None, repr=False, compare=False)

    @property
    def layers(self) -> list[LayerSpec]:
        """Specs of the adapter layers. Each layer adapts one weight."""
        return [spec for spec in self.specs if spec.has_weight]


def refuse_adapted(model: nn.Module, what: str = "adapt") -> None:
    """Raise UserError if the model or a part of it is adapted already, by peft too, or compiled."""
    for path, module in model.named_modules():
        part = f"the part '{path}'" if path else "the model"
        if "_orig_mod" in module._modules:
            raise UserError(f"{what}: {part} is compiled; adapt it before torch.compile.")
        if type(module).__module__.startswith("peft.") and record_of(model) is None:
            raise UserError(f"{what}: {part} belongs to peft; call merge_and_unload() of the PeftModel first.")
        record = record_of(module)
        carried = [record.method] if record else adapter_names(module)
        if carried or isinstance(module, AdapterModule):
            where = f"its part '{path}' already carries" if path else "the model already carries"
            update = "', '".join(carried) or "an update"
            raise UserError(f"{what}: {where} '{update}'; merge or unadapt it first.")


def refuse_offloaded(model: nn.Module, what: str, *, whole: bool = False) -> None:
    """Raise UserError if weights have no values: on the meta device beside weights with values, or moved away by hooks.

    whole: Whether to refuse a model that is on the meta device as a whole too. `adapt` counts the parameters of such a model.
    """
    on_meta = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    moved = None
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)  # hook of accelerate, which holds the weights elsewhere between calls
        if moved is None and any(getattr(part, "offload", False) is True for part in getattr(hook, "hooks", [hook])):
            moved = path
    if moved is None and (not any(on_meta.values()) or (all(on_meta.values()) and not whole)):
        return
    name = next((name for name, is_meta in on_meta.items() if is_meta), moved)
    fix = "load the whole model on its device"
    if moved is not None:
        fix += (
            ", or take accelerate's hooks off (accelerate.hooks.remove_hook_from_submodules); an adapted model can be offloaded "
            "afterwards, for inference"
        )
    raise UserError(f"{what}: '{name}' has no values in memory (offloaded, or on the meta device); {fix}.")


def record_of(model: nn.Module) -> AdaptRecord | None:
    """Return the record of an adapted model. Return None for a stock model."""
    return getattr(model, RECORD, None)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters that the model carries, the active one first."""
    record, shelf = record_of(model), model._modules.get(SHELF)
    others: Any = shelf.children() if shelf is not None else ()
    return [*([record.name] if record else []), *(adapter.record.name for adapter in others)]


def refuse_others(model: nn.Module, what: str) -> None:
    """Raise UserError if the model carries adapters that are not active. They belong to the weights as they are."""
    if SHELF in model._modules:
        named = ", ".join(f"'{name}'" for name in adapter_names(model)[1:])
        raise UserError(
            f"{what}: the model also carries {named}, made for the weights as they are now; call vismt.remove on what is not "
            "needed first."
        )


def need_record(model: nn.Module, what: str) -> AdaptRecord:
    """Return the record of the active adapter. Raise UserError for a stock model, and unless exactly one adapter is active."""
    record = record_of(model)
    if record is not None:
        return record
    names = adapter_names(model)
    if names:
        raise UserError(
            f"{what}: needs one active adapter; call vismt.activate(model, name) with one of {', '.join(names)} first."
        )
    raise UserError(f"{what}: this model is not adapted; call vismt.adapt or vismt.load_adapter on it first.")


@dataclass
class AdaptReport:
    """The report of `adapt`. Printing it gives a table with one row for each group of similar modules.

    specs: Specs of the adapted modules. skipped: Reasons for modules that were left out. extras: Lines on trainable tensors
    besides the updates, one for each kind.
    """

    method: str
    specs: list[LayerSpec]
    trainable: int
    total: int
    skipped: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        from vismt.base.console import aligned  # rich

        groups: dict[tuple, list[LayerSpec]] = {}
        for spec in self.specs:
            path = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", spec.path)
            groups.setdefault((path, spec.kind, spec.shape, *spec.layer.describe(spec)), []).append(spec)
        rows = []
        for (path, kind, shape, rank, scale), specs in groups.items():
            count = sum(spec.parameters for spec in specs)
            rows.append((path, len(specs), kind, f"{shape[0]} x {shape[1]}", rank, scale, count))
        heads = ("module", "count", "kind", "out x in", "rank", "scale", "parameters")
        lines = [aligned(heads, rows)] if rows else []
        lines += [*self.extras, self.summary(), *(f"left out: {text}" for text in self.skipped)]
        return "\n".join(lines)

    def summary(self) -> str:
        """Return one line: the method, how many modules, the trainable share of the parameters."""
        share = 100 * self.trainable / max(self.total, 1)
        modules = f"{len(self.specs)} modules   " if self.specs else ""
        return f"{self.method}   {modules}{self.trainable:,} trainable of {self.total:,} ({share:.2f} %)"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the (trainable, total) numbers of parameters. A shared parameter counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


# ---- copies of tensors
IN_MEMORY = 2**26  # bytes
_SAMPLES = 1024  # number of values of a tensor that show whether it was trained
ALIGNED = 16


def backup_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of each tensor by name, on its device. Copies of more than 64 MiB in all are in a file on the CPU.

    Raise UserError if the temporary folder has no room for them. Nothing is left behind then.
    """
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items() if not value.is_meta}
    if sum(sizes.values()) <= IN_MEMORY:
        return {name: value.detach().clone() for name, value in tensors.items()}
    starts: dict[str, int] = {}
    path = None
    try:
        handle, path = tempfile.mkstemp(prefix="vismt-originals-")
        with os.fdopen(handle, "wb") as file:
            for name in sizes:
                starts[name] = file.tell()
                file.write(_bytes(tensors[name]).numpy().data)
                file.write(b"\0" * (-file.tell() % ALIGNED))
            size = file.tell()
        # The mapping is private, so writing into a copy never writes into the file.
        mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    except OSError as error:
        raise UserError(
            f"adapt: no room for the {sum(sizes.values()) / 2**20:,.0f} MiB of original weights in '{tempfile.gettempdir()}' "
            f"({error.strerror or error}). Point TMPDIR at a folder with more."
        ) from error
    finally:
        if path is not None:
            os.unlink(path)
    copies = {name: value.detach().clone() for name, value in tensors.items() if name not in sizes}
    for name, start in starts.items():
        copies[name] = mapped[start : start + sizes[name]].view(tensors[name].dtype).view(tensors[name].shape)
    return {name: copies[name] for name in tensors}


def unchanged_tensors(copies: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the sorted names of the tensors that still equal their copies, bit for bit."""
    return sorted(name for name, value in copies.items() if torch.equal(_bytes(value), _bytes(tensors[name])))


def sample(tensor: Tensor) -> Tensor:
    """Return a copy of at most 2048 values spread over a tensor, on the CPU."""
    # An odd stride does not stay in one column of a matrix of even width.
    return tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLES) | 1].cpu().clone()


def was_trained(sampled: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor has changed since `sampled` was taken. A cast does not count as a change."""
    now = sample(tensor)
    return now.shape != sampled.shape or not torch.equal(now, sampled.to(now.dtype))


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as a flat uint8 tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
