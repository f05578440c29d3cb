"""A MoEfied LoRA model, reimplemented after EMTAL's released code: the reference of `python -m scripts.bench emtal`.

Same function, same gradients as vismt.multitask.emtal.method. The computation differs:

    linears     factors stored as A (i, r) and B (r, o); base product, (x A) B, its scaling and the sum are four results
    router      softmax, ((1 - a) g + a / K) K, spread to (b, n, H), then multiplied onto the pre-activations: backward
                keeps pre-activations, spread weights and the product
    attention   q k^T, its scaling, softmax, dropout and the product with v, each materialised as (b, heads, n, n); the
                class token's row is returned as a map, which the loss does not use

As in vismt, so that only these differences are compared: timm's patch embedding, norms, activation, head and dropout of
p = 0; fp32; the coefficient is state (the release takes it as an argument with a default of a half). Left out: fp16
autocast and its scaler, the dropout of p = 0 on the updates of the later blocks, the difference of two blocks' maps, the
stored logits of quality retaining, and the sizes that the release hard-codes (768, 16, 192, 14 x 14).
Source: github.com/Yewen1486/EMTAL, one commit.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.multitask.emtal.ffn import MoEfiedMlp


class ReleasedLoraLinear(nn.Module):
    """x (..., i) -> W x + b + s (x A) B, A (i, r), B (r, o)."""

    def __init__(self, layer: LowRankLayer) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(layer.lora_A.detach().t().contiguous())
        self.lora_b = nn.Parameter(layer.lora_B.detach().t().contiguous())
        self.base, self.scale = layer.stock(), layer.scale

    def forward(self, x: Tensor) -> Tensor:
        update = self.scale * (x @ self.lora_a @ self.lora_b)
        return self.base(x) + update


class ReleasedFfn(nn.Module):
    """x (b, n, d) and the coefficient a -> (b, n, d)."""

    def __init__(self, mlp: MoEfiedMlp) -> None:
        super().__init__()
        self.fc1, self.fc2, self.router = ReleasedLoraLinear(mlp.fc1), ReleasedLoraLinear(mlp.fc2), mlp.lora_router
        self.act, self.drop1, self.drop2 = mlp.act, mlp.drop1, mlp.drop2
        self.temperature, self.hidden = mlp.temperature, mlp.fc1.out_features

    def forward(self, x: Tensor, fade: float) -> Tensor:
        shares = (self.router(x) / self.temperature).softmax(-1)
        experts = shares.shape[-1]
        omega = spread(((1 - fade) * shares + fade / experts) * experts, self.hidden)
        units = self.fc1(x) * omega
        return self.drop2(self.fc2(self.drop1(self.act(units))))


class ReleasedAttention(nn.Module):
    """x (b, n, d) -> (b, n, d) and the class token's attention to the patches, (b, heads, side, side)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = ReleasedLoraLinear(attention.qkv), ReleasedLoraLinear(attention.proj)
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        self.heads, self.scale = attention.num_heads, attention.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images, tokens, width = x.shape
        parts = self.qkv(x).view(images, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        shares = self.attn_drop(((query @ key.mT) * self.scale).softmax(-1))
        out = (shares @ value).transpose(1, 2).reshape(images, tokens, width)
        side = math.isqrt(tokens - 1)
        return self.proj_drop(self.proj(out)), shares[:, :, 0, 1:].reshape(images, self.heads, side, side)


class ReleasedBlocks(nn.Sequential):
    """timm's pre-norm blocks with the layers above."""

    def __init__(self, blocks: nn.Sequential, fade: float) -> None:
        super().__init__(*blocks)
        self.fade = fade

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            out, _ = block.attn(block.norm1(x))
            x = x + block.drop_path1(block.ls1(out))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x), self.fade)))
        return x


def spread(weights: Tensor, hidden: int) -> Tensor:
    """Spread weights (b, n, e) to (b, n, H): unit h gets the weight of expert h // (H / e)."""
    units = hidden // weights.shape[-1]
    return weights.unsqueeze(-1).expand(*weights.shape, units).reshape(*weights.shape[:-1], hidden)


@torch.no_grad()
def released(model: nn.Module) -> nn.Module:
    """Return a copy, in the release's layout, of a timm ViT adapted with 'emtal' (a fused qkv, no qk norm).

    The fade and the trainable parameters are the same.
    """
    twin = copy.deepcopy(model)
    fade = twin.blocks[0].mlp.fade_value
    for block in twin.blocks:
        block.attn, block.mlp = ReleasedAttention(block.attn), ReleasedFfn(block.mlp)
    twin.blocks = ReleasedBlocks(twin.blocks, fade)
    return twin
