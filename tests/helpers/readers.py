"""Tiny models whose modules read weights themselves: experts in one tensor in both layouts, attention of torch.nn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import images

WIDTH, EXPERTS = 8, 4
SHARED: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": WIDTH,
    "pad_token_id": 0,
}
LMS = ("mixtral", "qwen3_moe", "gpt_oss")
# What is adapted of each model: all that it reads itself, and a linear.
TARGETS = {
    **{kind: ["experts.gate_up_proj", "experts.down_proj", "q_proj"] for kind in LMS},
    "vit": ["in_proj_weight", "out_proj", "mlp.0"],
    "encoder": ["in_proj_weight", "out_proj", "linear1"],
    "cross": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"],
}


class Cross(nn.Module):
    """Attention on keys and values of other widths, which has a parameter for each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :6], x[..., :4])[0]


def reader(kind: str) -> nn.Module:
    """Return a model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    if kind in LMS:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **SHARED)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "experts" in name:  # large enough for their updates to be seen in the logits
                nn.init.normal_(parameter, std=0.2)
    elif kind == "vit":
        import torchvision

        shape = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
        model = torchvision.models.VisionTransformer(**shape, num_classes=5)
        nn.init.normal_(model.heads.head.weight)
    elif kind == "encoder":
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2))
    else:
        model = Cross()
    return model.eval()


def run(model: nn.Module, kind: str) -> Tensor:
    """Return the output for one fixed batch."""
    generator = torch.Generator().manual_seed(1)
    if kind in LMS:
        return model(input_ids=torch.randint(3, 48, (2, 7), generator=generator)).logits
    return model(images() if kind == "vit" else torch.randn(2, 5, WIDTH, generator=generator))
