"""The alternating step: the head is updated first, and the backbone gets the gradient of the bound after that update."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import snapshot
from torch import nn

from vismt.base.errors import UserError
from vismt.llm import VBLLClassifier, alternating_loss


def setting() -> tuple[nn.Module, VBLLClassifier, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 8), VBLLClassifier(8, 3, 20), torch.randn(6, 4), torch.arange(6) % 3


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", [1, 3])
def test_head_moves_first_then_the_backbone_alone(steps: int) -> None:
    backbone, head, x, y = setting()
    twin, other = copy.deepcopy(head), copy.deepcopy(backbone)
    inner = torch.optim.Adam(head.parameter_groups(0.01, 0.1))
    outer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.01)  # also holds the head
    before = snapshot(backbone)
    loss = alternating_loss(head, inner, backbone(x), y, steps)
    assert same(snapshot(backbone), before) and all(p.grad is None for p in backbone.parameters())

    again = torch.optim.Adam(twin.parameter_groups(0.01, 0.1))
    for _ in range(steps):
        again.zero_grad()
        twin.loss(other(x).detach(), y).backward()
        again.step()
    moved = snapshot(head)
    assert same(moved, snapshot(twin)) and not torch.equal(moved["mean"], setting()[1].mean)

    loss.backward()
    (-twin.bound(other(x), y).mean()).backward()
    assert torch.equal(backbone.weight.grad, other.weight.grad) and backbone.weight.grad.any()
    assert all(p.grad is None and p.requires_grad for p in head.parameters())
    outer.step()
    assert same(snapshot(head), moved) and not torch.equal(backbone.weight, before["weight"])


def test_a_head_frozen_for_the_outer_optimiser_still_moves() -> None:
    backbone, head, x, y = setting()
    inner = torch.optim.Adam(head.parameter_groups(0.01, 0.1))
    head.requires_grad_(False)
    start = snapshot(head)
    with torch.no_grad():
        alternating_loss(head, inner, backbone(x), y)
    assert not same(snapshot(head), start) and not any(p.requires_grad for p in head.parameters())


def test_optimisers_that_are_refused() -> None:
    backbone, head, x, y = setting()
    with pytest.raises(UserError, match=r"weight decay .* on the posterior"):
        alternating_loss(head, torch.optim.AdamW(head.parameters()), backbone(x), y)
    with pytest.raises(UserError, match="not the head's"):
        alternating_loss(head, torch.optim.Adam([*head.parameters(), *backbone.parameters()]), backbone(x), y)
    with pytest.raises(UserError, match="0 steps"):
        alternating_loss(head, torch.optim.Adam(head.parameters()), backbone(x), y, 0)
