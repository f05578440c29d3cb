"""The closed form against what autograd keeps, byte for byte, and against sums by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.language_models import random_lm
from torch import nn

import vismt
from scripts.bench.accounting import saved_activation_bytes
from scripts.bench.activations import BlockTraining, Decoder, decoder_activation_bytes
from vismt.llm import LISA

BATCH, LENGTH, DEPTH = 3, 8, 3
SIZES = Decoder(hidden=16, ffn=24, heads=4, kv_heads=2, head_dim=4, vocabulary=30)
TRAINED, FROZEN = BlockTraining("trained"), BlockTraining("frozen")


def decoder(family: str) -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "vocab_size": 30}
    return random_lm(family, **shape, tie_word_embeddings=False).train()


def measured(model: nn.Module) -> int:
    tokens = torch.randint(30, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return saved_activation_bytes(model, lambda: model(input_ids=tokens, labels=tokens).loss)


def formula(blocks: list[BlockTraining], embeddings: bool = True, norm: bool = True, head: bool = True) -> int:
    return decoder_activation_bytes(SIZES, BATCH, LENGTH, blocks, embeddings=embeddings, norm=norm, head=head)


def test_one_block_by_hand() -> None:
    # h = q = 16, k = 8, I = 24, n = 4. Trained: 6 * 16 + 2 * 16 + 2 * 8 + 4 * 24 + 4 + 2 = 246.
    # Frozen: 2 * 16 + 2 * 16 + 2 * 8 + 3 * 24 + 4 + 2 = 158.
    # Final norm 16 + 1 + 16, head's input 16, logits 30: 79. For 24 tokens of 4 bytes, ids and labels 16 bytes a token,
    # cos and sin 2 * 8 * 4 numbers, the loss's divisor one.
    assert formula([TRAINED]) == 24 * (4 * (246 + 79) + 16) + 4 * 64 + 4 == 31_844
    assert formula([TRAINED, FROZEN]) - formula([TRAINED]) == 24 * 4 * 158
    # The ratio that bounds what any method can save: (10 h + 4 I) / (6 h + 3 I) = 1.476 at I = 2.6875 h.
    wide = Decoder(hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocabulary=1)
    big, small = (
        decoder_activation_bytes(wide, 1, 1, [block] * 1000, embeddings=True, norm=False, head=False)
        for block in (TRAINED, FROZEN)
    )
    assert big / small == pytest.approx(1.476, abs=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_lisa_and_lora_to_the_byte(family: str) -> None:
    model = decoder(family)
    assert measured(model) == formula([TRAINED] * DEPTH)
    for active in range(DEPTH + 1):
        for embeddings, exclude in ((True, ()), (False, ()), (False, ("lm_head", "model.norm")), (True, ("lm_head",))):
            if not active and exclude and not embeddings:
                continue  # nothing is trained, so there is no backward pass
            model = decoder(family)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            lisa = LISA(model, optimizer, active=active, train_embeddings=embeddings, exclude=exclude)
            blocks = [TRAINED if layer in lisa.active_layers else FROZEN for layer in range(DEPTH)]
            norm, head = "model.norm" not in exclude, "lm_head" not in exclude
            assert measured(model) == formula(blocks, embeddings, norm, head), (active, embeddings, exclude)
    for rank in (1, 3):
        model = decoder(family)
        vismt.adapt(model, "lora", rank=rank)
        assert measured(model) == formula([BlockTraining("lora", rank)] * DEPTH, False, False, False)


@pytest.mark.parametrize("attention,ffn", [(4, 5), (0, 5)])
def test_slices_of_o_and_d_to_the_byte(attention: int, ffn: int) -> None:
    model = decoder("llama")
    shares = {"o": attention / 16, "d": ffn / 24}
    parts = [part for part in shares if shares[part]]
    vismt.adapt(model, "s2ft", parts=parts, ratio={part: shares[part] for part in parts})
    assert measured(model) == formula([BlockTraining("sliced", sliced=(attention, ffn))] * DEPTH, False, False, False)
