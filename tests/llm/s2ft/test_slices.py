"""S2FT adapters on a stock model: files, and exact switching."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.language_models import MODELS, outputs
from helpers.tiny import holds, shake, snapshot, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import read_slices, select_units, switch
from vismt.llm.s2ft.slices import Slice
from vismt.lowrank.layers.base import adapter_layers

EVERY = ("v", "o", "u", "d")


def saved(name: str, folder: Path, seed: int, **options: object) -> tuple[nn.Module, Path]:
    model = MODELS[name]()
    vismt.adapt(model, "s2ft", seed=seed, **{"ratio": 0.3, "parts": EVERY, **options})
    shake(model, 0.1, seed)
    return model, vismt.save_adapter(model, folder / f"{name}-{seed}")


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-conv1d", "vit"])
def test_files_are_in_the_order_of_the_base(name: str, tmp_path: Path) -> None:
    """Loaded on a fresh base the logits are the same, and only the chosen units differ."""
    model, folder = saved(name, tmp_path, 1)
    stock, fresh = snapshot(MODELS[name]()), MODELS[name]()
    vismt.load_adapter(fresh, folder)
    assert torch.equal(outputs(fresh), outputs(model))
    plain = switch(MODELS[name](), folder)
    assert torch.allclose(outputs(plain), outputs(model), atol=1e-5 * float(outputs(model).detach().abs().max()))
    selection = select_units(MODELS[name](), parts=EVERY, ratio=0.3, seed=1)
    assert sum(len(parts) for parts in selection.units.values()) == len(read_slices(folder))
    vismt.merge(fresh)
    for key, change in read_slices(folder).items():
        weight, base = fresh.get_submodule(key).weight, stock[f"{key}.weight"]
        changed = (weight != base).t() if name.startswith("gpt2") else weight != base
        features = changed.any(1 - change.dim).nonzero()[:, 0]
        assert torch.equal(features, change.index.sort().values), key


def test_switching_leaves_no_trace(tmp_path: Path) -> None:
    """A -> B -> none is the base bit for bit, although A and B overlap; B after A equals B alone."""
    for dtype in (torch.float32, torch.bfloat16):
        (_, first_folder), (_, second_folder) = (
            saved("llama-gqa", tmp_path, 1),
            saved("llama-gqa", tmp_path, 2, ratio=0.5),
        )
        first, second = read_slices(first_folder), read_slices(second_folder)
        path = "model.layers.0.mlp.down_proj"
        assert set(first[path].index.tolist()) & set(second[path].index.tolist())
        model, alone = MODELS["llama-gqa"]().to(dtype), MODELS["llama-gqa"]().to(dtype)
        stock = snapshot(model)
        switch(model, first)
        assert not torch.equal(model.get_submodule(path).weight, stock[f"{path}.weight"])
        switch(model, second)
        switch(alone, second)
        assert holds(model, alone.state_dict())
        switch(model, None)
        assert holds(model, stock)


def test_slices_of_another_base_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    """As with load_adapter, before and after a switch; a cast of the base counts as the same base."""
    _, folder = saved("vit", tmp_path, 1)
    slices, other = read_slices(folder), tiny_vit(seed=9)
    before, message = (
        snapshot(other),
        r"slices: made for other weights than this VisionTransformer has \('blocks\.0",
    )
    with pytest.raises(UserError, match=message + r".*pass on_other_base='warn'"):
        switch(other, slices)
    assert holds(other, before)
    with pytest.warns(UserWarning, match=message):
        switch(other, slices, on_other_base="warn")
    assert not torch.equal(other.blocks[0].mlp.fc2.weight, before["blocks.0.mlp.fc2.weight"])
    # The base below a switch is compared, and a refused switch leaves the current switch in place.
    model, (_, second) = tiny_vit(), saved("vit", tmp_path, 2, ratio=0.9)
    large = {
        path: Slice(change.dim, change.index, change.delta + 5.0, change.base)
        for path, change in read_slices(second).items()
    }
    switch(switch(model, large), slices)
    assert holds(model, switch(tiny_vit(), slices).state_dict())
    switch(model, large)
    switched = snapshot(model)
    wrong = {
        path: Slice(change.dim, change.index, change.delta, tuple(10 * v for v in change.base))
        for path, change in slices.items()
    }
    with pytest.raises(UserError, match="made for other weights"):
        switch(model, wrong)
    assert holds(model, switched)
    switch(model, None)
    assert holds(model, tiny_vit().state_dict())
    switch(tiny_vit().to(torch.bfloat16), slices)
    unknown = {path: Slice(change.dim, change.index, change.delta) for path, change in slices.items()}
    assert torch.equal(outputs(switch(tiny_vit(), unknown)), outputs(switch(tiny_vit(), slices)))


def test_a_switched_model_is_not_adapted(tmp_path: Path) -> None:
    """The values that a switch keeps would overwrite an update that was merged meanwhile."""
    _, folder = saved("vit", tmp_path, 1)
    plain = tiny_vit()
    vismt.adapt(plain, "lora", rank=2)
    lora, whole = vismt.save_adapter(plain, tmp_path / "lora"), nn.Module()
    whole.vit = switch(tiny_vit(), read_slices(folder))
    message = r" is switched to S2FT slices; call vismt\.llm\.switch\(\.\.\., None\) first"
    for method in ("lora", "s2ft", "pissa", "lisa"):
        with pytest.raises(UserError, match="adapt: the model" + message):
            vismt.adapt(whole.vit, method)
    for other in (folder, lora):
        with pytest.raises(UserError, match="load_adapter: the model" + message):
            vismt.load_adapter(whole.vit, other)
    with pytest.raises(UserError, match="adapt: its part 'vit'" + message):
        vismt.adapt(whole, "lora", rank=2)
    assert all(isinstance(block.mlp.fc2, nn.Linear) for block in whole.vit.blocks) and not adapter_layers(whole)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    switch(whole.vit, None)
    assert torch.equal(outputs(whole.vit), outputs(tiny_vit()))
    vismt.adapt(whole.vit, "lora", rank=2)


def test_a_second_adapter_takes_the_place_of_the_first_in_training(tmp_path: Path) -> None:
    """load_adapter on a model adapted in the same way puts other units in the place of its own."""
    (model, _), (trained, folder) = saved("vit", tmp_path, 1), saved("vit", tmp_path, 2)
    vismt.load_adapter(model, folder)
    assert torch.equal(outputs(model), outputs(trained))
    vismt.unadapt(model)
    assert holds(model, tiny_vit().state_dict())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    _, folder = saved("vit", tmp_path, 1)
    slices = read_slices(folder)
    model = tiny_vit(embed_dim=64)
    with pytest.raises(UserError, match="another model"):
        switch(model, slices)
    assert holds(model, tiny_vit(embed_dim=64).state_dict())
    with pytest.raises(UserError, match="has no linear 'blocks"):
        switch(nn.Linear(2, 2), slices)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv: its weight was \(96, 32\), here it is \(192, 64\)"):
        vismt.load_adapter(model, folder)
    plain = tiny_vit()
    vismt.adapt(plain, "lora", rank=2)
    with pytest.raises(UserError, match="already carries 'lora'"):
        switch(plain, slices)
    other = vismt.save_adapter(plain, tmp_path / "lora")
    with pytest.raises(UserError, match="method 'lora'; slices can be switched only for an 's2ft'"):
        read_slices(other)
