"""Language models of two blocks for tests: a Llama with grouped queries, a Qwen2 with biases, a GPT-2 with Conv1D, tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LMS = ("llama", "qwen2", "gpt2")


def tiny_lm(kind: str, seed: int = 0) -> nn.Module:
    """Width 32, 40 words, weights of standard deviation 0.2 so that the logits differ from each other."""
    import transformers

    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
                                         bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval()
    shape = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, tie_word_embeddings=False)).eval()
    with torch.no_grad():  # they start at zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def tokens(count: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    """int64 (count, length), words of `tiny_lm`."""
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...] = (8, 5, 3), seed: int = 1) -> dict[str, Tensor]:
    """Token ids and mask (b, n) of samples of several lengths, padded on the right."""
    ids = tokens(len(lengths), max(lengths), seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the Frobenius norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
