"""A trained model as a graph that runs without vismt: a program of torch.export, or ONNX for onnxruntime and others.

The graph takes what `preprocessing.json` beside it describes, pixels in [0, 1] or tokens. The normalisation of images is
inside. The written file is read back and compared with the model on two batches of other sizes than the traced batch (ONNX only
if onnxruntime is installed). A graph that answers differently is not written.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt.backbones.weight_sources import quiet_logger
from vismt.base import console
from vismt.base.errors import UserError
from vismt.multitask.tasks import Task
from vismt.storage.files import atomic_write
from vismt.storage.wheels import one_line

NAMES = {"onnx": "model.onnx", "torch": "model.pt2"}  # the file of each format
PREPROCESSING = "preprocessing.json"
SQUARE = "resize the shorter side to the size (bilinear, antialiased), then take the centre"
CLOSE = 1e-4  # largest difference, as a share of the largest output
ONNX_BYTES = 2**31 - 2**24  # of a protocol buffer, less what the graph itself takes
_MOST = 4096  # images of a batch
Forward = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Graph:
    """What is exported.

    Args:
        net: Net that takes the inputs in their order and returns a tuple of tensors.
        example: Function of batch and seed that returns inputs by name.
        dynamic: Axes of each input whose length is free.
        outputs: Facts about each output, by name.
        about: Content of preprocessing.json about the inputs.
    """

    net: nn.Module
    example: Callable[[int, int], dict[str, Tensor]]
    dynamic: Mapping[str, dict[int, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]


class Named(nn.Module):
    """A net whose outputs are a tuple: one tensor, or the maps of a dense net at the size of the images."""

    def __init__(self, net: nn.Module, tasks: Mapping[str, Task] | None = None) -> None:
        super().__init__()
        self.net = net
        self.tasks = tasks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.net(images)
        if self.tasks is None:
            return (found,)
        size = (images.shape[-2], images.shape[-1])
        return tuple(task.resized(found[name].float(), size) for name, task in self.tasks.items())


class TokenLogits(nn.Module):
    """A causal LM from tokens (b, n) and their mask to logits (b, n, vocabulary), without a cache."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        out = self.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return (out.logits,)


def image_graph(
    net: nn.Module, size: Sequence[int], outputs: Mapping[str, Mapping[str, Any]], resizing: str = SQUARE
) -> Graph:
    """Return the graph of a net on images float (b, 3, *size) in [0, 1]. resizing: How images get this size."""
    from torch.export import Dim  # takes a second

    def example(batch: int, seed: int) -> dict[str, Tensor]:
        return {"images": torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))}

    about = {
        "input": {"name": "images", "shape": ["batch", 3, *size], "type": "float32", "range": [0, 1], "order": "RGB"},
        "resize": resizing,
        "normalisation": "inside the graph; give pixels in [0, 1]",
    }
    return Graph(net, example, {"images": {0: Dim("batch", min=1, max=_MOST)}}, outputs, about)


def text_graph(lm: Any) -> Graph:
    """Return the graph of a causal LM on tokens."""
    from torch.export import Dim

    longest = int(getattr(lm.config, "max_position_embeddings", 0)) or 2**20

    def example(batch: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(lm.config.vocab_size, (batch, min(longest, 6 + seed)), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0  # padded on the left
        return {"input_ids": ids, "attention_mask": mask}

    axes = {0: Dim("batch", min=1, max=_MOST), 1: Dim("length", min=2, max=longest)}
    about = {
        "input": {
            "input_ids": "int64 (batch, length)",
            "attention_mask": "int64 (batch, length), 0 where padded on the left",
        },
        "tokenizer": "the tokenizer files in this folder",
    }
    outputs = {"logits": {"shape": ["batch", "length", lm.config.vocab_size]}}
    return Graph(TokenLogits(lm), example, {"input_ids": axes, "attention_mask": axes}, outputs, about)


def write_graph(graph: Graph, form: str, target: Path) -> None:
    """Write model.pt2 (form "torch") or model.onnx (form "onnx") and preprocessing.json to a folder.

    Raises UserError if the packages of ONNX are missing, the exporter cannot capture the model, the model is too large for
    ONNX, or the graph answers differently from the model.
    """
    graph.net.eval().requires_grad_(False)
    if form == "onnx":
        graph.net.float()
        # ONNX has the fused attention of timm only for four axes, and Hiera's attention has five.
        attention: list[Any] = [module for module in graph.net.modules() if hasattr(module, "fused_attn")]
        for module in attention:
            module.fused_attn = False
    data, forward = (_onnx if form == "onnx" else _torch)(graph)
    checked = None if forward is None else _largest_difference(graph, forward)
    about = {**graph.about, "outputs": dict(graph.outputs), "file": NAMES[form], "largest_difference": checked}
    atomic_write(target / PREPROCESSING, json.dumps(about, indent=1, ensure_ascii=False))
    atomic_write(target / NAMES[form], data)
    if checked is None:
        console.stage("export", "not compared with the model: onnxruntime is not installed; pip install onnxruntime")
    else:
        console.stage("export", f"outputs differ from the model's by {checked:.1e} of the largest at most")


def _torch(graph: Graph) -> tuple[bytes, Forward]:
    """Return the program of torch.export as the bytes of a file, and its function, read from them."""
    with _captured(graph.net):
        program = torch.export.export(
            graph.net, tuple(graph.example(2, 0).values()), dynamic_shapes=dict(graph.dynamic)
        )
    for node in program.graph.nodes:  # paths of files of this machine
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    read = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda inputs: read(*inputs.values())


def _onnx(graph: Graph) -> tuple[bytes, Forward | None]:
    """Return an ONNX model as the bytes of a file, and its function in onnxruntime, None if onnxruntime is not installed."""
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise UserError('export: ONNX needs two packages; `pip install "vismt[onnx]"`.')
    size = sum(value.numel() * value.element_size() for value in graph.net.state_dict().values())
    if size > ONNX_BYTES:
        raise UserError(
            f"export: the weights take {size / 2**30:.1f} GiB, and a file of ONNX holds less than 2; use --format torch."
        )
    with _captured(graph.net):
        program: Any = torch.onnx.export(
            graph.net,
            tuple(graph.example(2, 0).values()),
            dynamo=True,
            input_names=list(graph.dynamic),
            output_names=list(graph.outputs),
            dynamic_shapes=dict(graph.dynamic),
            verbose=False,
        )
    model = program.model_proto
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]  # paths of files of this machine
    data: bytes = model.SerializeToString()
    if find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def forward(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with _captured(graph.net):  # a batch of another size than the traced one may not run
            answers = session.run(list(graph.outputs), {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in answers]

    return data, forward


@contextmanager
def _captured(net: nn.Module) -> Iterator[None]:
    """Turn whatever an exporter raises for a model into a UserError, and hold back its messages."""
    try:
        with warnings.catch_warnings(), quiet_logger("torch"), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters have no common error, and each points into their own code
        cause: BaseException = error  # the cause in the exporter of ONNX stands last in a chain
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(str(cause) or type(cause).__name__, 200)
        raise UserError(
            f"export: torch cannot capture {type(net).__name__} as a graph ({reason}); try the other format."
        ) from error


@torch.no_grad()
def _largest_difference(graph: Graph, forward: Forward) -> float:
    """Return the largest difference of a graph's outputs from the model's, as a share of the largest output."""
    worst = 0.0
    for batch in (1, 3):
        inputs = graph.example(batch, batch)
        for name, wanted, found in zip(graph.outputs, graph.net(*inputs.values()), forward(inputs), strict=True):
            difference = float(
                (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-12)
            )
            if not difference <= CLOSE:
                raise UserError(
                    f"export: the graph's '{name}' differs from the model's by {difference:.1e} of its largest value; nothing "
                    "is written. Try the other format, or another version of torch."
                )
            worst = max(worst, difference)
    return worst
