"""Weights in 8 bits: levels for each output channel, the gradient of the quantised model, and the errors."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import images, tiny_vit
from torch import nn
from torch.func import functional_call

from vismt import adapt, merge
from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.jobs.robustness.config import ClassifierConfig
from vismt.robustness.quantisation import int8, quantise


def test_each_output_channel_has_its_own_levels() -> None:
    weight = (
        torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1, 30, 0, 1])[:, None, None, None]
    )
    rounded = int8(weight)
    assert torch.equal(int8(rounded), rounded) and bool((rounded[3] == 0).all())
    for row, before in zip(rounded, weight):
        step = before.abs().max() / 127
        assert float((row - before).abs().max()) <= step / 2 * (1 + 1e-5)
        levels = row / step.clamp_min(1e-12)
        assert torch.allclose(levels, levels.round(), atol=1e-3) and levels.abs().max() <= 127.001
    # one scale for all channels would round the smallest one to nothing
    assert len(rounded[0].unique()) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_levels_once(dtype: torch.dtype) -> None:
    weight = (1e-4 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert torch.equal(int8(weight), int8(weight.float()).to(dtype))


def test_the_gradient_is_that_of_the_quantised_model() -> None:
    whole = tiny_vit()
    model = copy.deepcopy(whole)
    quantise(model, "model")
    names = [f"{path}.weight" for path, module in whole.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    expected = {name: value.detach() for name, value in whole.named_parameters()}
    for name in names:  # written out anew
        rows = expected[name].flatten(1)
        scale = rows.abs().max(1).values[:, None] / 127
        expected[name] = ((rows / scale).round() * scale).view_as(expected[name])
    assert {
        name for name, value in model.named_parameters() if not torch.equal(value, whole.get_parameter(name))
    } == set(names)

    def gradient(forward) -> torch.Tensor:
        leaf = images(4).requires_grad_(True)
        return torch.autograd.grad(forward(leaf).logsumexp(1).sum(), leaf)[0]

    own = gradient(model)
    anew = gradient(lambda x: functional_call(whole, expected, (x,)))
    assert float((own - anew).norm() / own.norm()) < 1e-4 < 1e-3 < float((own - gradient(whole)).norm() / own.norm())


def test_errors() -> None:
    with pytest.raises(UserError, match=r"quantise: 'int9' is not known\. Near: 'int8'"):
        build(ClassifierConfig, {"quantise": "int9"}, "a.yaml")
    with pytest.raises(UserError, match="no linear layer"):
        quantise(nn.Flatten(), "'mine'")
    model = tiny_vit()
    adapt(model, "lora", rank=2)
    with pytest.raises(UserError, match="not merged"):
        quantise(model, "run 'x'")
    quantise(merge(model), "run 'x'")
