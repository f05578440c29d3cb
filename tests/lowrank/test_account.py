"""Counts against sums by hand: parameters, saved activations, optimiser state."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vismt.errors import UserError
from vismt.lowrank.account import (
    account,
    count_parameters,
    optimizer_bytes,
    optimizer_bytes_formula,
    saved_activation_bytes,
)


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
    [(lambda p: torch.optim.AdamW(p), "adamw", 4 * 4), (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "sgd_momentum", 0),
     (lambda p: torch.optim.SGD(p, 0.1), "sgd", 0)],
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


def test_account_prints():
    model, x = Tiny(), torch.randn(10, 8)
    model.first.requires_grad_(False)
    costs = account(model, lambda: model(x), torch.optim.AdamW(model.second.parameters()), "adamw")
    # 68 * 4 * 2 = 544
    assert (costs.trainable, costs.total, costs.activation_bytes) == (68, 212, 640)
    assert (costs.optimizer_bytes, costs.optimizer_bytes_formula) == (0, 544)
    # 68 / 212 = 32.08 %
    assert str(costs).splitlines()[0] == "parameters        68 trainable of 212 (32.08 %)"
    assert len(str(costs).splitlines()) == 4
    assert account(model).activation_bytes is None and len(str(account(model)).splitlines()) == 1


def test_unknown_kind():
    with pytest.raises(UserError, match=r"no kind 'adamW'\. Near: .*'adamw'"):
        optimizer_bytes_formula([], "adamW")
