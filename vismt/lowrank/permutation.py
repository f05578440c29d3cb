"""Reordering the units of structures (coupled.py) in a model: the hosts of one structure and its tensors move together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.lowrank.structures import Block, Structure, structures
from vismt.lowrank.targets import find_targets, kind_of


class Coupling:
    """The hosts in one structure and the tensors that have to move with its units; held by each of those hosts."""

    def __init__(self, structure: Structure, modules: Mapping[str, nn.Module], hosts: Mapping[str, nn.Module]) -> None:
        self.structure, self.modules, self.hosts = structure, dict(modules), dict(hosts)
        self.moved = False

    def reorder(self, stock: bool) -> None:
        """Move the tensors, once however many hosts ask; the own order follows from what the hosts have chosen."""
        if self.moved is not stock:
            return
        some = next(iter(self.hosts.values()))
        if not stock:
            chosen = {
                part: self.structure.parts[part].units_of(host.slice_index)
                for part, host in self.hosts.items()
                if not host.weight.is_meta
            }
            order = torch.tensor(self.structure.order(chosen), device=some.weight.device)
            for host in self.hosts.values():
                host.slice_order.copy_(order)
        self._move(some.slice_order.long().argsort() if stock else some.slice_order.long())
        self.moved = not stock

    @torch.no_grad()
    def _move(self, order: Tensor) -> None:
        """New unit u becomes old unit order[u], in place."""
        if order.is_meta:
            return
        for path in {block.path: None for block in self.structure.blocks}:
            module, own = self.modules[path], [block for block in self.structure.blocks if block.path == path]
            dim = own[0].dim
            weight = module.weight.t() if kind_of(module) == "conv1d" else module.weight
            weight = module.matrix(module.weight) if hasattr(module, "matrix") else weight
            index = torch.arange(weight.shape[dim], device=order.device)
            for block in own:
                index[block.start : block.start + block.units * block.size] = expand(order, block, self.structure)
            weight.copy_(weight.index_select(dim, index))
            bias = getattr(module, "bias", None)
            if dim == 0 and bias is not None:
                bias.copy_(bias[index])


def expand(order: Tensor, block: Block, structure: Structure) -> Tensor:
    """The order of a block's features from the order of the units; blocks of groups follow their heads."""
    if block.units != structure.units:
        size = structure.units // structure.groups
        order = order[::size] // size
    return (block.start + order[:, None] * block.size + torch.arange(block.size, device=order.device)).flatten()


def movable(model: nn.Module, paths: Iterable[str]) -> list[Structure]:
    """Structures of the stock modules at these paths; UserError where their units cannot be reordered."""
    wanted = set(paths)
    if not wanted:
        return []
    found = [one for one in structures(model).values() if any(block.path in wanted for block in one.parts.values())]
    for structure in found:
        if structure.obstacle:
            raise UserError(
                f"s2ft: the units of '{structure.path}' cannot be reordered: {structure.obstacle}; use mode='index'."
            )
        linears = {block.path for block in structure.blocks if kind_of(model.get_submodule(block.path)) is not None}
        find_targets(model, sorted(linears))  # moved as a plain weight, so it has to be one
    return found


def couple(model: nn.Module, found: Iterable[Structure], hosts: Mapping[str, nn.Module]) -> None:
    """Let the hosts at these paths, in stock order still, keep the units of their structures together."""
    for structure in found:
        own = {part: hosts[block.path] for part, block in structure.parts.items() if block.path in hosts}
        modules = {block.path: model.get_submodule(block.path) for block in structure.blocks}
        coupling = Coupling(structure, modules, own)
        for part, host in own.items():
            host.join(coupling, structure.parts[part])
