"""Parameters that were trained beside an adapter and are in none of its files: saving warns of them, or refuses."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.tiny import shake, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError

LOST = "'head.weight', 'head.bias' were trained and are not in the file; name them in"


def adapted(**options) -> nn.Module:
    model = tiny_vit()
    vismt.adapt(model, "lora", rank=2, **options)
    return shake(model)


def save(model: nn.Module, folder: Path, **options) -> None:
    """Save in both forms."""
    vismt.save_adapter(model, folder, **options)
    vismt.export_peft(model, folder / "peft", **options)


def silent(model: nn.Module, folder: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, folder, strict=True)
    return True


def test_a_head_that_was_trained_is_named(tmp_path: Path) -> None:
    model = adapted(exclude=["head"])
    assert silent(model, tmp_path)
    model.head.requires_grad_(True)
    assert silent(model, tmp_path)  # it may train, and has not
    with torch.no_grad():
        model.head.weight[1, 3] += 1e-3
        model.head.bias += 1e-3
    for function in (vismt.save_adapter, vismt.export_peft):
        with pytest.warns(UserWarning, match=f"{function.__name__}: {LOST}"):
            function(model, tmp_path / "warned")
        with pytest.raises(UserError, match=f"{function.__name__}: {LOST}"):
            function(model, tmp_path / "refused", strict=True)
    assert (tmp_path / "warned" / "adapter.json").exists() and not (tmp_path / "refused").exists()
    model.head.requires_grad_(False)
    assert silent(model, tmp_path)


def test_a_head_in_also_train_is_in_the_file(tmp_path: Path) -> None:
    model = adapted(exclude=["head"], also_train=["head"])
    assert silent(model, tmp_path)


def test_a_new_head_counts_as_trained(tmp_path: Path) -> None:
    model = adapted(exclude=["head"])
    model.head = nn.Linear(32, 7)
    model.more = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'head\.weight', 'head\.bias', 'more\.weight' and 1 more were trained"):
        vismt.save_adapter(model, tmp_path, strict=True)


def test_a_bias_of_an_adapted_layer(tmp_path: Path) -> None:
    model = adapted()
    bias = model.blocks[0].attn.qkv.bias
    bias.requires_grad_(True)
    assert silent(model, tmp_path)
    with torch.no_grad():
        bias += 1
    with pytest.raises(UserError, match=r"'blocks\.0\.attn\.qkv\.bias' were trained"):
        vismt.save_adapter(model, tmp_path, strict=True)


def test_a_cast_does_not_count_as_training(tmp_path: Path) -> None:
    model = adapted(exclude=["head"])
    model.head.requires_grad_(True)
    assert silent(model.to(torch.bfloat16), tmp_path)


def test_a_loaded_adapter_knows_its_base(tmp_path: Path) -> None:
    vismt.save_adapter(adapted(exclude=["head"]), tmp_path)
    model = vismt.load_adapter(tiny_vit(), tmp_path)
    model.head.requires_grad_(True)
    assert silent(model, tmp_path / "again")
    shake(model)
    with pytest.raises(UserError, match=LOST):
        vismt.save_adapter(model, tmp_path / "again", strict=True)
