"""Counts against sums by hand: weights, gradients, saved activations, optimiser state, peak."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.bench.accounting import (
    gradient_bytes,
    optimizer_bytes,
    optimizer_bytes_formula,
    peak_bytes,
    saved_activation_bytes,
    weight_bytes,
)
from vismt.base.errors import UserError
from vismt.lowrank.model.record import count_parameters


class Tiny(nn.Module):
    """Linear 8 -> 16, ReLU, Linear 16 -> 4."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_parameters():
    model = Tiny()
    # 8 * 16 + 16 = 144 and 16 * 4 + 4 = 68
    assert count_parameters(model) == (212, 212)
    model.first.requires_grad_(False)
    assert count_parameters(model) == (68, 212)
    model.third = nn.Linear(16, 4, bias=False)
    model.third.weight = model.second.weight
    assert count_parameters(model) == (68, 212)


def test_weights_and_gradients_by_storage():
    model = Tiny()
    # 212 numbers of 4 bytes
    assert weight_bytes(model) == 848 and gradient_bytes(model) == 0
    model.register_buffer("running", torch.zeros(3, dtype=torch.float64))
    assert weight_bytes(model) == 848 + 24
    model.slice = nn.Parameter(model.first.weight.detach()[:, 2:5])  # lies in the same storage
    assert weight_bytes(model) == 848 + 24 and count_parameters(model) == (212 + 48, 212 + 48)
    model.first.requires_grad_(False)
    model(torch.randn(2, 8)).sum().backward()
    assert gradient_bytes(model) == 68 * 4
    # a gradient that is a view into a bucket keeps the bucket, once
    bucket = torch.zeros(100)
    model.second.weight.grad, model.second.bias.grad = bucket[:64].view(4, 16), bucket[64:68]
    assert gradient_bytes(model) == 400
    assert weight_bytes(nn.Linear(8, 16, dtype=torch.bfloat16)) == 2 * 144


def test_saved_activations_by_hand():
    model, x = Tiny(), torch.randn(10, 8)
    # x for the first weight: 10 * 8 floats; the ReLU's output, kept by ReLU and by the second linear, once: 10 * 16.
    # 80 + 160 floats = 960 bytes. Counting the ReLU output twice gives 1,600; adding the weights more still.
    assert saved_activation_bytes(model, lambda: model(x)) == 960
    model.first.requires_grad_(False)
    # nothing before the second weight needs a gradient: its input alone, 160 floats
    assert saved_activation_bytes(model, lambda: model(x)) == 640
    model.requires_grad_(False)
    assert saved_activation_bytes(model, lambda: model(x)) == 0


def test_a_kept_view_holds_its_whole_storage():
    weight = nn.Parameter(torch.ones(4))
    module = nn.Module()
    module.weight = weight
    big = torch.ones(100, 4)
    # one row is used, but all 100 * 4 floats stay in memory
    assert saved_activation_bytes(module, lambda: big[3] * weight) == 1600


def test_buffers_and_parameter_views_do_not_count():
    model = nn.Linear(6, 6)
    model.register_buffer("mask", torch.ones(6))
    x = torch.ones(2, 6)
    # x once (2 * 6 floats); the transposed weight is a view of a parameter and the mask is a buffer
    assert saved_activation_bytes(model, lambda: (x @ model.weight.t()) * model.mask) == 48


def test_it_is_a_measurement_only():
    model, x = Tiny(), torch.randn(3, 8)
    first = saved_activation_bytes(model, lambda: model(x).sum())
    assert first == saved_activation_bytes(model, lambda: model(x).sum())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert saved_activation_bytes(model, lambda: model(x).sum()) == first


def test_checkpointing_saves_less():
    model, x = nn.Sequential(*[Tiny(), nn.Linear(4, 8), Tiny()]), torch.randn(64, 8, requires_grad=True)
    plain = saved_activation_bytes(model, lambda: model(x))
    assert saved_activation_bytes(model, lambda: checkpoint(model, x, use_reentrant=False)) < plain / 2


@pytest.mark.parametrize(
    ("build", "kind", "counters"),
    [
        (lambda p: torch.optim.AdamW(p), "adamw", 4 * 4),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "sgd_momentum", 0),
        (lambda p: torch.optim.SGD(p, 0.1), "sgd", 0),
    ],
)
def test_optimiser_state(build, kind, counters):
    model = Tiny()
    optimizer = build(model.parameters())
    assert optimizer_bytes(optimizer) == 0
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    # 212 parameters * 4 bytes = 848 bytes for each copy; AdamW adds a step counter of 4 bytes for each of 4 tensors
    copies = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}[kind]
    assert optimizer_bytes_formula(model.parameters(), kind) == copies * 848
    assert optimizer_bytes(optimizer) == copies * 848 + counters


def test_peak_of_a_step_by_hand():
    start, kept = torch.zeros(1000), []

    def step():
        first = start + 1  # 4,000 bytes
        second = first * 2  # 8,000
        del first  # 4,000
        second.view(10, 100).add_(1)  # a view, and in place: nothing new
        start.add_(1)  # was there before
        third = torch.empty(3000)  # 16,000
        del second, third  # 0

    assert peak_bytes(step) == peak_bytes(step, steps=1) == 16_000

    def growing():
        kept.append(torch.ones(10))  # 40 bytes more at each call
        torch.ones(100)  # 400 that go at once

    # three calls: 2 * 40 from before, 40, 400
    assert peak_bytes(growing, steps=3) == 520


def test_peak_sees_the_backward_pass_and_the_state_of_the_first_step():
    layer, x = nn.Linear(1000, 1000, bias=False), torch.randn(1, 1000)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)

    def step():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    weight = 4_000_000
    first, second = peak_bytes(step, steps=1), peak_bytes(step, steps=1)
    # gradient and the momentum that the first step makes; the second step makes the gradient alone
    assert 2 * weight <= first <= 2 * weight + 50_000 and weight <= second <= weight + 50_000
    optimizer.state.clear()
    # two steps in one count: the state of the first is alive in the second
    assert 2 * weight <= peak_bytes(step) <= 2 * weight + 50_000


def test_unknown_kind():
    with pytest.raises(UserError, match=r"no kind 'adamW'\. Near: .*'adamw'"):
        optimizer_bytes_formula([], "adamW")


def test_what_was_counted_is_freed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1))
    weight = weakref.ref(model[0].weight)
    saved_activation_bytes(model, partial(model, torch.rand(3, 4)))
    del model
    gc.collect()
    assert weight() is None
