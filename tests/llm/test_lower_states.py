"""Stored outputs of frozen blocks: equal bits, and a file for each text, weights and depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.lm_parts import tiny_lm

from vismt.llm.net import LmNet, blocks, stored_lower_states
from vismt.llm.tasks.pieces import Piece, piece
from vismt.methods import adapt

TEXTS = ([3, 4, 5], [6, 7], [3, 4, 5], [8, 9, 10])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    return tmp_path / "features"


def pieces(texts: tuple[list[int], ...] = TEXTS) -> list[Piece]:
    return [piece([], ids, 8) for ids in texts]


def net(first: int = 1) -> LmNet:
    torch.manual_seed(0)
    return LmNet(tiny_lm(), first=first)


def count_runs(model: LmNet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each forward pass of the lower blocks."""
    ran: list[int] = []
    states = model.states
    monkeypatch.setattr(model, "states", lambda batch: ran.append(1) or states(batch))
    return ran


def test_another_model_of_equal_weights_reads_equal_bits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = net().lower_states(pieces())
    first = stored_lower_states(net(), pieces())
    again = net()
    adapt(again.lm, "lora", targets=r".*layers\.1\..*q_proj", rank=2)  # above the stored blocks
    ran = count_runs(again, monkeypatch)
    second = stored_lower_states(again, pieces())
    assert not ran and len(list(cache.iterdir())) == 1
    assert second[0] is second[2] and [len(states) for states in second] == [3, 2, 3, 3]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, first, second))


def test_a_forward_of_an_instance_stays() -> None:
    model = net()
    upper = blocks(model.lm)[1]
    upper.forward = own = upper.forward  # as hooks of other libraries set one
    model.lower_states(pieces())
    assert vars(upper)["forward"] is own


@pytest.mark.parametrize("changed", ["weights", "embeddings", "texts", "depth", "settings"])
def test_whatever_decides_a_state_has_a_file_of_its_own(cache: Path, changed: str) -> None:
    stored_lower_states(net(2), pieces())
    model, texts = net(1 if changed == "depth" else 2), TEXTS
    with torch.no_grad():
        if changed == "weights":
            next(blocks(model.lm)[1].parameters()).add_(1e-3)
        elif changed == "embeddings":
            model.lm.get_input_embeddings().weight[3, 0] += 1e-3
        elif changed == "settings":
            model.lm.config.rms_norm_eps *= 2
        elif changed == "texts":
            texts = (*TEXTS, [11])
    states = stored_lower_states(model, pieces(texts))
    assert len(list(cache.iterdir())) == 2
    assert all(torch.equal(a, b) for a, b in zip(states, model.lower_states(pieces(texts))))


def test_a_damaged_file_is_computed_again(cache: Path, capsys: pytest.CaptureFixture) -> None:
    expected = stored_lower_states(net(), pieces())
    (file,) = cache.iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert all(torch.equal(a, b) for a, b in zip(expected, stored_lower_states(net(), pieces())))
    assert "is damaged" in capsys.readouterr().out


def test_blocks_of_unknown_code_are_not_stored(cache: Path) -> None:
    model = net()
    blocks(model.lm)[0].register_forward_hook(lambda module, args, output: output)
    stored_lower_states(model, pieces())
    assert not cache.exists()
