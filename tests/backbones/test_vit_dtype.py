"""A backbone with frozen weights in half precision: held once, never cast, with factors, heads and outputs in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import shake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vismt
from vismt.backbones.timm_models import create
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.jobs.training_job import check_trained_dtype

OWN = {"lora": {}, "pissa": {}, "polar": {}, "amt": {}, "emtal": {"n_experts": 4}, "s2ft": {"ratio": 0.25}}


class Casts(TorchDispatchMode):
    """Storages whose tensors are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            for leaf in tree_leaves(args):
                if isinstance(leaf, torch.Tensor) and leaf.dtype != out.dtype:
                    self.sources.add(leaf.untyped_storage()._cdata)
        return out


def backbone(**options: Any) -> Backbone:
    return create("test_vit", img_size=32, num_classes=5, dtype="bfloat16", **options)


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_weights_once_and_outputs_wide() -> None:
    net, wide = backbone(), create("test_vit", img_size=32, num_classes=5)
    assert {p.dtype for name, p in net.vit.named_parameters() if not name.startswith("head")} == {torch.bfloat16}
    assert net.vit.head.weight.dtype == torch.float32
    assert torch.equal(net.mean, wide.mean) and net.mean.dtype == torch.float32
    for got, expected in (
        (net(pixels()), wide(pixels())),
        (net.logits(pixels()), wide.logits(pixels())),
        (net.maps(pixels(), [3])[0], wide.maps(pixels(), [3])[0]),
        (net.tokens(pixels()), wide.tokens(pixels())),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=0.05 * float(expected.detach().abs().max()), rtol=0)
        assert not torch.equal(got, expected)


@pytest.mark.parametrize("method", OWN)
def test_training_never_casts_a_frozen_weight(method: str) -> None:
    net = backbone()
    vismt.adapt(net.vit, method, **({} if method == "s2ft" else {"rank": 4}), **OWN[method])
    net.vit.head.requires_grad_(True)
    shake(net)
    check_trained_dtype(net)
    frozen = {p.untyped_storage()._cdata for p in net.parameters() if not p.requires_grad and p.ndim > 1}
    leaf = pixels().requires_grad_()
    with Casts() as casts:
        net.logits(leaf).square().sum().backward()
    assert not casts.sources & frozen
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in trained.values())
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    used = {name for name, g in trained.items() if bool(g.abs().sum() > 0)}
    assert "head.weight" in {name.removeprefix("vit.") for name in used} and len(used) > 2


def test_casts_are_seen() -> None:
    net = create("test_vit", img_size=32, num_classes=5)
    vismt.adapt(net.vit, "lora", rank=4)
    frozen = {p.untyped_storage()._cdata for p in net.parameters() if not p.requires_grad and p.ndim > 1}
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        net.logits(pixels()).float().sum().backward()
    assert casts.sources & frozen


def test_weights_in_half_precision_are_not_trained() -> None:
    net = backbone()
    vismt.adapt(net.vit, "lora", rank=4, also_train=["norm"])
    with pytest.raises(
        UserError, match=r"model.dtype: bfloat16 is for frozen weights, and 'vit.norm.weight' is trained"
    ):
        check_trained_dtype(net)
