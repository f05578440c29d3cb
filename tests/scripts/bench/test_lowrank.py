"""The benchmark of the starts: copies share values but not parameters, energies are shares of the optimum."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny import images, tiny_vit

import vismt
from scripts.bench import lowrank, updates


def test_copies_share_values_but_not_modules_or_parameters() -> None:
    model = tiny_vit()
    sharing = lowrank.sharing(model)
    assert sharing.blocks[0].attn.qkv.weight is not model.blocks[0].attn.qkv.weight
    assert sharing.blocks[0].attn.qkv.weight.data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
    before = copy.deepcopy(model.state_dict())
    vismt.adapt(sharing, "pissa", rank=2)
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear and torch.allclose(
        sharing(images()), model(images()), atol=1e-6
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_energies_are_shares_of_the_optimum(monkeypatch) -> None:
    monkeypatch.setattr(lowrank, "RANK", 4)
    result = lowrank.energies("test", [torch.randn(40, 60), torch.randn(60, 40)])
    missed, missed_by_peft = result.missed[lowrank.FAST], result.missed[lowrank.PEFT_FAST]
    assert (
        len(missed) == 2
        and all(-1e-6 < share < 0.02 for share in missed)
        and all(a < b for a, b in zip(missed, missed_by_peft))
    )
    assert "target: vismt randomized misses at most 1e-3" in str(result)


def test_what_is_timed_beside_ours_gives_the_same_values(monkeypatch) -> None:
    """Both sums and both forms of the field have equal values, so that the ratios compare equal work."""
    peft = pytest.importorskip("peft")
    vismt_sum, peft_sum = updates.summed(peft, tiny_vit(), rank=2)
    sums, peft_sums = vismt_sum(), peft_sum()
    assert len(sums) == len(peft_sums) == 8
    for path, update in sums.items():
        torch.testing.assert_close(update.delta(), peft_sums[path].delta().detach(), atol=1e-5, rtol=1e-4)
    z, gradient = torch.linalg.qr(torch.randn(40, 4))[0] * 1.1, torch.randn(40, 4)
    torch.testing.assert_close(updates.by_square(z, gradient), updates.landing_field(z, gradient, updates.ATTRACTION))
    monkeypatch.setattr(updates, "TALL", 64)
    assert "vismt landing / n x n form" in str(updates.landing(1, torch.device("cpu")))


@pytest.mark.slow
def test_the_whole_benchmark_runs() -> None:
    pytest.importorskip("attr")
    text = "\n".join(str(result) for result in lowrank.run(rounds=1))
    rows = ("vismt exact / peft pissa", "energy missed", "vismt corda kpm / peft corda", "vismt svd / peft svd")
    assert all(name in text for name in rows)
