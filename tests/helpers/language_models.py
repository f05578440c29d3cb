"""Random language models of two blocks in common layouts: grouped queries, biases, norms, fused and transposed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import built_once, images, tiny_vit

transformers = pytest.importorskip("transformers")

LMS = ("llama", "qwen2", "gpt2")
SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def random_lm(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    """Return a newly initialised causal LM of a model type in eval mode. changes: to SHAPE, which GPT-2 renames."""
    defaults = NO_DROPOUT if kind == "gpt2" else {}
    return built_once(_causal_lm, seed, kind, **{**SHAPE, **defaults, **changes})


def _causal_lm(kind: str, **shape: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape))


def tiny_lm(kind: str, seed: int = 0) -> nn.Module:
    """Return an LM with weights of standard deviation 0.2, so that the logits differ, and with biases that are not zero."""
    model = random_lm(kind, seed, initializer_range=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind == "qwen2" and name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def moved_lm(kind: str, **changes: object) -> nn.Module:
    """Return an LM with eight heads and noise on every parameter, including norms and biases."""
    model = random_lm(kind, **{"num_attention_heads": 8, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-mha": lambda: moved_lm("llama", num_key_value_heads=8),
    "llama-gqa": lambda: moved_lm("llama"),
    "llama-mqa": lambda: moved_lm("llama", num_key_value_heads=1, head_dim=6),
    "qwen2-biases": lambda: moved_lm("qwen2"),
    "qwen3-head-norms": lambda: moved_lm("qwen3", head_dim=6),
    "olmo2-wide-norms": lambda: moved_lm("olmo2"),
    "phi3-fused": lambda: moved_lm("phi3", pad_token_id=0),
    "gpt2-conv1d": lambda: moved_lm("gpt2", num_attention_heads=4, max_position_embeddings=32),
    "vit": tiny_vit,
    "vit-norms": lambda: tiny_vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
}


def tokens(count: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    """Return random token ids int64 (count, length) of these models."""
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...] = (8, 5, 3), seed: int = 1) -> dict[str, Tensor]:
    """Return token ids and mask (b, n) of samples of several lengths, padded on the right."""
    ids = tokens(len(lengths), max(lengths), seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def stock(kind: str) -> nn.Module:
    """Return a tiny ViT ("vit") or LM."""
    return tiny_vit() if kind == "vit" else tiny_lm(kind)


def run(model: nn.Module, kind: str) -> Tensor:
    """Return the logits of a model of a kind of `stock`."""
    with torch.no_grad():
        return model(images()) if kind == "vit" else model(tokens()).logits


def outputs(model: nn.Module, seed: int = 0) -> Tensor:
    """Return the logits of two small inputs."""
    if hasattr(model, "config"):
        return model(tokens(2, 7, seed)).logits
    return model(images(2, seed=seed).to(next(model.parameters()).dtype))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Frobenius norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
