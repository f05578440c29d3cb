"""The benchmark of the starts: copies share values and stay apart, energies are shares of the optimum, targets are printed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import images, tiny_vit

import vismt
from vismt.bench import lowrank
from vismt.bench.timing import Timing


def test_copies_share_values_but_not_modules_or_parameters() -> None:
    model = tiny_vit()
    made = lowrank.sharing(model)
    assert made.blocks[0].attn.qkv.weight is not model.blocks[0].attn.qkv.weight
    assert made.blocks[0].attn.qkv.weight.data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
    before = copy.deepcopy(model.state_dict())
    vismt.adapt(made, "pissa", rank=2)
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear and torch.allclose(made(images()), model(images()), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_energies_are_shares_of_the_optimum(monkeypatch) -> None:
    monkeypatch.setattr(lowrank, "RANK", 4)
    found = lowrank.energies("test", [torch.randn(40, 60), torch.randn(60, 40)])
    ours, theirs = found.missed[lowrank.FAST], found.missed[lowrank.PEFT_FAST]
    assert len(ours) == 2 and all(-1e-6 < share < 0.02 for share in ours) and all(a < b for a, b in zip(ours, theirs))
    assert "target: vismt randomized misses at most 1e-3" in str(found)


def test_the_table_names_ratio_and_target() -> None:
    found = lowrank.StartResult("title", Timing({"a": [1.0, 3.0], "b": [2.0, 4.0]}), [("a", "b", 0.6)])
    # by round 0.5 and 0.75
    assert "a / b: 0.625 (0.50..0.75), target at most 0.60" in str(found)


@pytest.mark.slow
def test_the_whole_benchmark_runs() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("attr")
    text = "\n".join(str(result) for result in lowrank.run(rounds=1))
    assert all(name in text for name in ("vismt exact / peft pissa", "energy missed", "vismt corda kpm / peft corda"))
