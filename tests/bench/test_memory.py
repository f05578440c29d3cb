"""The memory bench on a model of a few kilobytes: what is measured is what the formula says; the sizes of the real one."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from helpers.lm_parts import save_lm, tokenizer

from vismt.bench import memory
from vismt.cli import main
from vismt.errors import UserError
from vismt.lowrank.activations import Decoder

VARIANTS = ("vismt lora r=2", "peft lora r=2", "vismt ilora r=2", "LISA 2 of 8", "LISA 2 of 8 alone")


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SIZES", Decoder(hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocabulary=40))
        patch.setattr(memory, "LENGTH", 16)
        patch.setattr(memory, "RANK", 2)
        patch.setattr(memory, "EXPERTS", 2)
        yield memory.run(rounds=1)[0]


def test_every_size_but_the_peak_is_the_formula_to_the_byte(result) -> None:
    assert set(VARIANTS) <= set(result.measured)
    for name, seen in result.measured.items():
        told = result.predicted[name]
        gates = 4 * 4 * 2 if "ilora" in name else 0  # of 4 samples, for 2 experts
        assert (seen.weights, seen.activations - gates, seen.gradients) == (
            told.weights,
            told.activations,
            told.gradients,
        ), name
        counters = seen.optimizer - told.optimizer  # AdamW's step counters, 4 bytes a tensor
        assert 0 < counters < 4 * 200 and counters % 4 == 0, name
        # On a model this small what a block's backward pass makes in passing shows.
        assert 0.99 * told.peak <= seen.peak < 1.1 * told.peak, name


def test_the_order_of_the_variants(result) -> None:
    full, seen = result.measured[memory.FULL], result.measured
    assert seen["vismt lora r=2"].activations == seen["peft lora r=2"].activations < full.activations
    assert seen["LISA 2 of 8 alone"].activations < seen["LISA 2 of 8"].activations < full.activations
    # Embedding 40 * 32, head the same, norm 32; a layer: q and o 32 * 32, k and v 16 * 32, three of 48 * 32, two norms 32.
    layer = 2 * 1024 + 2 * 512 + 3 * 1536 + 64
    assert (
        result.trainable["LISA 2 of 8"] == 2 * 1280 + 32 + 2 * layer
        and result.trainable["LISA 2 of 8 alone"] == 2 * layer
    )
    assert (
        full.gradients == 4 * (2 * 1280 + 32 + 8 * layer) == full.weights - 4 * 2 * 4
    )  # rotary's frequencies: two buffers of 4


def test_the_table_shows_each_variant_and_below_it_the_formula(result) -> None:
    lines = str(result).splitlines()
    assert len(lines) == 3 + 2 * len(result.measured) and lines[-1].startswith(
        "step of vismt ilora r=2 / vismt lora r=2: "
    )
    for number, name in enumerate(result.measured):
        assert lines[2 + 2 * number].startswith(name) and not lines[3 + 2 * number][:33].strip()
    assert lines[2].startswith(memory.FULL) and "1.000  1.000  1.000  1.000" in lines[2]


def test_a_model_by_its_name(tmp_path, monkeypatch) -> None:
    """Grouped queries and a tied head, whose tensor is trained and stepped once; the same formula, to the byte."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.setattr(memory, "LENGTH", 8)
    monkeypatch.setattr(memory, "RANK", 2)
    monkeypatch.setattr(memory, "EXPERTS", 2)
    shape = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(shape).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    result = memory.run(1, "cpu", str(tmp_path))[0]
    assert str(result).splitlines()[0].startswith(f"{tmp_path} 32 x 3, 4 x 8 tokens")
    for name, seen in result.measured.items():
        told = result.predicted[name]
        assert (seen.weights, seen.gradients) == (told.weights, told.gradients), name
        assert seen.activations == pytest.approx(told.activations, rel=0.02), (
            name
        )  # Qwen2's biases are no part of the formula
    full, lisa = result.trainable[memory.FULL], result.trainable["LISA 2 of 3"]
    layer = (full - 50 * 32 - 32) // 3
    assert lisa == 50 * 32 + 32 + 2 * layer and result.trainable["LISA 2 of 3 alone"] == 2 * layer
    lora, sliced = result.trainable["vismt lora r=2"], result.trainable["S2FT O and D"]
    assert abs(sliced - lora) <= 3 * 32 * 8  # half a head of each block at most


def test_models_that_the_formula_does_not_describe(tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="is of type gpt2; the formula is of llama and qwen2"):
        memory.run(1, "cpu", str(save_lm(tmp_path, "gpt2")))
    assert main(["bench", "core", "--model", "some"]) == 2
    assert "--model is of 'memory', 'core' has models of its own" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_real_sizes() -> None:
    pytest.importorskip("peft")
    result = memory.run(rounds=1)[0]
    seen, full = result.measured, result.measured[memory.FULL]
    shares = {name: (costs.activations / full.activations, costs.peak / full.peak) for name, costs in seen.items()}
    assert shares["vismt lora r=16"] == pytest.approx((0.900, 0.661), abs=2e-3)
    assert shares["LISA 2 of 8"] == pytest.approx((0.768, 0.667), abs=2e-3)
    assert shares["S2FT O and D"] == pytest.approx((0.678, 0.547), abs=2e-3)
    assert result.trainable["S2FT O and D"] == 1_249_280
    assert result.trainable["vismt lora r=16"] == 1_249_280 and result.trainable["LISA 2 of 8"] == 8_423_936
    for name in (memory.FULL, "vismt lora r=16", "LISA 2 of 8"):
        assert seen[name].peak == pytest.approx(result.predicted[name].peak, rel=0.01)
