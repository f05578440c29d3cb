"""Units that two groups of weights share: attention heads and FFN channels, and orders of them that keep the function.

    heads      rows of q, k, v    |  columns of o       a unit is d = head_dim features; k and v have one unit a group of g
    channels   rows of gate, up   |  columns of down    a unit is one feature; without a gate: rows of fc1 | columns of fc2

Reordering the units of a structure in all its tensors at once (weights, in-side biases, norms over all units) changes no
output beyond the order of sums. Legal orders move whole groups, and heads inside their group only: query head j reads
key head j // g, so a head that leaves its group is another function. Inside a head nothing moves (rotary positions).
The residual axis couples all layers and is never touched.

Containers are recognised by the names of their children (timm and transformers: separate, fused and Conv1D projections).
Other values for each head (position tables, sinks, ALiBi, mixed rotary frequencies) make a structure refuse reordering:
`Structure.obstacle` holds the reason. Fused gates: the value is the second half, the first for timm's gate_last.
Fused q, k and v have several layouts of one shape: all q heads, then k, then v here, (q, k, v) of each head in turn
elsewhere. The first is assumed for classes that are known to have it; other classes offer the columns of o alone, without
reordering.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.stock_modules import is_conv1d, kind_of, matrix_shape
from vismt.lowrank.model.targets import READ_DIRECTLY, find_targets, head_paths, read_directly

HEADS = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "proj")),
    (("qkv",), ("proj",)),
    (("qkv_proj",), ("o_proj",)),
    (("c_attn",), ("c_proj",)),
)
CHANNELS = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),
    (("fc1_g", "fc1_x"), ("fc2",)),
    (("fc1",), ("fc2",)),
    (("c_fc",), ("c_proj",)),
)
PARTS = ("v", "o", "u", "d")
STACKED = (
    "GPT2Attention",
    "DecisionTransformerGPT2Attention",
    "ImageGPTAttention",
    "Phi3Attention",
    "Phi4MultimodalAttention",
)


@dataclass(frozen=True)
class UnitBlock:
    """`units` times `size` features of the module `path`, from `start` on: of its outputs (dim 0) or its inputs (dim 1)."""

    path: str
    dim: int
    start: int
    units: int
    size: int

    def features(self, units: Iterable[int]) -> Tensor:
        """Return the features of some units, (k,) int64."""
        chosen = torch.tensor(list(units), dtype=torch.int64)
        return (self.start + chosen[:, None] * self.size + torch.arange(self.size)).flatten()

    def units_of(self, features: Tensor) -> list[int]:
        """Return the units of some features: the inverse of `features`."""
        return sorted({int(unit) for unit in (features.cpu() - self.start) // self.size})


@dataclass(frozen=True)
class Structure:
    """Units of one container.

    blocks: all tensors that hold units. parts: those that can be trained, 'v' and 'o' of heads, 'u' and 'd' of channels.
    obstacle: why the units cannot be reordered. without_v: why heads have no 'v'. Both are empty without a reason.
    """

    path: str
    units: int
    groups: int
    blocks: tuple[UnitBlock, ...]
    parts: Mapping[str, UnitBlock] = field(hash=False)
    obstacle: str = ""
    without_v: str = ""

    def order(self, chosen: Mapping[str, Iterable[int]]) -> list[int]:
        """Return new position -> old unit, such that the chosen units of each part lie together as far as groups allow.

        chosen: {'v': groups, 'o': heads} or {'u': channels, 'd': channels}. Only-in, both, only-out, the rest: the order
        of the released code where a group is one head. With o in several incomplete groups, the first has its chosen
        heads last and the last has them first; three or more incomplete groups cannot be made contiguous.
        """
        inside, outside = (set(chosen.get(part, ())) for part in (("v", "o") if "o" in self.parts else ("u", "d")))
        size = self.units // self.groups
        members = [range(group * size, (group + 1) * size) for group in range(self.groups)]
        count = [sum(unit in outside for unit in group) for group in members]
        partial = [group for group in range(self.groups) if 0 < count[group] < size and group not in inside]
        both = any(count[group] for group in inside)
        early = partial[0] if partial and not both else None

        def place(group: int) -> int:
            if group in inside:
                if not count[group]:
                    return 0
                return 1 if count[group] < size else 2
            if not count[group]:
                return 6
            if group == early:
                return 3
            return 4 if count[group] == size else 5

        ordered = sorted(range(self.groups), key=place)
        touched = [group for group in ordered if count[group]]
        result: list[int] = []
        for group in ordered:
            last = group in touched[:1] and len(touched) > 1
            result += sorted(members[group], key=lambda unit: (unit in outside) == last)
        return result


def structures(model: nn.Module) -> dict[str, Structure]:
    """Return every attention and FFN of the model whose projections have known names, by path, in model order."""
    heads, result = head_paths(model), {}
    mixed = any(type(module).__name__ == "RotaryEmbeddingMixed" for module in model.modules())
    alibi = bool(getattr(getattr(model, "config", None), "alibi", False))
    for path, module in model.named_modules():
        if path in heads:
            continue
        structure = _heads(model, path, module) or _channels(path, module)
        if structure is not None:
            per_head = "o" in structure.parts and (mixed or alibi)
            obstacle = "the model holds position values for each head"
            result[path] = replace(structure, obstacle=obstacle) if per_head else structure
    return result


def _children(module: nn.Module, layouts: tuple) -> tuple[list[str], str] | None:
    """Return the names of the in-side and of the out-side of the first layout that the module has."""
    children = dict(module.named_children())
    for inputs, outputs in layouts:
        last = next((name for name in outputs if name in children), None)
        if last is None:
            continue
        kinds = {kind_of(children.get(name)) for name in (*inputs, last)}  # None also where a name is missing
        if kinds <= {"linear", "conv1d"}:
            return list(inputs), last
    return None


def _heads(model: nn.Module, path: str, module: nn.Module) -> Structure | None:
    names = _children(module, HEADS)
    if names is None:
        return None
    inputs, last = names
    width = matrix_shape(getattr(module, last))[1]
    size = getattr(module, "head_dim", None) or getattr(getattr(model, "config", None), "head_dim", None)
    if size is None and getattr(module, "num_heads", 0):
        size = width // module.num_heads
    if not isinstance(size, int) or width % size:
        return None
    units, prefix = width // size, f"{path}." if path else ""
    if getattr(module, "num_heads", units) != units:
        return None
    outs, out = [matrix_shape(getattr(module, name))[0] for name in inputs], UnitBlock(prefix + last, 1, 0, units, size)
    if len(inputs) == 3:
        groups = outs[1] // size
        fits = outs == [width, groups * size, groups * size]
        blocks = [UnitBlock(prefix + name, 0, 0, rows // size, size) for name, rows in zip(inputs, outs)]
    else:
        stacked = _stacked_groups(module, inputs[0], units, outs[0] // size)
        if stacked is None:
            reason = f"the order of the rows of '{inputs[0]}' is not known for a {type(module).__name__}"
            return Structure(path, units, units, (out,), {"o": out}, reason, reason)
        groups = stacked
        fits = outs[0] == (units + 2 * groups) * size
        counts, starts = (units, groups, groups), (0, width, width + groups * size)
        blocks = [UnitBlock(prefix + inputs[0], 0, start, count, size) for start, count in zip(starts, counts)]
    if not fits or groups < 1 or units % groups:
        return None
    norms, obstacle = _beside(path, module, {*inputs, last}, units, groups, size)
    if any(read_directly(module, name) for name in inputs):
        return Structure(
            path, units, groups, (*blocks, out, *norms), {"o": out}, obstacle, READ_DIRECTLY.format(path=path)
        )
    return Structure(path, units, groups, (*blocks, out, *norms), {"v": blocks[2], "o": out}, obstacle)


def _stacked_groups(module: nn.Module, name: str, units: int, rows: int) -> int | None:
    """Return the groups of a fused projection of `rows` heads that is all q, then all k, then all v; None for another one.

    The class whose forward runs decides. timm's 'qkv' have this order except those with key_dim (LeViT and its kin), with
    head_first (MaxViT), and those without q (GC-ViT).
    """
    author = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    home, kind = author.__module__.partition(".")[0], author.__name__
    if name == "qkv":
        interleaved = hasattr(module, "key_dim") or getattr(module, "head_first", False)
        return units if home in ("timm", "transformers") and not interleaved and rows == 3 * units else None
    if home != "transformers":
        return None
    if kind == "GPTBigCodeAttention":
        return 1 if module.multi_query and rows == units + 2 else None
    groups = (rows - units) // 2
    return groups if kind in STACKED and (name == "qkv_proj" or groups == units) else None


def _channels(path: str, module: nn.Module) -> Structure | None:
    names = _children(module, CHANNELS)
    if names is None:
        return None
    inputs, last = names
    units, prefix = matrix_shape(getattr(module, last))[1], f"{path}." if path else ""
    outs = [matrix_shape(getattr(module, name))[0] for name in inputs]
    if len(inputs) == 1 and outs[0] == 2 * units:
        blocks = [UnitBlock(prefix + inputs[0], 0, start, units, 1) for start in (0, units)]
        up = blocks[0] if getattr(module, "gate_last", False) else blocks[1]
    elif outs == [units] * len(inputs):
        blocks = [UnitBlock(prefix + name, 0, 0, units, 1) for name in inputs]
        up = blocks[-1]
    else:
        return None
    out = UnitBlock(prefix + last, 1, 0, units, 1)
    norms, obstacle = _beside(path, module, {*inputs, last}, units, units, 1)
    return Structure(path, units, units, (*blocks, out, *norms), {"u": up, "d": out}, obstacle)


def _beside(
    path: str, module: nn.Module, projections: set[str], units: int, groups: int, size: int
) -> tuple[list[UnitBlock], str]:
    """Return the blocks of norms over all units, and what makes reordering impossible ("" for nothing)."""
    blocks: dict[str, UnitBlock] = {}
    for name, parameter in module.named_parameters():
        child, _, rest = name.partition(".")
        if child in projections:
            continue
        if parameter.ndim == 1 and parameter.numel() == size:  # one value for all units, or for each feature of a head
            continue
        if rest not in ("weight", "bias") or parameter.ndim != 1:
            return [], f"it has '{name}' beside its projections"
        if parameter.numel() not in (units * size, groups * size):
            return [], f"'{name}' holds {parameter.numel()} values for {units} units of {size}"
        blocks[child] = UnitBlock(f"{path}.{child}" if path else child, 0, 0, parameter.numel() // size, size)
    return list(blocks.values()), ""


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
        order = first.slice_order.long()
        self._move(order.argsort() if stock else order)
        self.moved = not stock

    @torch.no_grad()
    def _move(self, order: Tensor) -> None:
        """Let new unit u be old unit order[u], in place."""
        if order.is_meta:
            return
        for path in {block.path: None for block in self.structure.blocks}:
            module, blocks = self.modules[path], [block for block in self.structure.blocks if block.path == path]
            dim = blocks[0].dim
            weight = module.matrix(module.weight) if hasattr(module, "matrix") else weight_matrix(module)
            index = torch.arange(weight.shape[dim], device=order.device)
            for block in blocks:
                index[block.start : block.start + block.units * block.size] = expand(order, block, self.structure)
            weight.copy_(weight.index_select(dim, index))
            bias = getattr(module, "bias", None)
            if dim == 0 and bias is not None:
                bias.copy_(bias[index])


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a view (o, i) of the weight of a stock linear or Conv1D."""
    weight: Tensor = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


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
    blocks = [block.path for structure in matches for block in structure.blocks]
    linears = {path for path in blocks if kind_of(model.get_submodule(path)) is not None}
    find_targets(model, sorted(linears))  # their weights are moved, so they have to be plain linears
    return matches


def couple(model: nn.Module, coupled: Iterable[Structure], layers: Mapping[str, nn.Module]) -> None:
    """Let the layers at these paths, still in stock order, keep the units of their structures together."""
    for structure in coupled:
        of_parts = {part: layers[block.path] for part, block in structure.parts.items() if block.path in layers}
        modules = {block.path: model.get_submodule(block.path) for block in structure.blocks}
        coupling = Coupling(structure, modules, of_parts)
        for part, layer in of_parts.items():
            layer.join(coupling, structure.parts[part])
