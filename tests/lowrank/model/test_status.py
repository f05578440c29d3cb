"""What `vismt.status` says of stock, adapted, shelved, mixed and partly adapted models."""

from __future__ import annotations

from helpers.tiny import tiny_vit
from torch import nn

import vismt


def seen(status) -> list[tuple]:
    return [(a.part, a.name, a.method, a.active, a.trains) for a in status.adapters]


def test_a_model_through_its_life() -> None:
    model = tiny_vit()
    total = sum(p.numel() for p in model.parameters())
    assert str(vismt.status(model)).startswith("stock weights: no adapter") and vismt.status(model).total == total
    report = vismt.adapt(model, "lora", rank=2, name="first", also_train=["head"])
    status = vismt.status(model)
    assert seen(status) == [("", "first", "lora", True, True)] and status.trainable == report.trainable
    assert status.adapters[0].parameters == report.trainable - sum(p.numel() for p in model.head.parameters())
    assert status.adapters[0].modules == len(report.specs) and status.blocked == {}
    assert "merge: possible" in str(status)
    vismt.adapt(model, "pissa", rank=2, name="second")
    status = vismt.status(model)
    assert seen(status) == [("", "second", "pissa", True, True), ("", "first", "lora", False, False)]
    assert "also carries 'first'" in status.blocked[""]
    vismt.activate(model, None)
    status = vismt.status(model)
    assert not any(adapter.active or adapter.trains for adapter in status.adapters) and status.trainable == 0
    assert "needs one active adapter" in str(status)
    vismt.remove(model, "second")
    vismt.activate(model, "first")
    vismt.merge(model)
    assert vismt.status(model).adapters == () and vismt.status(model).trainable == total


def test_parts_and_what_cannot_be_merged() -> None:
    parts = nn.ModuleDict({"left": tiny_vit(), "right": tiny_vit()})
    vismt.adapt(parts["right"], "emtal", rank=2, n_experts=4, cluster=False)
    status = vismt.status(parts)
    assert seen(status) == [("right", "default", "emtal", True, True)]
    assert list(status.blocked) == ["right"] and "fade" in str(status)
