"""Units of attention and of an FFN: heads and channels, each with its rows and columns.

    heads      rows of v       |  columns of o       a unit is d = head_dim features, v has one unit for each group of queries
    channels   rows of up      |  columns of down    a unit is one feature; without a gate: rows of fc1 | columns of fc2

Containers are recognised by the names of their children (timm and transformers: separate, fused and Conv1D projections). For
fused gates, the value is the second half (the first half for timm's gate_last). Fused q, k and v have several layouts of one
shape. Some have all q heads, then k, then v. Others have (q, k, v) of each head in turn. The first layout is assumed for
classes that are known to have it. Other classes offer only the columns of o.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismt.lowrank.layers.stock_modules import kind_of, matrix_shape
from vismt.lowrank.model.targets import READ_DIRECTLY, head_paths, read_directly

_HEADS = (
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
UNIT_PARTS = ("v", "o", "u", "d")
STACKED = (
    "GPT2Attention",
    "DecisionTransformerGPT2Attention",
    "ImageGPTAttention",
    "Phi3Attention",
    "Phi4MultimodalAttention",
)


@dataclass(frozen=True)
class UnitBlock:
    """Units of a module: `units` times `size` features of the module `path`, from `start` on.

    They are features of its outputs (dim 0) or its inputs (dim 1).
    """

    path: str
    dim: int
    start: int
    units: int
    size: int

    def features(self, units: Iterable[int]) -> Tensor:
        """Return the features of some units, int64 (k,)."""
        chosen = torch.tensor(list(units), dtype=torch.int64)
        return (self.start + chosen[:, None] * self.size + torch.arange(self.size)).flatten()


@dataclass(frozen=True)
class Structure:
    """Units of one container.

    parts: Blocks that can be trained, 'v' and 'o' of heads, 'u' and 'd' of channels. without_v: Reason why heads have no part
    'v', empty without one.
    """

    parts: Mapping[str, UnitBlock]
    without_v: str = ""


def structures(model: nn.Module) -> dict[str, Structure]:
    """Return every attention and FFN of the model whose projections have known names, by path, in model order."""
    heads, result = head_paths(model), {}
    for path, module in model.named_modules():
        if path in heads:
            continue
        structure = _heads(model, path, module) or _channels(path, module)
        if structure is not None:
            result[path] = structure
    return result


def _children(module: nn.Module, layouts: tuple) -> tuple[list[str], str] | None:
    """Return the names of the in-side and of the out-side of the first layout that the module has."""
    children = dict(module.named_children())
    for inputs, outputs in layouts:
        last = next((name for name in outputs if name in children), None)
        if last is None:
            continue
        kinds = {kind_of(children[name]) if name in children else None for name in (*inputs, last)}
        if kinds <= {"linear", "conv1d"}:
            return list(inputs), last
    return None


def _heads(model: nn.Module, path: str, module: nn.Module) -> Structure | None:
    names = _children(module, _HEADS)
    if names is None:
        return None
    inputs, last = names
    width = matrix_shape(getattr(module, last))[1]
    size = getattr(module, "head_dim", None) or getattr(getattr(model, "config", None), "head_dim", None)
    heads = getattr(module, "num_heads", None)
    if size is None and isinstance(heads, int) and heads:
        size = width // heads
    if not isinstance(size, int) or width % size:
        return None
    units, prefix = width // size, f"{path}." if path else ""
    if getattr(module, "num_heads", units) != units:
        return None
    outs, out = [matrix_shape(getattr(module, name))[0] for name in inputs], UnitBlock(prefix + last, 1, 0, units, size)
    start = 0
    if len(inputs) == 3:
        groups = outs[1] // size
        fits = outs == [width, groups * size, groups * size]
    else:
        stacked = _stacked_groups(module, inputs[0], units, outs[0] // size)
        if stacked is None:
            return Structure(
                {"o": out}, f"the order of the rows of '{inputs[0]}' is not known for a {type(module).__name__}"
            )
        groups, start = stacked, width + stacked * size
        fits = outs[0] == (units + 2 * groups) * size
    if not fits or groups < 1 or units % groups:
        return None
    if any(read_directly(module, name) for name in inputs):
        return Structure({"o": out}, READ_DIRECTLY.format(path=path))
    return Structure({"v": UnitBlock(prefix + inputs[-1], 0, start, groups, size), "o": out})


def _stacked_groups(module: nn.Module, name: str, units: int, rows: int) -> int | None:
    """Return the groups of a fused projection of `rows` heads that has all q, then all k, then all v. Otherwise return None.

    The class whose forward runs decides. timm's "qkv" has this order, except in classes with key_dim (LeViT and similar), with
    head_first (MaxViT), and without q (GC-ViT).
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
    outs, start = [matrix_shape(getattr(module, name))[0] for name in inputs], 0
    if len(inputs) == 1 and outs[0] == 2 * units:
        start = 0 if getattr(module, "gate_last", False) else units
    elif outs != [units] * len(inputs):
        return None
    up, down = UnitBlock(prefix + inputs[-1], 0, start, units, 1), UnitBlock(prefix + last, 1, 0, units, 1)
    return Structure({"u": up, "d": down})
