"""A merged model that is saved as a whole is loaded by transformers and timm without vismt."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from helpers.language_models import LMS, tiny_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from safetensors.torch import save_file

import vismt

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "pissa", "s2ft"])
@pytest.mark.parametrize("kind", LMS)
def test_transformers_loads_a_merged_folder(kind: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_lm(kind).to(dtype)
    vismt.adapt(model, method, **({"ratio": 0.25} if method == "s2ft" else {"rank": 2, "alpha": 4}))
    adapted = shake(model)(tokens()).logits
    vismt.merge(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(again) is type(tiny_lm(kind)) and again.dtype == dtype
    state, before = again.state_dict(), tiny_lm(kind).to(dtype).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not all(torch.equal(value, state[key]) for key, value in before.items())
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (kind == "gpt2")
    if dtype == torch.float32:  # a cast also rounds the rotary angles of the model
        assert torch.allclose(again(tokens()).logits, adapted, atol=2e-5)


def test_trained_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny_lm("gpt2")
    vismt.adapt(model, "lora", ["c_attn"], rank=2, also_train=["wte"])
    vismt.merge(shake(model)).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(again.lm_head.weight, model.transformer.wte.weight)
    assert not torch.equal(again.lm_head.weight, tiny_lm("gpt2").lm_head.weight)


@pytest.mark.parametrize("method", ["lora", "pissa", "polar"])
def test_timm_loads_a_merged_file(method: str, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, method, rank=2, also_train=["head"])
    vismt.merge(shake(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=5,
        checkpoint_path=str(tmp_path / "model.safetensors"),
    ).eval()
    assert torch.equal(again(images()), model(images())) and not torch.equal(again(images()), tiny_vit()(images()))
