"""`check_method` passes a right method and names what a wrong one breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vismt
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import inject
from vismt.methods import METHODS, Method, register_method
from vismt.testing import check_method, method_contract

OWN = Path(__file__).parent.parent / "helpers" / "own_package" / "own_vismt_parts"


def right(weight, rank, scale, generator):
    return torch.randn(rank, weight.shape[1], generator=generator), torch.zeros(len(weight), rank)


def elsewhere(weight, rank, scale, generator):
    """Forgets the offset that a start with B A ≠ 0 needs."""
    return right(weight, rank, scale, generator)[0], torch.ones(len(weight), rank)


def unseeded(weight, rank, scale, generator):
    return torch.randn(rank, weight.shape[1]), torch.zeros(len(weight), rank)


def declare(start: Callable[..., Any], changes_weights: bool = False, frozen: tuple[str, ...] = ()) -> None:
    def own(model, *, targets, rank, alpha, seed, **options):
        if changes_weights:
            with torch.no_grad():
                model.norm.bias.add_(0.0).add_(1e-8)
        return inject(model, "own", start, offset=False, targets=targets, rank=rank, alpha=alpha, seed=seed, **options)

    register_method(Method("own", own, layers=(LowRankLayer,), frozen=frozen))


@pytest.fixture(autouse=True)
def only_plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One layout, for speed, and no method left behind."""
    monkeypatch.setattr(method_contract, "CONTRACT_LAYOUTS", {"plain": {}})
    yield
    METHODS._items.pop("own", None)
    METHODS._items.pop("orthogonal", None)


def test_a_right_method_of_a_module_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)  # where the module is found
    assert "orthogonal" not in vismt.list_methods()
    check_method("orthogonal", module="orthogonal")
    with pytest.raises(vismt.UserError, match=r"check_method: cannot import 'orthogonall' .*: run in the folder that"):
        check_method("orthogonal", module="orthogonall")
    with pytest.raises(vismt.UserError, match="'orthogonal' has no option 'rnak'"):
        check_method("orthogonal", rnak=3)


@pytest.mark.parametrize(
    ("start", "check"),
    [
        (elsewhere, "check_start: the adapted model starts: differs"),
        (unseeded, "check_seed: adapt changes torch's random state"),
    ],
)
def test_wrong_start_values_are_named(start: Callable[..., Any], check: str) -> None:
    declare(start)
    with pytest.raises(AssertionError) as caught:
        check_method("own")
    lines = str(caught.value).splitlines()
    assert lines[0] == "'own' breaks the contract of vismt.adapt:"
    assert lines[1].strip().startswith(check) and lines[1].endswith("[plain]")


def test_a_method_that_changes_stock_weights_is_named() -> None:
    declare(right, changes_weights=True)
    with pytest.raises(AssertionError, match=r"check_unadapt: the update is written into norm\.bias"):
        check_method("own")


def test_a_check_of_the_gradient_sees_a_frozen_factor() -> None:
    declare(right)
    case = method_contract.Case("own")
    method_contract.check_gradient(case)
    frozen = type(case).adapted

    def without_a(self, **more):
        model = frozen(self, **more)
        model.blocks[0].attn.qkv.lora_A.requires_grad_(False)
        return model

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(method_contract.Case, "adapted", without_a)
        with pytest.raises(AssertionError, match=r"blocks\.0\.attn\.qkv\.lora_A has requires_grad = False"):
            method_contract.check_gradient(case)


def test_a_method_may_declare_that_it_freezes_a_factor() -> None:
    declare(right, frozen=("lora_A",))  # LoRA-FA
    check_method("own")
    model = method_contract.small_vit()
    report = vismt.adapt(model, "own", rank=2)
    assert report.trainable == sum(layer.lora_B.numel() for layer in adapter_layers(model).values())
    vismt.activate(vismt.activate(model, None), "default")
    assert not any(layer.lora_A.requires_grad for layer in adapter_layers(model).values())
