"""Reordering of the units of structures (structures.py): the layers of a structure and its other tensors move together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.llm.s2ft.structures import Structure, UnitBlock, structures
from vismt.lowrank.model.targets import find_targets, kind_of


class Coupling:
    """The layers in one structure and the modules whose tensors move with its units; each of those layers refers to it."""

    def __init__(self, structure: Structure, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
        self.structure, self.modules, self.layers = structure, dict(modules), dict(layers)
        self.moved = False

    def reorder(self, stock: bool) -> None:
        """Move the tensors to the stock order, or to the order that puts the trained units together.

        Every layer of the structure calls this; the first call moves the tensors.
        """
        if self.moved is not stock:
            return
        first = next(iter(self.layers.values()))
        if not stock:
            chosen = {
                part: self.structure.parts[part].units_of(layer.slice_index)
                for part, layer in self.layers.items()
                if not layer.weight.is_meta
            }
            order = torch.tensor(self.structure.order(chosen), device=first.weight.device)
            for layer in self.layers.values():
                layer.slice_order.copy_(order)
        self._move(first.slice_order.long().argsort() if stock else first.slice_order.long())
        self.moved = not stock

    @torch.no_grad()
    def _move(self, order: Tensor) -> None:
        """Let new unit u be old unit order[u], in place."""
        if order.is_meta:
            return
        for path in {block.path: None for block in self.structure.blocks}:
            module, blocks = self.modules[path], [block for block in self.structure.blocks if block.path == path]
            dim = blocks[0].dim
            weight = module.weight.t() if kind_of(module) == "conv1d" else module.weight
            weight = module.matrix(module.weight) if hasattr(module, "matrix") else weight
            index = torch.arange(weight.shape[dim], device=order.device)
            for block in blocks:
                index[block.start : block.start + block.units * block.size] = expand(order, block, self.structure)
            weight.copy_(weight.index_select(dim, index))
            bias = getattr(module, "bias", None)
            if dim == 0 and bias is not None:
                bias.copy_(bias[index])


def expand(order: Tensor, block: UnitBlock, structure: Structure) -> Tensor:
    """Return the order of a block's features from the order of the units; blocks of groups follow their heads."""
    if block.units != structure.units:
        size = structure.units // structure.groups
        order = order[::size] // size
    return (block.start + order[:, None] * block.size + torch.arange(block.size, device=order.device)).flatten()


def movable(model: nn.Module, dims: Mapping[str, int]) -> list[Structure]:
    """Return the structures of the stock modules at these paths; UserError where their units cannot be reordered.

    dims: by path, the axis that is trained, which has to be that of the units.
    """
    if not dims:
        return []
    matches = [
        structure
        for structure in structures(model).values()
        if any(block.path in dims for block in structure.parts.values())
    ]
    for structure in matches:
        if structure.obstacle:
            raise UserError(
                f"s2ft: the units of '{structure.path}' cannot be reordered: {structure.obstacle}; use mode='index'."
            )
        for block in structure.parts.values():
            if dims.get(block.path, block.dim) != block.dim:
                raise UserError(
                    f"s2ft: '{block.path}' is trained on dim {dims[block.path]}; its units lie on dim {block.dim}."
                )
        linears = {block.path for block in structure.blocks if kind_of(model.get_submodule(block.path)) is not None}
        find_targets(model, sorted(linears))  # their weights are moved, so they have to be plain linears
    return matches


def couple(model: nn.Module, coupled: Iterable[Structure], layers: Mapping[str, nn.Module]) -> None:
    """Let the layers at these paths, still in stock order, keep the units of their structures together."""
    for structure in coupled:
        of_parts = {part: layers[block.path] for part, block in structure.parts.items() if block.path in layers}
        modules = {block.path: model.get_submodule(block.path) for block in structure.blocks}
        coupling = Coupling(structure, modules, of_parts)
        for part, layer in of_parts.items():
            layer.attach(coupling, structure.parts[part])
