"""The methods' optimisers and schedules in a loop of one's own."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import tiny_vit

import vismt
from vismt.base.errors import UserError
from vismt.integrations.method_driver import MethodDriver
from vismt.llm import Landing


def test_landing_is_put_around_an_optimiser_once() -> None:
    model = tiny_vit()
    vismt.adapt(model, "polar", rank=4)
    driver = MethodDriver(torch.nn.Sequential(model))
    optimizer = driver.wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    assert isinstance(optimizer, Landing) and driver.wrap(optimizer) is optimizer
    assert all("lora_" in name for name in driver.moving())


def test_layers_of_lisa_take_turns_and_all_of_them_move() -> None:
    model = tiny_vit(depth=3)
    vismt.adapt(model, "lisa", active=1, interval=1)
    driver = MethodDriver(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    driver.start(driver.wrap(optimizer), steps=6)
    seen = []
    for step in range(1, 7):
        seen.append([i for i, block in enumerate(model.blocks) if block.mlp.fc1.weight.requires_grad])
        driver.on_step(step)
    assert all(len(active) == 1 for active in seen) and len({active[0] for active in seen}) > 1
    assert all(f"blocks.{i}.mlp.fc1.weight" in driver.moving() for i in range(3))
    again = MethodDriver(model)
    again.start(optimizer, steps=6, finished=3)  # a resume opens the same layers
    assert [i for i, block in enumerate(model.blocks) if block.mlp.fc1.weight.requires_grad] == seen[3]


def test_user_errors_and_warnings() -> None:
    with pytest.raises(UserError, match=r"VisionTransformer is not adapted; call vismt\.adapt before"):
        MethodDriver(tiny_vit())
    model = tiny_vit()
    vismt.adapt(model, "emtal", rank=2, n_experts=4, cluster=False)
    with pytest.warns(UserWarning, match="'emtal' has a schedule that nothing drives; give its settings as fade="):
        MethodDriver(model).start(torch.optim.AdamW(model.parameters()), steps=2)
