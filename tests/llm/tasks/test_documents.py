"""Trees and packs against single rows on LMs of many kinds: in one pass where it is exact, else one document after the other."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from helpers import language_models
from helpers.lm_parts import tiny_lm
from torch import nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.llm.net import LmNet, check_first_block
from vismt.llm.tasks import documents
from vismt.llm.tasks.pieces import Piece, collate_pieces, pack, piece, stem, tree

SHAPE = language_models.SHAPE | {"vocab_size": 96, "num_hidden_layers": 3, "pad_token_id": 0, "initializer_range": 0.2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"mamba_chunk_size": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
PLAIN = {"llama": {}, "qwen2": {}, "mistral": {"sliding_window": None}, "falcon": {}, "gpt_neox": {}, "phi3": {}}
WINDOWED = {  # by 24 tokens
    "mistral": {"sliding_window": 24},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0},
    "gemma2": {"sliding_window": 24, "head_dim": 8},
    "gemma3_text": {"sliding_window": 24, "head_dim": 8},
    "gpt_oss": {"sliding_window": 24, "head_dim": 8, **EXPERTS},
    "starcoder2": {"sliding_window": 24},
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 24,
    },
}
OTHERS = {  # columns in ALiBi, masks of another form, states
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "bloom": {"n_layer": 3, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "jamba": {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 16,
        **EXPERTS,
        **MAMBA,
    },
}
PROMPT, ANSWERS = [5, 6, 7, 8], ([20, 20, 21, 22, 23, 24, 25], [30, 31], [40, 41, 42])


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_reaches", {})
    monkeypatch.setattr(documents, "_named", set())


def random_lm(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows(length: int) -> tuple[Piece, list[Piece], Piece, list[Piece]]:
    """Return a tree and its answers alone, a pack and its texts alone; the tree has `length` tokens or a few more."""
    prompt = [3 + place % 90 for place in range(length - 12)] if length > 16 else PROMPT
    branches = tree(prompt, ANSWERS, 99)
    texts = [piece([], [10 + place % 80 for place in range(size)], 99) for size in (length // 2, 5)]
    (packed,) = pack(texts, 99)
    return branches, [stem(branches, number) for number in range(3)], packed, texts


def check_exact(net: LmNet, length: int = 16) -> None:
    """Check likelihoods and gradients of a tree and a pack, in one batch with shorter rows, against rows alone."""
    branches, answers, packed, texts = rows(length)
    shorter = tree(PROMPT[:2], ANSWERS[1:2], 99)
    weight = next(
        p for name, p in net.lm.named_parameters() if p.ndim == 2 and "embed" not in name and "wte" not in name
    )
    found = []
    for trees, packs in (([branches, shorter], [packed]), ([*answers, stem(shorter, 0)], texts)):
        scores = (
            net.branch_nll(collate_pieces(trees))[0].flatten()
            if trees[0].shared
            else net.token_nll(collate_pieces(trees))[0]
        )
        totals = net.token_nll(collate_pieces(packs))[0].sum()
        (gradient,) = torch.autograd.grad(scores.sum() + totals, weight)
        found.append(torch.cat([scores[:4].detach(), totals.detach()[None], gradient.flatten()]))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm() and found[1][:5].min() > 1


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_attention_reads_all_documents_in_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = LmNet(random_lm(kind, **PLAIN[kind]))
    assert documents.reach(net.lm, net.states) == sys.maxsize
    monkeypatch.setattr(documents, "_one_by_one", lambda *_: pytest.fail("one by one"))
    check_exact(net)


@pytest.mark.parametrize("kind", OTHERS)
def test_positions_by_column_and_states_read_one_document_after_the_other(kind: str) -> None:
    net = LmNet(random_lm(kind, **OTHERS[kind]))
    check_exact(net)
    assert documents.reach(net.lm, net.states) == 0


@pytest.mark.parametrize("kind", WINDOWED)
def test_beyond_its_window_an_lm_reads_one_document_after_the_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = LmNet(random_lm(kind, **WINDOWED[kind]))
    check_exact(net, 40)
    assert documents.reach(net.lm, net.states) == 24
    monkeypatch.setattr(documents, "_one_by_one", lambda *_: pytest.fail("one by one"))
    check_exact(net)


def test_the_console_says_once_that_documents_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "stage", lambda name, text: said.append(text))
    nets = [LmNet(random_lm("mistral", sliding_window=24)), LmNet(random_lm("llama"))]
    for net in nets:
        for length in (16, 40, 40):
            net.token_nll(collate_pieces([rows(length)[2]]))
    (text,) = said
    assert text.startswith(
        "MistralForCausalLM reads answers and packed texts one by one if they have more than 24 tokens:"
    )


@pytest.mark.parametrize("first", [0, 1])
def test_items_and_cached_states_go_with_their_document(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = LmNet(tiny_lm().requires_grad_(False), first=first)
    trees = [
        tree([5, 6, 7, 8], [[20, 21], [30, 31, 32]], 99, [-1, 3, -1, 4], [[-1, 1], [2, -1, -1]]),
        tree([5, 9], [[20, 21, 22], [30]], 99, [-1, 0], [[-1, 1, -1], [2]]),
    ]
    vectors = 9 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for together in (sys.maxsize, 0):
        monkeypatch.setattr(documents, "reach", lambda *_, together=together: together)
        lower = net.lower_states(trees) if first else None
        found.append(net.branch_nll({**collate_pieces(trees, lower), "vectors": vectors})[0])
    assert torch.allclose(*found, rtol=1e-4)
    assert not torch.allclose(found[0], net.branch_nll(collate_pieces(trees, lower))[0], rtol=1e-2)  # vectors matter


@pytest.mark.parametrize("kind", ["falcon", "bloom", "mpt", "gpt_neo"])
def test_a_first_block_that_cannot_be_is_one_error(kind: str) -> None:
    lm = random_lm(kind, **{**PLAIN, **WINDOWED, **OTHERS}[kind])
    with pytest.raises(
        UserError, match=r"^model.first_block: 1; the blocks of \w+ForCausalLM cannot .*; set it to 0\.$"
    ):
        check_first_block(lm, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_first_block_of_a_plain_decoder(kind: str) -> None:
    check_first_block(tiny_lm(kind), 2)
