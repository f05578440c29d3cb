"""Adapters that a model carries while another one is active: taken out of it, their tensors in the submodule `vismt_parked`.

Parking repeats the steps of undoing an adapter, and putting it back those of placing one, so that every adapter finds the stock
modules and weights that it was made for, whatever its method keeps in them (slices, reordered units, quantised weights). The
parameters stay the same objects, which optimisers know, and so do layers and wrappers. State dicts and conversions of the model
reach parked tensors; those of active ones keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vismt.lowrank.layers.base import AdapterLayer, adapter_layers
from vismt.lowrank.layers.parameters import hold
from vismt.lowrank.layers.wrappers import ModuleWrapper, from_stock, install_module, wrappers_of
from vismt.lowrank.model.inject import prepare, undo, watch_saving
from vismt.lowrank.model.record import RECORD, SHELF, AdaptRecord, need_record


class Parked(nn.Module):
    """An adapter apart from its model.

    record: what the model has of an active adapter. layers, wrappers: by path. trained: names of the parameters that require
    a gradient while it is active. Its modules share the tensors of layers and wrappers, its buffers are the parameters that
    were trained whole.
    """

    def __init__(
        self,
        record: AdaptRecord,
        layers: dict[str, AdapterLayer],
        wrappers: dict[str, ModuleWrapper],
        also_train: Mapping[str, Tensor],
        trained: set[str],
    ) -> None:
        super().__init__()
        self.record, self.layers, self.wrappers, self.trained = record, layers, wrappers, trained
        for path, module in [*layers.items(), *wrappers.items()]:
            module.release()
            self._modules[key(path)] = _mirror(module)
        for name, value in also_train.items():
            self.register_buffer(key(name), value)
        self.requires_grad_(False)

    def also_train(self, name: str) -> Tensor:
        """Return the values of a parameter that was trained whole."""
        return self.get_buffer(key(name))


class Shelf(nn.Module):
    """The parked adapters of a model, by name. mixed: the names that are active together (mixed.py).

    The forward returns its input, because an nn.Sequential calls every child.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: tuple[str, ...] = ()

    def forward(self, x: Any) -> Any:
        return x


def key(name: str) -> str:
    """Return a path, or the name of a parameter or an adapter, without the dots that names in a module cannot have."""
    return name.replace(".", "/")


def _mirror(module: nn.Module) -> nn.Module:
    """Return a module with the very tables of tensors that `module` and its children have."""
    mirror = nn.Module()
    mirror._parameters, mirror._buffers = module._parameters, module._buffers
    mirror._non_persistent_buffers_set = module._non_persistent_buffers_set
    for name, child in module.named_children():
        mirror._modules[name] = _mirror(child)
    return mirror


def park(model: nn.Module) -> None:
    """Move the active adapter to the shelf, and leave the stock model with every parameter frozen."""
    record = need_record(model, "park")
    shelf = model._modules.pop(SHELF, None)  # undoing is not to see it
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    also_train = {name: model.get_parameter(name).detach().clone() for name in record.also_train}
    layers, wrappers = adapter_layers(model), wrappers_of(model)
    undo(model)
    model.requires_grad_(False)
    shelf = shelf if shelf is not None else Shelf()
    shelf._modules[key(record.name)] = Parked(record, layers, wrappers, also_train, trained)
    model._modules[SHELF] = shelf


@torch.no_grad()
def put_back(model: nn.Module, name: str) -> None:
    """Make a parked adapter the active one of a model without an active one: the inverse of `park`."""
    finish = prepare(model, parked_adapters(model)[name].record.sites)
    parked = take(model, name)
    hold(model, parked.layers)
    for path, layer in parked.layers.items():
        layer.adopt(model.get_submodule(path))
        install_module(model, path, layer)
    finish(parked.layers)
    for path, wrapper in parked.wrappers.items():
        wrapper.adopt(dict(model.named_modules()).get(path))
        wrapper.attach(model, path)
    for whole in parked.record.also_train:
        model.get_parameter(whole).copy_(parked.also_train(whole))
    setattr(model, RECORD, parked.record)
    watch_saving(model)
    from_stock(model)
    for whole, parameter in model.named_parameters():
        parameter.requires_grad_(whole in parked.trained)


def take(model: nn.Module, name: str) -> Parked:
    """Take an adapter off the shelf, and an empty shelf off the model."""
    shelf: Any = model._modules[SHELF]
    parked = shelf._modules.pop(key(name))
    if not shelf._modules:
        del model._modules[SHELF]
    return parked


def parked_adapters(model: nn.Module) -> dict[str, Parked]:
    """Return the adapters on the shelf by name."""
    shelf: Any = model._modules.get(SHELF)
    return {} if shelf is None else {parked.record.name: parked for parked in shelf.children()}
