"""NF4 against the published levels, by hand, and as a projection."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm.pissa.quantized import levels, nf4, on_grid

# Dettmers et al., arXiv 2305.14314, appendix E.
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_levels_are_the_published_ones() -> None:
    assert torch.allclose(levels(), torch.tensor(PUBLISHED, dtype=torch.float64), atol=1e-6)


def test_nearest_level_of_each_block() -> None:
    matrix = torch.zeros(2, 66)
    matrix[0, :3] = torch.tensor([2.0, 1.2, -0.01])
    matrix[1, 65] = -5.0  # alone with three others in the last, short block
    quantized = nf4(matrix)
    # block 1 spans row 0 up to 64: 1.2 / 2 = 0.6 lies nearer to 0.5626 than to 0.7230, and -0.005 is zero
    assert torch.allclose(quantized[0, :3], torch.tensor([2.0, 2 * PUBLISHED[13], 0.0])) and quantized[1, 65] == -5.0
    assert quantized.count_nonzero() == 3


def test_twice_is_once_and_nothing_is_nearer() -> None:
    matrix = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    once = nf4(matrix)
    assert torch.equal(nf4(once), once) and nf4(matrix.double()).dtype == torch.float64
    candidates = matrix.abs().amax(1, keepdim=True)[..., None] * levels().float()
    assert torch.allclose((once - matrix).abs(), (candidates - matrix[..., None]).abs().amin(-1), atol=1e-6)
    half = nf4(matrix.bfloat16().float())
    assert torch.equal(nf4(half.bfloat16().float()).bfloat16(), half.bfloat16())


@pytest.mark.parametrize("shape", [(48, 96), (5, 30), (128, 64)])
def test_the_kernels_of_bitsandbytes_give_the_same_values(shape: tuple[int, int]) -> None:
    pytest.importorskip("bitsandbytes")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_grid(matrix, "bitsandbytes"), nf4(matrix), atol=1e-6, rtol=0)


def test_bitsandbytes_is_asked_for_rows_of_one_block_and_remembered(monkeypatch, tmp_path) -> None:
    calls = []

    def quantize_4bit(blocks: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, None]:
        calls.append((tuple(blocks.shape), blocksize, quant_type))
        return blocks, None

    functional = SimpleNamespace(
        quantize_4bit=quantize_4bit, dequantize_4bit=lambda packed, state: packed.round(decimals=1)
    )
    model = nn.Sequential(nn.Linear(30, 5))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"'bitsandbytes' is not installed .*take quantize='nf4'"):
        vismt.adapt(model, "pissa", rank=2, quantize="bitsandbytes")
    assert type(model[0]) is nn.Linear
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=functional))
    before = model.state_dict()["0.weight"].clone()
    vismt.adapt(model, "pissa", rank=2, quantize="bitsandbytes")
    assert set(calls) == {((3, 64), 64, "nf4")}  # 150 numbers
    assert torch.equal(model[0].quantized, model[0].quantized.round(decimals=1))
    assert torch.equal(model[0].weight, before) and not torch.equal(model[0].quantized, before)
    vismt.save_adapter(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(30, 5))
    fresh.load_state_dict(vismt.unadapt(model).state_dict())
    vismt.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh[0].quantized, fresh[0].quantized.round(decimals=1)) and fresh[0].grid == "bitsandbytes"
