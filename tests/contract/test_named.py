"""Every method as one of several named adapters: switching, files, removal and training."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from contract.test_methods import GRAPHS, OWN, VARIANTS, adapted, gates  # noqa: F401 (a fixture)
from helpers.tiny import holds, images, shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.methods import METHODS
from vismt.testing.method_contract import faded

# Every layer as it is and everything at once, as of one adapter; of slices one variant of each kind.
EVERY = [(method, variant) for method, variant in GRAPHS if variant != "every_part"]


def put(model: nn.Module, method: str, variant: str, name: str, seed: int) -> torch.Tensor:
    """Put a faded adapter with noise on the model and return the outputs that a model has with it alone."""
    rank = {} if "rank" in METHODS[method].unread else {"rank": 2}
    vismt.adapt(model, method, **rank, name=name, seed=seed, **OWN.get(method, {}), **VARIANTS[variant])
    faded(shake(model, seed=seed))
    alone = faded(shake(adapted(method, variant, seed=seed), seed=seed))
    return alone(images())


@cache
def made(method: str, variant: str) -> tuple[nn.Module, dict[str | None, torch.Tensor]]:
    """Return a model with two adapters of a method and one of another, the second active, and the outputs of each alone."""
    model = tiny_vit()
    expected = {None: tiny_vit()(images())}
    expected["other"] = put(model, "pissa" if method != "pissa" else "lora", "plain", "other", 3)
    expected["a"] = put(model, method, variant, "a", 1)
    expected["b"] = put(model, method, variant, "b", 2)
    return model, expected


@pytest.fixture(params=EVERY, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str | None, torch.Tensor]]:
    """A copy of what is made once."""
    model, expected = made(*request.param)
    return copy.deepcopy(model), expected


def test_each_adapter_is_what_it_is_alone_bit_for_bit(case) -> None:
    model, expected = case
    assert torch.equal(model(images()), expected["b"])
    for name in ("a", "other", "b", "a", None, "b"):
        vismt.activate(model, name)
        assert torch.equal(model(images()), expected[name]), name
    with vismt.disabled(model):
        assert torch.equal(model(images()), expected[None])
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images()), expected["b"])
    vismt.remove(model, "b")
    assert torch.equal(model(images()), expected[None])
    vismt.activate(model, "a")
    assert torch.equal(model(images()), expected["a"])
    assert holds(vismt.unadapt(model), tiny_vit().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_the_active_adapter_trains_and_its_parameters_stay_the_same(case) -> None:
    model, _ = case
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(images()).square().sum().backward()
    vismt.activate(model, "a")
    others = {id(parameter) for name, parameter in trained.items() if name not in model.vismt_record.also_train}
    assert not others & {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    vismt.activate(model, "b")
    assert {name: p for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(parameter.grad is not None for parameter in trained.values())
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    before = model(images())
    optimizer.step()
    assert not torch.equal(model(images()), before)


def test_files_by_name(case, tmp_path: Path) -> None:
    model, expected = case
    for name in ("a", "b", "other"):
        vismt.save_adapter(model, tmp_path / name, name=name)
        vismt.export_peft(model, tmp_path / f"peft-{name}", name=name)
    assert torch.equal(model(images()), expected["b"])
    again, imported = tiny_vit(), tiny_vit()
    for name in ("a", "other", "b"):
        vismt.load_adapter(again, tmp_path / name, name=name)
        vismt.import_peft(imported, tmp_path / f"peft-{name}", name=name)
    for name in ("b", "a", "other"):
        assert torch.equal(vismt.activate(again, name)(images()), expected[name])
        assert torch.allclose(vismt.activate(imported, name)(images()), expected[name], atol=1e-5)


def test_copies_conversions_and_state_dicts_reach_parked_adapters(case) -> None:
    model, expected = case
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("a", "b"):
            assert torch.equal(vismt.activate(copied, name)(images()), expected[name])
    double = copy.deepcopy(model).double()
    for name in ("a", "other", "b"):
        out = vismt.activate(double, name)(images().double())
        assert torch.allclose(out.float(), expected[name], atol=1e-5)
    assert all(value.dtype in (torch.float64, torch.int64, torch.int32) for value in double.state_dict().values())
    fresh = copy.deepcopy(model)
    for name in ("a", "other", "b"):
        shake(vismt.activate(fresh, name), seed=9)
    fresh.load_state_dict(model.state_dict(), strict=True)
    for name in ("a", "other", "b"):
        assert torch.equal(vismt.activate(fresh, name)(images()), expected[name])


def test_a_block_without_adapters_may_stand_between_a_forward_and_its_backward(case) -> None:
    """As where preference training asks for a reference; a backward pass inside is refused, not wrong."""
    model, _ = case
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> torch.Tensor:
        model.zero_grad()
        return model(images()).square().sum()

    def check() -> None:
        grads = [parameter.grad for parameter in parameters]
        assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(expected, grads))

    loss().backward()
    expected = [parameter.grad for parameter in parameters]
    before = loss()
    with vismt.disabled(model), torch.no_grad():
        model(images())
    before.backward()
    check()
    before = loss()
    with (
        pytest.raises(
            UserError, match="disabled: a backward pass in the block is of a forward before it; call it after"
        ),
        vismt.disabled(model),
    ):
        before.backward()
    before = loss()
    with vismt.disabled(model), torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.5)  # of one's own: the graph is wrong from here on
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()
