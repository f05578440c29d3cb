"""Random language models with the layouts that occur: grouped queries, biases, norms, fused and transposed projections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import images, tiny_vit
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "attn_implementation": "sdpa",
}


def lm(kind: str, **changes: object) -> nn.Module:
    """A random causal LM whose biases and norms are not trivial."""
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        sizes = {**SIZES, **changes}
        if kind == "Phi3":
            sizes["pad_token_id"] = 0
        config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def tokens(seed: int = 0, count: int = 2) -> Tensor:
    return torch.randint(40, (count, 7), generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-mha": lambda: lm("Llama", num_key_value_heads=8),
    "llama-gqa": lambda: lm("Llama"),
    "llama-mqa": lambda: lm("Llama", num_key_value_heads=1, head_dim=6),
    "qwen2-biases": lambda: lm("Qwen2"),
    "qwen3-head-norms": lambda: lm("Qwen3", head_dim=6),
    "olmo2-wide-norms": lambda: lm("Olmo2"),
    "phi3-fused": lambda: lm("Phi3"),
    "gpt2-conv1d": lambda: lm("GPT2"),
    "vit": tiny_vit,
    "vit-norms": lambda: tiny_vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
}


def outputs(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits of two small inputs."""
    if hasattr(model, "config"):
        return model(tokens(seed)).logits
    return model(images(2, seed=seed).to(next(model.parameters()).dtype))
