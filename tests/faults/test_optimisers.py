"""Kernels of optimisers that take a parameter as `numel` numbers in a row: they move the slices of S2FT and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from helpers.faults import cases
from torch import Tensor, nn

import vismt
from vismt.llm import UnitSelection
from vismt.lowrank.layers.base import adapter_layers

Parameters = list[nn.Parameter]


def in_a_row(parameters: Parameters) -> Callable[[], None]:
    """Return the step of a kernel that writes to `numel` addresses from the first one on."""

    def step() -> None:
        for parameter in parameters:
            parameter.data.as_strided((parameter.numel(),), (1,)).add_(0.01)

    return step


def eight_bit(parameters: Parameters) -> Callable[[], None]:
    optim = pytest.importorskip("bitsandbytes.optim")
    return optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=1).step


OPTIMISERS: dict[str, Callable[[Parameters], Callable[[], None]]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False).step,
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True).step,
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True).step,
    "sgd fused": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True).step,
    "adamw 8 bit": eight_bit,
    "in a row": in_a_row,
}


def feed_forward(conv1d: bool, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = nn.Module()
    names = ("c_fc", "c_proj") if conv1d else ("fc1", "fc2")
    for name, inputs, outputs in zip(names, (6, 16), (16, 6)):
        layer = Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs)
        model.mlp.add_module(name, layer)
    return model.to(dtype)


def run(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model.mlp.children():
        x = layer(x)
    return x


def changed_frozen(name: str, random: Random) -> list[str]:
    """Take steps on random slices of rows and columns, and return the tensors in which a frozen number is not what it was."""
    conv1d, dtype = random.random() < 0.5, random.choice([torch.float32, torch.bfloat16])
    first, count = random.randrange(12), random.randrange(1, 5)
    units = tuple(range(first, first + count)) if random.random() < 0.7 else (1, 4, 5)
    parts = random.choice(["u", "d", "ud"])
    selection = UnitSelection({"mlp": {part: units for part in parts}})
    model, stock = feed_forward(conv1d, dtype), feed_forward(conv1d, dtype).state_dict()
    trained = random.choice([None, dtype])
    vismt.adapt(model, "s2ft", selection=selection, dtype=trained)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step, x = OPTIMISERS[name](parameters), torch.randn(3, 6, dtype=dtype)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(2):
        run(model, x).float().square().sum().backward()
        step()
    assert not any(torch.equal(now, then) for now, then in zip(parameters, before))
    wanted, layers = run(model, x).detach(), adapter_layers(model)
    dims, order = {path: layer.dim for path, layer in layers.items()}, torch.tensor(units)
    merged = vismt.merge(model)
    assert torch.allclose(run(merged, x), wanted, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    moved = []
    for key, value in merged.state_dict().items():
        changed = value != stock[key]
        path = key.removesuffix(".weight")
        if path in dims:
            dim = 1 - dims[path] if conv1d else dims[path]
            assert changed.any(), key
            changed.index_fill_(dim, order, False)
        if changed.any():
            moved.append(key)
    return moved


@cases(20, 2000)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_moves_the_slices_and_nothing_else(name: str, cases: int) -> None:
    random = Random(name)
    for _ in range(cases):
        assert changed_frozen(name, random) == []
